// A decoder layer with LoRA on its seven projections, forward and backward, as one call: the
// kernels of kernels.h in the order of the operations one by one, and with their bits.
//
//   h = x + o(attention(rope(q(n)), rope(k(n)), v(n))),   n = norm(x)
//
// or rope(norm(q(n))) and rope(norm(k(n))), head by head, and then
//
//   y = h + down(act(gate(m)) * up(m)),                   m = norm(h)
#pragma once

#include "kernels.h"

namespace fastft {

struct DecoderNorm {
  const void* weight;
  float eps, offset;
  bool round_first;
};

// weight (out, in), bias (out) or null, a (r, in), b (out, r), their gradients null where not
// wanted; mask, kept and scaling as a LoraAdapter's.
struct DecoderProjection {
  int64_t r;
  const void *weight, *bias, *a, *b;
  void *da, *db;
  const uint8_t* mask;
  float kept, scaling;
};

constexpr int kProjections = 7;  // q, k, v, o, gate, up, down

// cos and sin: (batch or 1, tokens, entries), strides in elements.
struct DecoderTables {
  const void *cos, *sin;
  int dtype;
  int64_t rotary, batch_stride, token_stride;
  bool interleaved, half;
};

struct DecoderLayer {
  int64_t batch, tokens, features, heads, kv_heads, width, inner, threads;
  DecoderNorm norms[2];
  bool head_norms;  // whether there are these, of q and k
  DecoderNorm of_heads[2];
  DecoderTables tables;
  DecoderProjection projections[kProjections];
  bool wide;  // a, b and their gradients in float32
  int act;    // an Activation code of glu.h
  // Attention's, as an AttentionCall's.
  float scale;
  bool causal;
  const uint8_t* mask;
  const int32_t* visible;
  int64_t mask_batch, mask_head, mask_query;
  const void* x;  // (batch, tokens, features), contiguous, bfloat16
  void* kept;     // what the forward leaves for the backward
};

// Bytes: of `kept`, and of the scratch of forward and backward.
struct DecoderRoom {
  int64_t kept, forward, backward;
};

DecoderRoom decoder_room(const DecoderLayer& layer);
void decoder_layer_forward(const DecoderLayer& layer, void* y, void* scratch, const Kernels&);
// dx: null, where x needs no gradient.
void decoder_layer_backward(const DecoderLayer& layer, const void* dy, void* dx, void* scratch,
                            const Kernels&);

}  // namespace fastft
