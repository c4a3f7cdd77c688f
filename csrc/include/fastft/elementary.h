// Elementary functions that vectorise: polynomials and bit arithmetic, no library call.
#pragma once

#include "numeric.h"

namespace fastft {
inline namespace FASTFT_ISA {

// exp(x) for x <= 0: 2^n * p(r), |r| <= ln(2)/2, p the degree-6 Taylor polynomial; relative error
// below 2^-22. Below -87.33 the result is 0, as float32 has no normal number there. NaN stays NaN.
FASTFT_HD float exp_nonpositive(float x) {
  const float clamped = x < -87.33f ? -87.33f : x;
  const float n = __builtin_rintf(clamped * 1.44269504088896341f);
  const float r = (clamped - n * 0.693359375f) - n * -2.12194440e-4f;
  float p = 1.3888889e-3f;
  p = p * r + 8.3333333e-3f;
  p = p * r + 4.1666668e-2f;
  p = p * r + 1.6666667e-1f;
  p = p * r + 0.5f;
  p = p * r + 1.0f;
  p = p * r + 1.0f;
  const int32_t exponent = static_cast<int32_t>(n);
  const float scale = float_from_bits(static_cast<uint32_t>(exponent + 127) << 23);
  const float value = p * scale;
  return x < -87.33f ? 0.0f : value;
}

// log(x) for normal x > 0: x = m 2^n, m in [sqrt(1/2), sqrt 2), log m = 2 atanh((m - 1) / (m + 1))
// by its series to the ninth power; relative error below 2^-22 away from 1, absolute there.
FASTFT_HD float log_positive(float x) {
  const uint32_t bits = float_bits(x) - 0x3f3504f3u;  // of sqrt(1/2)
  const float n = static_cast<float>(static_cast<int32_t>(bits) >> 23);
  const float m = float_from_bits((bits & 0x7fffffu) + 0x3f3504f3u);
  const float s = (m - 1.0f) / (m + 1.0f), square = s * s;
  float p = 0.22222222f;
  p = p * square + 0.28571429f;
  p = p * square + 0.4f;
  p = p * square + 0.66666667f;
  p = p * square + 2.0f;
  return n * 0.693359375f + (p * s + n * -2.12194440e-4f);
}

// tanh(x), absolute error below 2^-22.
FASTFT_HD float tanh_bounded(float x) {
  const float e = exp_nonpositive(x < 0.0f ? 2.0f * x : -2.0f * x);
  const float t = (1.0f - e) / (1.0f + e);
  return x < 0.0f ? -t : t;
}

struct Sigmoid {
  float value, rest;  // 1 / (1 + exp(-x)), and 1 less that
};

// Neither part cancels.
FASTFT_HD Sigmoid sigmoid(float x) {
  const float e = exp_nonpositive(x < 0.0f ? x : -x);
  const float large = 1.0f / (1.0f + e), small = e * large;
  return x < 0.0f ? Sigmoid{small, large} : Sigmoid{large, small};
}

// The normal distribution function, erfc(-x / sqrt 2) / 2, by the Chebyshev fit of Press et al.,
// Numerical Recipes, section 6.2: relative error below 1.2e-7 in exact arithmetic.
FASTFT_HD float normal_cdf(float x) {
  const float z = (x < 0.0f ? -x : x) * 0.70710678118654752f;
  const float t = 1.0f / (1.0f + 0.5f * z);
  float p = 0.17087277f;
  p = p * t - 0.82215223f;
  p = p * t + 1.48851587f;
  p = p * t - 1.13520398f;
  p = p * t + 0.27886807f;
  p = p * t - 0.18628806f;
  p = p * t + 0.09678418f;
  p = p * t + 0.37409196f;
  p = p * t + 1.00002368f;
  p = p * t - 1.26551223f;
  const float tail = 0.5f * t * exp_nonpositive(p - z * z);
  return x < 0.0f ? tail : 1.0f - tail;
}

}  // namespace FASTFT_ISA
}  // namespace fastft
