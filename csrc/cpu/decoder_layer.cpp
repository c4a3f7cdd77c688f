#include "decoder_layer.h"

#include "fastft/numeric.h"
#include "lora_layers.h"
#include "room.h"

namespace fastft {
namespace {

constexpr int kBFloat16 = static_cast<int>(DType::kBFloat16);
constexpr int kFirst[] = {0, 3, 4, 6}, kCount[] = {3, 1, 2, 1};  // q k v, o, gate up, down
enum Group { kQkv, kO, kGateUp, kDown };

// Hands out stretches of one block, each on a cache line.
class Stretches {
 public:
  explicit Stretches(void* block) : block_(static_cast<char*>(block)) {}
  void* bytes(int64_t count) {
    void* at = block_ == nullptr ? nullptr : block_ + used_;
    used_ += (count + 63) / 64 * 64;
    return at;
  }
  void* rows(int64_t rows, int64_t cols) { return bytes(rows * cols * 2); }
  int64_t used() const { return used_; }

 private:
  char* block_;
  int64_t used_ = 0;
};

int64_t rows_of(const DecoderLayer& layer) { return layer.batch * layer.tokens; }

// Features that each projection reads, and gives.
struct Sizes {
  int64_t in[kProjections], out[kProjections];
  explicit Sizes(const DecoderLayer& layer) {
    const int64_t q = layer.heads * layer.width, kv = layer.kv_heads * layer.width;
    const int64_t of_in[] = {layer.features, layer.features, layer.features, q,
                             layer.features, layer.features, layer.inner};
    const int64_t of_out[] = {q, kv, kv, layer.features, layer.inner, layer.inner, layer.features};
    for (int i = 0; i < kProjections; ++i) {
      in[i] = of_in[i];
      out[i] = of_out[i];
    }
  }
};

// What a forward leaves. heads: q and k as attention reads them, in their own place where no norm
// is between.
struct Kept {
  void *n, *q, *k, *v, *heads[2], *attended, *h, *m, *gate, *up, *s[kProjections];
  float *rstd, *rstd_2, *of_heads[2], *lse;
  int64_t bytes;

  Kept(const DecoderLayer& layer, void* block) {
    const int64_t rows = rows_of(layer), features = layer.features;
    const Sizes sizes(layer);
    Stretches room(block);
    n = room.rows(rows, features);
    q = room.rows(rows, sizes.out[0]);
    k = room.rows(rows, sizes.out[1]);
    v = room.rows(rows, sizes.out[2]);
    const int64_t counts[] = {layer.heads, layer.kv_heads};
    for (int i = 0; i < 2; ++i) {
      heads[i] = layer.head_norms ? room.rows(rows, sizes.out[i]) : i == 0 ? q : k;
      const int64_t values = layer.head_norms ? rows * counts[i] : 0;
      of_heads[i] = static_cast<float*>(room.bytes(values * 4));
    }
    attended = room.rows(rows, sizes.in[3]);
    h = room.rows(rows, features);
    m = room.rows(rows, features);
    gate = room.rows(rows, layer.inner);
    up = room.rows(rows, layer.inner);
    for (int i = 0; i < kProjections; ++i) s[i] = room.rows(rows, layer.projections[i].r);
    rstd = static_cast<float*>(room.bytes(rows * 4));
    rstd_2 = static_cast<float*>(room.bytes(rows * 4));
    lse = static_cast<float*>(room.bytes(rows * layer.heads * 4));
    bytes = room.used();
  }
};

// What a backward writes on the way. The gradients of attention are made once those of the unit
// have been read, in their place.
struct Between {
  void *product, *d_gate, *d_up, *dm, *dh, *d_attended, *dq, *dk, *dv, *dn;
  int64_t bytes;

  Between(const DecoderLayer& layer, void* block) {
    const int64_t rows = rows_of(layer), features = layer.features;
    const Sizes sizes(layer);
    Stretches room(block);
    dh = room.rows(rows, features);
    dm = room.rows(rows, features);
    const int64_t shared = room.used();
    product = room.rows(rows, layer.inner);
    d_gate = room.rows(rows, layer.inner);
    d_up = room.rows(rows, layer.inner);
    Stretches again(block == nullptr ? nullptr : static_cast<char*>(block) + shared);
    d_attended = again.rows(rows, sizes.in[3]);
    dq = again.rows(rows, sizes.out[0]);
    dk = again.rows(rows, sizes.out[1]);
    dv = again.rows(rows, sizes.out[2]);
    dn = again.rows(rows, features);
    const int64_t ends = shared + again.used();
    bytes = room.used() < ends ? ends : room.used();
  }
};

// A call of one group of projections; ys: their results, or the gradients of those.
LoraLayers products(const DecoderLayer& layer, const Kept& kept, Group group, void* x,
                    void* const* ys) {
  const Sizes sizes(layer);
  const int first = kFirst[group];
  LoraLayers call = {rows_of(layer), sizes.in[first], layer.threads, x, nullptr, nullptr, {}, {}};
  for (int i = 0; i < kCount[group]; ++i) {
    const DecoderProjection& own = layer.projections[first + i];
    const int64_t cols = sizes.out[first + i];
    call.layers.push_back(
        {ys[i], cols, cols, own.weight, own.bias, nullptr, nullptr, nullptr, nullptr});
    call.adapters.push_back({i, own.r, kept.s[first + i], own.a, own.b, own.da, own.db, layer.wide,
                             own.mask, own.kept, own.scaling});
  }
  return call;
}

NormRows norm_rows(const DecoderLayer& layer, const DecoderNorm& norm) {
  return {rows_of(layer), layer.features, norm.eps, norm.offset, norm.round_first};
}

// The norm of each head of q or k, or in the backward its gradient, in place.
void norm_heads(const DecoderLayer& layer, const Kept& kept, int index, void* gradient,
                const Kernels& kernels) {
  if (!layer.head_norms) return;
  const DecoderNorm& norm = layer.of_heads[index];
  const int64_t count = index == 0 ? layer.heads : layer.kv_heads;
  const NormRows rows = {rows_of(layer) * count, layer.width, norm.eps, norm.offset,
                         norm.round_first};
  const void* own = index == 0 ? kept.q : kept.k;
  if (gradient == nullptr)
    kernels.rms_norm_forward(rows, kept.heads[index], kept.of_heads[index], own, norm.weight,
                             nullptr, nullptr, kBFloat16);
  else
    kernels.rms_norm_backward(rows, gradient, nullptr, gradient, own, norm.weight,
                              kept.of_heads[index], nullptr, kBFloat16);
}

// Heads of q or k, or of their gradients, turned in place.
void turn(const DecoderLayer& layer, void* heads, int64_t count, bool backward,
          const Kernels& kernels) {
  const DecoderTables& tables = layer.tables;
  const int64_t pitch = count * layer.width;
  const RopeTensor tensor = {layer.batch,
                             count,
                             layer.tokens,
                             layer.width,
                             tables.rotary,
                             {layer.tokens * pitch, layer.width, pitch},
                             {layer.tokens * pitch, layer.width, pitch},
                             tables.batch_stride,
                             tables.token_stride,
                             tables.interleaved,
                             tables.half,
                             backward};
  kernels.rope(tensor, heads, heads, tables.cos, tables.sin, kBFloat16, tables.dtype, kBFloat16);
}

AttentionCall attention_of(const DecoderLayer& layer, const Kept& kept) {
  const auto heads = [&](void* data, int64_t count) {
    const int64_t pitch = count * layer.width;
    return AttentionTensor{data, layer.tokens * pitch, layer.width, pitch};
  };
  AttentionCall call = {};
  call.q = heads(kept.heads[0], layer.heads);
  call.k = heads(kept.heads[1], layer.kv_heads);
  call.v = heads(kept.v, layer.kv_heads);
  call.out = heads(kept.attended, layer.heads);
  call.lse = kept.lse;
  call.batch = layer.batch;
  call.heads = layer.heads;
  call.kv_heads = layer.kv_heads;
  call.queries = call.keys = layer.tokens;
  call.width = call.value_width = layer.width;
  call.threads = layer.threads;
  call.causal = layer.causal;
  call.scale = layer.scale;
  call.mask = layer.mask;
  call.visible = layer.visible;
  call.mask_batch = layer.mask_batch;
  call.mask_head = layer.mask_head;
  call.mask_query = layer.mask_query;
  return call;
}

void attend(const AttentionCall& call, const Kernels& kernels) {
  thread_local Room room;
  uint32_t* words = room.words(kernels.attention_scratch(call));
  kernels.attention_fused(call, reinterpret_cast<float*>(words));
}

}  // namespace

DecoderRoom decoder_room(const DecoderLayer& layer) {
  return {Kept(layer, nullptr).bytes, rows_of(layer) * layer.inner * 2,
          Between(layer, nullptr).bytes};
}

void decoder_layer_forward(const DecoderLayer& layer, void* y, void* product,
                           const Kernels& kernels) {
  const Kept kept(layer, layer.kept);
  const auto project = [&](Group group, void* x, std::vector<void*> ys, const void* residual) {
    LoraLayers call = products(layer, kept, group, x, ys.data());
    call.layers.front().residual = residual;
    lora_layers_forward(call, kernels);
  };
  const DecoderNorm &norm = layer.norms[0], &norm_2 = layer.norms[1];
  kernels.rms_norm_forward(norm_rows(layer, norm), kept.n, kept.rstd, layer.x, norm.weight, nullptr,
                           nullptr, kBFloat16);
  project(kQkv, kept.n, {kept.q, kept.k, kept.v}, nullptr);
  for (int i = 0; i < 2; ++i) {
    norm_heads(layer, kept, i, nullptr, kernels);
    turn(layer, kept.heads[i], i == 0 ? layer.heads : layer.kv_heads, false, kernels);
  }
  attend(attention_of(layer, kept), kernels);
  project(kO, kept.attended, {kept.h}, layer.x);
  kernels.rms_norm_forward(norm_rows(layer, norm_2), kept.m, kept.rstd_2, kept.h, norm_2.weight,
                           nullptr, nullptr, kBFloat16);
  project(kGateUp, kept.m, {kept.gate, kept.up}, nullptr);
  kernels.glu_forward({rows_of(layer), layer.inner, layer.inner, layer.inner}, product, kept.gate,
                      kept.up, layer.act, kBFloat16);
  project(kDown, product, {y}, kept.h);
}

void decoder_layer_backward(const DecoderLayer& layer, const void* dy, void* dx, void* scratch,
                            const Kernels& kernels) {
  const Kept kept(layer, layer.kept);
  const Between made(layer, scratch);
  const auto back = [&](Group group, void* x, void* to, std::vector<void*> dys,
                        const LoraUnit* unit) {
    LoraLayers call = products(layer, kept, group, x, dys.data());
    call.dx = to;
    call.unit = unit;
    lora_layers_backward(call, kernels);
  };
  // dx of a norm, and what reaches its input beside it.
  const auto norm_back = [&](int index, void* to, const void* from, const void* x,
                             const float* rstd, const void* beside) {
    NormRows rows = norm_rows(layer, layer.norms[index]);
    rows.round_first = true;
    kernels.rms_norm_backward(rows, to, nullptr, from, x, layer.norms[index].weight, rstd, beside,
                              kBFloat16);
  };
  const LoraUnit unit = {kept.gate, kept.up, made.d_gate, made.d_up, layer.act};
  back(kDown, made.product, made.d_up, {const_cast<void*>(dy)}, &unit);
  back(kGateUp, kept.m, made.dm, {made.d_gate, made.d_up}, nullptr);
  norm_back(1, made.dh, made.dm, kept.h, kept.rstd_2, dy);
  back(kO, kept.attended, made.d_attended, {made.dh}, nullptr);
  AttentionCall attention = attention_of(layer, kept);
  const auto like = [](AttentionTensor tensor, void* data) {
    tensor.data = data;
    return tensor;
  };
  attention.backward = true;
  attention.d_out = like(attention.out, made.d_attended);
  attention.dq = like(attention.q, made.dq);
  attention.dk = like(attention.k, made.dk);
  attention.dv = like(attention.v, made.dv);
  attend(attention, kernels);
  for (int i = 0; i < 2; ++i) {
    void* gradient = i == 0 ? made.dq : made.dk;
    turn(layer, gradient, i == 0 ? layer.heads : layer.kv_heads, true, kernels);
    norm_heads(layer, kept, i, gradient, kernels);
  }
  back(kQkv, kept.n, dx == nullptr ? nullptr : made.dn, {made.dq, made.dk, made.dv}, nullptr);
  if (dx != nullptr) norm_back(0, dx, made.dn, layer.x, kept.rstd, made.dh);
}

}  // namespace fastft
