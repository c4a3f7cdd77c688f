// One element of AdamW with decoupled weight decay (Loshchilov & Hutter 2019, algorithm 2).
// The same functor runs in csrc/cpu/adamw.cpp and csrc/cuda/adamw.cu.
#pragma once

#include "fastft/numeric.h"

namespace fastft {
inline namespace FASTFT_ISA {

// Row of the hyper-parameter table: one per tensor, float32, in this order.
struct AdamWHyper {
  float lr;
  float beta1;
  float beta2;
  float eps;
  float weight_decay;
};

// Everything that is constant over the elements of one tensor in one step.
struct AdamWScalars {
  float beta1;
  float beta2;
  float one_minus_beta1;
  float one_minus_beta2;
  float decay;           // 1 - lr * weight_decay
  float step_size;       // lr / (1 - beta1^t)
  float inv_sqrt_bias2;  // 1 / sqrt(1 - beta2^t)
  float eps;
  float gradient_scale;  // clip coefficient, negative when maximising
};

FASTFT_HD AdamWScalars adamw_scalars(AdamWHyper hyper, double beta1_power, double beta2_power,
                                     float gradient_scale) {
  AdamWScalars s;
  s.beta1 = hyper.beta1;
  s.beta2 = hyper.beta2;
  s.one_minus_beta1 = static_cast<float>(1.0 - static_cast<double>(hyper.beta1));
  s.one_minus_beta2 = static_cast<float>(1.0 - static_cast<double>(hyper.beta2));
  s.decay = 1.0f - hyper.lr * hyper.weight_decay;
  s.step_size = static_cast<float>(hyper.lr / (1.0 - beta1_power));
#if defined(__CUDA_ARCH__)
  s.inv_sqrt_bias2 = static_cast<float>(rsqrt(1.0 - beta2_power));
#else
  s.inv_sqrt_bias2 = static_cast<float>(1.0 / __builtin_sqrt(1.0 - beta2_power));
#endif
  s.eps = hyper.eps;
  s.gradient_scale = gradient_scale;
  return s;
}

FASTFT_HD float adamw_sqrt(float value) {
#if defined(__CUDA_ARCH__)
  return sqrtf(value);
#else
  return __builtin_sqrtf(value);
#endif
}

// p, m and v are updated in place; g is the raw gradient.
FASTFT_HD void adamw_update(float& p, float g, float& m, float& v, const AdamWScalars& s) {
  const float gradient = g * s.gradient_scale;
  m = s.beta1 * m + s.one_minus_beta1 * gradient;
  v = s.beta2 * v + s.one_minus_beta2 * gradient * gradient;
  const float denominator = adamw_sqrt(v) * s.inv_sqrt_bias2 + s.eps;
  p = p * s.decay - s.step_size * (m / denominator);
}

}  // namespace FASTFT_ISA
}  // namespace fastft
