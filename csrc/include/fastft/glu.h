// Activations of gated linear units: value and derivative, shared by CPU and GPU.
#pragma once

#include "elementary.h"

namespace fastft {

// The codes of fastft/ops/glu.py.
enum class Activation : int { kSilu = 0, kGelu = 1, kGeluTanh = 2 };

inline namespace FASTFT_ISA {

struct Activated {
  float value, slope;
};

template <Activation A>
FASTFT_HD Activated activate(float x);

template <>
FASTFT_HD Activated activate<Activation::kSilu>(float x) {
  const Sigmoid s = sigmoid(x);
  return {x * s.value, s.value * (1.0f + x * s.rest)};
}

template <>
FASTFT_HD Activated activate<Activation::kGelu>(float x) {
  const float cdf = normal_cdf(x);
  const float density = 0.39894228040143268f * exp_nonpositive(-0.5f * x * x);
  return {x * cdf, cdf + x * density};
}

// 0.5 x (1 + tanh z) = x sigmoid(2 z), z = sqrt(2 / pi) (x + 0.044715 x^3).
template <>
FASTFT_HD Activated activate<Activation::kGeluTanh>(float x) {
  const float square = x * x;
  const Sigmoid s = sigmoid(1.5957691216057308f * x * (1.0f + 0.044715f * square));
  const float slope = 1.5957691216057308f * (1.0f + 0.134145f * square);
  return {x * s.value, s.value + x * s.value * s.rest * slope};
}

}  // namespace FASTFT_ISA
}  // namespace fastft
