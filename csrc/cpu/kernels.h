// The CPU kernels of one instruction set, as a table of functions. Each isa.cpp object fills one
// table; dispatch.cpp picks one at run time. Pointers are raw, sizes int64, dtypes DType codes.
#pragma once

#include <cstdint>

namespace fastft {

// Slabs of attention scores; see attention.inc. mask: null, or bytes addressed by strides, keys
// next to each other. lse: (count, group, queries). scratch: float32 (max_threads, cols).
struct AttentionSlab {
  int64_t count, kv_heads, group, rows, cols, first, queries;
  bool causal;
  float scale;
  const uint8_t* mask;
  int64_t mask_batch, mask_head, mask_query;
  float* lse;
  float* scratch;
};

// Rows of a gated linear unit; strides in elements, all other tensors are contiguous.
struct GluRows {
  int64_t count, cols, gate_stride, up_stride;
};

// Rows of logits (rows, vocab) and what is made of them; see cross_entropy.inc. Null where
// optional: bias, class_weight, label_weight (that of each row's label), row_scale, weighted_sum,
// and entropy with log_sum_sq and mean_logit. A label outside [0, vocab) is none of these columns.
struct CrossEntropyRows {
  const float *bias, *class_weight, *label_weight, *row_scale, *entropy_scale;
  const int64_t* labels;
  float *top, *log_sum, *z_label, *weighted_sum, *entropy, *log_sum_sq, *mean_logit;
  int64_t* argmax;
  int64_t rows, vocab;
  float scale, softcap, smoothing, z_loss, weight_sum, classes;
  bool statistics, gradient;  // without statistics top and log_sum are read
};

// The codes of fastft/ops/linear_divergence.py.
enum class Divergence : int { kForward = 0, kReverse = 1, kJensenShannon = 2 };

// Rows of two slabs of logits; see divergence.inc. Null where optional: the biases, row_scale.
struct DivergenceRows {
  const float *bias, *teacher_bias, *row_scale;
  float* losses;
  int64_t rows, vocab;
  int kind;
  float scale, softcap, teacher_scale, teacher_softcap, temperature, beta;
  bool gradient;
};

// Heads (batch, heads, tokens, width) of which the first `rotary` features turn; strides in
// elements, features next to each other. half_tables: cos and sin hold one entry a pair.
struct RopeTensor {
  int64_t batch, heads, tokens, width, rotary;
  int64_t in[3], out[3];  // batch, head, token
  int64_t table_batch, table_token;
  bool interleaved, half_tables, backward;
};

// Rows of a layer norm, contiguous.
struct NormRows {
  int64_t rows, cols;
  float eps, offset;
  bool round_first;
};

// One step of an optimizer over all tensors; see fastft/optimizer.h. stats: float32 (5), norm and
// clip coefficient written, skipped steps counted; 1 over the loss scale and found_inf read.
struct StepTensor;
struct FactoredCall;
struct StepCall {
  const StepTensor* tensors;
  int64_t count;
  float* stats;
  const float* hyper;
  uint64_t seed;
  float max_norm;
  int rule;
  bool needs_norm;
};

// left (rows, depth), rows `pitch` elements apart, times right (depth, cols), or (cols, depth)
// where transposed; bfloat16, depth even. scale: null, or float32 (depth,) that the lines of a
// right that is not transposed are multiplied by.
struct ProductPart {
  const void* left;
  int64_t pitch, depth;
  const void* right;
  bool transposed;
  const float* scale;
};

// scale * kept * left (rows, r) right, of which right is (r, cols), or (cols, r) where transposed,
// in float32 where wide. mask: null, or bits as dropout_mask's.
struct ProductTerm {
  const void* left;
  int64_t r;
  const void* right;
  bool wide, transposed;
  const uint8_t* mask;
  float scale;
};

constexpr int64_t kProductParts = 8, kProductTerms = 16;

// out (rows, cols) = scale (parts and terms) + bias, bfloat16; see product.inc. scale: null, or
// float32 (cols,), and then there is no bias; bias: null, or bfloat16 (cols,). residual: null, or
// (rows, cols), contiguous, added to the rounded result.
struct ProductCall {
  void* out;
  int64_t out_pitch, rows, cols;
  const void* bias;
  const float* scale;
  const void* residual;
  ProductPart parts[kProductParts];
  int64_t part_count;
  ProductTerm terms[kProductTerms];
  int64_t term_count, threads;  // threads: at most so many, for which the scratch is
};

// out (rows, cols) = left (rows, depth) right (depth, cols), bfloat16; see deep_product.inc. Rows
// of out and left are a pitch apart, those of right next to each other.
struct DeepProduct {
  void* out;
  int64_t out_pitch, rows, cols;
  const void* left;
  int64_t left_pitch, depth;
  const void* right;
  int64_t threads;  // at most so many, for which the scratch is
};

// Heads of bfloat16; strides in elements, features next to each other.
struct AttentionTensor {
  void* data;
  int64_t batch, head, token;
};

// Attention with its products inside; see attention_fused.inc. out: written, or with `backward`
// read, as its gradient d_out is, and dq, dk, dv written. lse: float32 (batch, heads, queries).
// mask: null, or bytes as an AttentionSlab's. visible: null, or instead of a mask how many of the
// first keys a query sees, addressed by the same strides. width and value_width are even.
struct AttentionCall {
  AttentionTensor q, k, v, out, d_out, dq, dk, dv;
  float* lse;
  int64_t batch, heads, kv_heads, queries, keys, width, value_width, threads;
  bool causal, backward;
  float scale;
  const uint8_t* mask;
  const int32_t* visible;
  int64_t mask_batch, mask_head, mask_query;
};

// Rows of a mask, keys next to each other: their strides and numbers of batch, heads and queries.
struct MaskRows {
  const uint8_t* mask;
  int64_t strides[3], sizes[3], keys;
};

struct Kernels {
  // mask: (rows, ceil(cols / 8)) bytes; bit k % 8 of byte k / 8 is 1 where column k is kept.
  void (*dropout_mask)(uint8_t* mask, int64_t bytes, uint64_t seed, uint32_t threshold);
  // dst[i, k] = src[i, k] where kept, else 0; rows of dst and src are `cols` long.
  void (*dropout_apply)(void* dst, const void* src, const uint8_t* mask, int64_t rows, int64_t cols,
                        int dtype);
  // dst[i, k] += src[i, k] * kept(i, k) * scale.
  void (*dropout_add)(void* dst, const void* src, const uint8_t* mask, int64_t rows, int64_t cols,
                      float scale, int dst_dtype, int src_dtype);
  // dx[m, k] += scale * kept(m, k) * sum_j ds[m, j] a[j, k]; ds (rows, r), a (r, cols).
  void (*lora_dx)(void* dx, const float* ds, const float* a, const uint8_t* mask, int64_t rows,
                  int64_t cols, int64_t r, float scale, int dtype);
  // da[j, k] = scale * sum_m ds[m, j] * kept(m, k) * x[m, k]; da (r, cols).
  void (*lora_da)(float* da, const float* ds, const void* x, const uint8_t* mask, int64_t rows,
                  int64_t cols, int64_t r, float scale, int dtype);
  // With `gradient` the logits become that of the loss, else they stay. scratch: float32
  // (max_threads, vocab); the divergence's (max_threads, 2, vocab).
  void (*cross_entropy)(const CrossEntropyRows& rows, void* logits, int dtype, float* scratch);
  void (*divergence)(const DivergenceRows& rows, void* student, const void* teacher, int dtype,
                     int teacher_dtype, float* scratch);
  // Scores become probabilities, their logsumexp goes to lse.
  void (*attention_softmax)(const AttentionSlab& slab, void* scores, int dtype);
  // Scores become probabilities, dp (gradients of those) becomes gradients of q k^T.
  void (*attention_gradient)(const AttentionSlab& slab, void* scores, void* dp, int dtype);
  int64_t (*attention_extent)(const AttentionSlab& slab);
  // out = activation(gate) * up; act: an Activation code of glu.h.
  void (*glu_forward)(const GluRows& rows, void* out, const void* gate, const void* up, int act,
                      int dtype);
  // Strides are those of gate and up; all else is contiguous. product: null, or the forward's out,
  // written once more. d_gate or d_up may be dy.
  void (*glu_backward)(const GluRows& rows, void* d_gate, void* d_up, const void* dy,
                       const void* gate, const void* up, void* product, int act, int dtype);
  // y = x rstd (weight + offset); round_first: x rstd is rounded to the dtype before the weight.
  // residual: null, or added to x first, the sum going to `sum`.
  void (*rms_norm_forward)(const NormRows& rows, void* y, float* rstd, const void* x,
                           const void* weight, const void* residual, void* sum, int dtype);
  // more: null, or added to dx: the gradient of the sum from elsewhere. round_first: to the dx that
  // is rounded, as two gradients are added up.
  void (*rms_norm_backward)(const NormRows& rows, void* dx, float* dw, const void* dy,
                            const void* x, const void* weight, const float* rstd, const void* more,
                            int dtype);
  void (*rope)(const RopeTensor& tensor, void* out, const void* x, const void* cos, const void* sin,
               int x_dtype, int table_dtype, int out_dtype);
  // y = (x - mean) rstd (weight + offset) + bias; weight and bias may be null.
  void (*layer_norm_forward)(const NormRows& rows, void* y, float* mean, float* rstd, const void* x,
                             const void* weight, const void* bias, int dtype);
  void (*layer_norm_backward)(const NormRows& rows, void* dx, float* dw, float* db, const void* dy,
                              const void* x, const void* weight, const float* mean,
                              const float* rstd, int dtype);
  // y = z scale + bias (null: none), scale float32 (cols,).
  void (*dora_scale_forward)(void* y, const void* z, const float* scale, const void* bias,
                             int64_t rows, int64_t cols, int dtype);
  void (*dora_scale_backward)(void* dz, float* d_scale, const void* dy, const void* z,
                              const float* scale, int64_t rows, int64_t cols, int dtype);
  // d_scale[n] = sum_m dy[m, n] y[m, n] / scale[n]; bfloat16; partial: scratch, float32
  // (ceil(rows / kSumRows), cols).
  void (*dora_d_scale)(float* d_scale, const void* dy, const void* y, const float* scale,
                       int64_t rows, int64_t cols, float* partial);
  // a (r, depth), b (rows, r) float32; cross (rows, r) bfloat16; gram: scratch, r * r.
  void (*dora_norm)(float* norm, const double* squared, const void* cross, const float* a,
                    const float* b, int64_t rows, int64_t depth, int64_t r, float s, float* gram);
  // ids: sorted, order: where each was; d_weight: rows without a token are left alone.
  void (*embedding_backward)(void* d_weight, const void* dy, const int64_t* order,
                             const int64_t* ids, int64_t count, int64_t cols, int64_t padding,
                             int dtype);
  // partials: one for each kStepBlock elements of each tensor, where the norm is needed.
  void (*optimizer_step)(const StepCall& call, double* partials);
  void (*adafactor_step)(const FactoredCall& call);  // see fastft/adafactor.h
  // Thin products over bfloat16 activations; see thin.inc. r <= kThinMaxRank; adapters and their
  // gradients in float32 where `wide`, else bfloat16. scratch: thin_scratch words.
  int64_t (*thin_scratch)(int64_t rows, int64_t cols, int64_t r);
  void (*thin_shrink)(void* s, const void* x, const void* a, const uint8_t* mask, int64_t rows,
                      int64_t cols, int64_t r, float scale, bool wide, uint32_t* scratch);
  void (*thin_expand)(void* y, const void* s, const void* b, int64_t rows, int64_t cols, int64_t r,
                      float scale, bool wide, uint32_t* scratch);
  // db null: not wanted. ds_pitch: elements from one row of ds to the next.
  void (*thin_pair)(void* ds, int64_t ds_pitch, void* db, const void* dy, const void* s,
                    const void* b, int64_t rows, int64_t cols, int64_t r, float scale, bool wide,
                    uint32_t* scratch);
  // dx or da null: not wanted.
  void (*thin_back)(void* dx, void* da, const void* ds, const void* x, const void* a,
                    const uint8_t* mask, int64_t rows, int64_t cols, int64_t r, float scale,
                    bool wide, uint32_t* scratch);
  int64_t (*product_scratch)(const ProductCall& call);  // words
  void (*product)(const ProductCall& call, uint32_t* scratch);
  int64_t (*deep_product_scratch)(const DeepProduct& call);  // words
  void (*deep_product)(const DeepProduct& call, uint32_t* scratch);
  // How many keys each row sees, to visible (its sizes), if these are its first ones: 1, and 2
  // where no query sees a key behind it; else 0.
  int (*attention_prefixes)(const MaskRows& rows, int32_t* visible);
  int64_t (*attention_scratch)(const AttentionCall& call);  // words
  void (*attention_fused)(const AttentionCall& call, float* scratch);
};

constexpr int64_t kThinMaxRank = 64;

// Elements of one work item of a step; fixed, so that sums do not depend on the thread count.
constexpr int64_t kStepBlock = 16384;

// Rows of one partial sum over rows (norm weights, DoRA magnitudes); fixed for the same reason.
constexpr int64_t kSumRows = 32;

}  // namespace fastft
