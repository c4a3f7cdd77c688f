// LoRA over layers that share an input, each adapter over all of its rows: the products of
// kernels.h in order, as one call.
#pragma once

#include <vector>

#include "kernels.h"

namespace fastft {

// y (rows, cols) of the forward, or its gradient in the backward, rows `pitch` elements apart;
// weight (cols, depth); bias (cols) or null. scale: DoRA's, float32 (cols), or null, and then there
// is no bias; of the backward out, the forward's y, and d_scale (null: not wanted), contiguous.
// residual: of the forward, as a product's.
struct LoraLayer {
  void* y;
  int64_t pitch, cols;
  const void *weight, *bias;
  const float* scale;
  const void* out;
  float* d_scale;
  const void* residual;
};

// s (rows, r), a (r, depth), b (cols of its layer, r); a and b, and their gradients da and db, in
// float32 where wide. mask: null, or bits as dropout_mask's, of which what is kept is scaled by
// `kept`, 1 / (1 - p). da, db: null where not wanted.
struct LoraAdapter {
  int64_t layer, r;
  void* s;
  const void *a, *b;
  void *da, *db;
  bool wide;
  const uint8_t* mask;
  float kept, scaling;
};

// A gated unit whose product activation(gate) * up is a backward's x: all (rows, depth),
// contiguous; act: an Activation code of glu.h. d_up may be dx.
struct LoraUnit {
  const void *gate, *up;
  void *d_gate, *d_up;
  int act;
};

// x (rows, depth), dx the same or null; bfloat16, contiguous. unit: null, or in a backward what
// makes x on the way, and goes back through it with dx.
struct LoraLayers {
  int64_t rows, depth, threads;
  void* x;
  void* dx;
  const LoraUnit* unit;
  std::vector<LoraLayer> layers;
  std::vector<LoraAdapter> adapters;
};

void lora_layers_forward(const LoraLayers& call, const Kernels& kernels);
void lora_layers_backward(const LoraLayers& call, const Kernels& kernels);

}  // namespace fastft
