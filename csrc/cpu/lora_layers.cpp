#include "lora_layers.h"

#include <cstring>

#include "fastft/numeric.h"
#include "room.h"

namespace fastft {
namespace {

struct Rooms {
  Room packed, thin, s, a, b, da, partial;
};

Rooms& rooms() {
  thread_local Rooms own;
  return own;
}

// Adapters that read x alike, side by side: those without dropout together, each other one alone.
struct Group {
  std::vector<const LoraAdapter*> adapters;
  int64_t r = 0;  // of all
  bool one() const { return adapters.size() == 1; }
  const LoraAdapter& first() const { return *adapters.front(); }
};

std::vector<Group> groups_of(const LoraLayers& call) {
  std::vector<Group> groups;
  int64_t plain = -1;
  for (const LoraAdapter& adapter : call.adapters) {
    if (adapter.mask != nullptr || plain < 0) {
      groups.emplace_back();
      if (adapter.mask == nullptr) plain = static_cast<int64_t>(groups.size()) - 1;
    }
    Group& own = adapter.mask != nullptr ? groups.back() : groups[static_cast<size_t>(plain)];
    own.adapters.push_back(&adapter);
    own.r += adapter.r;
  }
  return groups;
}

size_t adapter_bytes(bool wide) { return wide ? sizeof(float) : sizeof(uint16_t); }

// The group's a one above the other (r, depth): the one there is, or made in `to`.
const void* stacked(const Group& group, int64_t depth, uint32_t* to) {
  if (group.one()) return group.first().a;
  auto* at = reinterpret_cast<char*>(to);
  for (const LoraAdapter* adapter : group.adapters) {
    const size_t bytes = adapter_bytes(adapter->wide) * static_cast<size_t>(adapter->r * depth);
    std::memcpy(at, adapter->a, bytes);
    at += bytes;
  }
  return to;
}

int64_t stacked_words(const Group& group, int64_t depth) {
  return group.one() ? 0 : group.r * depth;
}

// Words of rows of r bfloat16, a whole number of cache lines.
int64_t thin_words(int64_t rows, int64_t r) { return (rows * r / 2 + 16) / 16 * 16; }

void d_scales(const Kernels& kernels, const LoraLayers& call) {
  for (const LoraLayer& layer : call.layers) {
    if (layer.d_scale == nullptr) continue;
    const int64_t words = (call.rows + kSumRows - 1) / kSumRows * layer.cols;
    auto* partial = reinterpret_cast<float*>(rooms().partial.words(words));
    kernels.dora_d_scale(layer.d_scale, layer.y, layer.out, layer.scale, call.rows, layer.cols,
                         partial);
  }
}

void run(const Kernels& kernels, const ProductCall& call) {
  kernels.product(call, rooms().packed.words(kernels.product_scratch(call)));
}

uint32_t* thin_room(const Kernels& kernels, int64_t rows, int64_t cols, int64_t r) {
  return rooms().thin.words(kernels.thin_scratch(rows, cols, r));
}

// rows (count, r) times a factor each, in bfloat16 or float32.
void scale_rows(void* to, const void* from, const float* scale, int64_t count, int64_t r,
                bool wide) {
  for (int64_t n = 0; n < count; ++n)
    for (int64_t j = n * r; j < (n + 1) * r; ++j)
      if (wide)
        static_cast<float*>(to)[j] = static_cast<const float*>(from)[j] * scale[n];
      else
        static_cast<bfloat16*>(to)[j] =
            from_float<bfloat16>(to_float(static_cast<const bfloat16*>(from)[j]) * scale[n]);
}

// dS and dB of one adapter: under DoRA dS comes of scaled rows of B, and rows of dB are scaled.
void pair(const Kernels& kernels, const LoraLayers& call, const LoraAdapter& adapter, void* ds,
          int64_t ds_pitch) {
  const LoraLayer& layer = call.layers[static_cast<size_t>(adapter.layer)];
  const void* b = adapter.b;
  if (layer.scale != nullptr) {
    uint32_t* room = rooms().b.words(layer.cols * adapter.r);
    scale_rows(room, b, layer.scale, layer.cols, adapter.r, adapter.wide);
    b = room;
  }
  kernels.thin_pair(ds, ds_pitch, adapter.db, layer.y, adapter.s, b, call.rows, layer.cols,
                    adapter.r, adapter.scaling, adapter.wide,
                    thin_room(kernels, call.rows, layer.cols, adapter.r));
  if (layer.scale != nullptr && adapter.db != nullptr)
    scale_rows(adapter.db, adapter.db, layer.scale, layer.cols, adapter.r, adapter.wide);
}

}  // namespace

void lora_layers_forward(const LoraLayers& call, const Kernels& kernels) {
  for (const Group& group : groups_of(call)) {
    const LoraAdapter& first = group.first();
    const void* a = stacked(group, call.depth, rooms().a.words(stacked_words(group, call.depth)));
    void* s = group.one() ? first.s : rooms().s.words(thin_words(call.rows, group.r));
    kernels.thin_shrink(s, call.x, a, first.mask, call.rows, call.depth, group.r, first.kept,
                        first.wide, thin_room(kernels, call.rows, call.depth, group.r));
    if (group.one()) continue;
    const auto* from = static_cast<const uint16_t*>(s);
    for (const LoraAdapter* adapter : group.adapters) {
      auto* to = static_cast<uint16_t*>(adapter->s);
      for (int64_t m = 0; m < call.rows; ++m)
        std::memcpy(to + m * adapter->r, from + m * group.r,
                    sizeof(uint16_t) * static_cast<size_t>(adapter->r));
      from += adapter->r;
    }
  }
  for (size_t i = 0; i < call.layers.size(); ++i) {
    const LoraLayer& layer = call.layers[i];
    ProductCall product = {};
    product.out = layer.y;
    product.out_pitch = layer.pitch;
    product.rows = call.rows;
    product.cols = layer.cols;
    product.threads = call.threads;
    product.bias = layer.bias;
    product.scale = layer.scale;
    product.residual = layer.residual;
    product.parts[product.part_count++] = {call.x,       call.depth, call.depth,
                                           layer.weight, true,       nullptr};
    for (const LoraAdapter& adapter : call.adapters)
      if (adapter.layer == static_cast<int64_t>(i))
        product.terms[product.term_count++] = {adapter.s, adapter.r, adapter.b,      adapter.wide,
                                               true,      nullptr,   adapter.scaling};
    run(kernels, product);
  }
}

void lora_layers_backward(const LoraLayers& call, const Kernels& kernels) {
  const std::vector<Group> groups = groups_of(call);
  int64_t s_words = 0, a_words = 0, da_words = 0;
  for (const Group& group : groups) {
    s_words += thin_words(call.rows, group.r);
    a_words += stacked_words(group, call.depth);
    da_words = da_words < group.r * call.depth ? group.r * call.depth : da_words;
  }
  uint32_t* s_room = rooms().s.words(s_words);
  uint32_t* a_room = rooms().a.words(a_words);
  ProductCall product = {};
  std::vector<const void*> d_ss, all_as;
  d_scales(kernels, call);
  // dY is read twice in a row: for dS and dB, then for dx.
  for (const Group& group : groups) {
    auto* ds = reinterpret_cast<uint16_t*>(s_room);
    for (const LoraAdapter* adapter : group.adapters) {
      pair(kernels, call, *adapter, ds, group.r);
      ds += adapter->r;
    }
    const LoraAdapter& first = group.first();
    d_ss.push_back(s_room);
    all_as.push_back(stacked(group, call.depth, a_room));
    product.terms[product.term_count++] = {d_ss.back(), group.r,    all_as.back(), first.wide,
                                           false,       first.mask, first.kept};
    s_room += thin_words(call.rows, group.r);
    a_room += stacked_words(group, call.depth);
  }
  if (call.dx != nullptr) {
    product.out = call.dx;
    product.out_pitch = product.cols = call.depth;
    product.rows = call.rows;
    product.threads = call.threads;
    for (const LoraLayer& layer : call.layers)
      product.parts[product.part_count++] = {layer.y,      layer.pitch, layer.cols,
                                             layer.weight, false,       layer.scale};
    run(kernels, product);
  }
  if (const LoraUnit* unit = call.unit; unit != nullptr)
    kernels.glu_backward({call.rows, call.depth, call.depth, call.depth}, unit->d_gate, unit->d_up,
                         call.dx, unit->gate, unit->up, call.x, unit->act,
                         static_cast<int>(DType::kBFloat16));
  for (size_t i = 0; i < groups.size(); ++i) {
    const Group& group = groups[i];
    const LoraAdapter& first = group.first();
    bool wanted = false;
    for (const LoraAdapter* adapter : group.adapters) wanted = wanted || adapter->da != nullptr;
    if (!wanted) continue;
    void* da = group.one() ? first.da : rooms().da.words(da_words);
    kernels.thin_back(nullptr, da, d_ss[i], call.x, all_as[i], first.mask, call.rows, call.depth,
                      group.r, first.kept, first.wide,
                      thin_room(kernels, call.rows, call.depth, group.r));
    if (group.one()) continue;
    const auto* from = static_cast<const char*>(da);
    for (const LoraAdapter* adapter : group.adapters) {
      const size_t bytes =
          adapter_bytes(adapter->wide) * static_cast<size_t>(adapter->r * call.depth);
      if (adapter->da != nullptr) std::memcpy(adapter->da, from, bytes);
      from += bytes;
    }
  }
}

}  // namespace fastft
