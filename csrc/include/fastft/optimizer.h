// One element of an optimizer's step, for each rule: AdamW, Lion, SGD with momentum, schedule-free
// AdamW and Muon's momentum. The same functors run in csrc/cpu and csrc/cuda.
#pragma once

#include "fastft/numeric.h"
#include "fastft/philox.h"

namespace fastft {

// The codes of fastft/ops/optimizer_step.py.
enum class OptimizerRule : int { kAdamW = 0, kLion = 1, kSgd = 2, kScheduleFree = 3, kMuon = 4 };
enum class Rounding : int { kNearest = 0, kStochastic = 1, kCompensated = 2 };
enum class StateKind : int { kFloat32 = 0, kEightBit = 1, kBFloat16 = 2 };

// A row of the table of a step: int64, in this order. Addresses are 0 where there is no such thing.
struct StepTensor {
  int64_t param, grad;
  int64_t state1, state2;    // float32, bfloat16, or codes of dynamic8.h
  int64_t absmax1, absmax2;  // float32, one for each kStateBlock elements of an 8-bit state
  int64_t compensation;      // bfloat16: what rounding took from the parameter
  int64_t step;              // float32: steps taken, incremented
  int64_t numel;
  int64_t key, offset;  // of stochastic rounding: element i draws (key, offset + i)
  int64_t codes;        // param DType + 4 grad DType + 16 StateKind + 64 Rounding
};
constexpr int64_t kStepColumns = 12;
constexpr int64_t kStateBlock = 256;

FASTFT_HD DType param_dtype(const StepTensor& t) { return static_cast<DType>(t.codes & 3); }
FASTFT_HD DType grad_dtype(const StepTensor& t) { return static_cast<DType>((t.codes >> 2) & 3); }
FASTFT_HD StateKind state_kind(const StepTensor& t) {
  return static_cast<StateKind>((t.codes >> 4) & 3);
}
FASTFT_HD Rounding rounding(const StepTensor& t) { return static_cast<Rounding>(t.codes >> 6); }

inline namespace FASTFT_ISA {

// Row of the hyper-parameter table, float32, one for each tensor. SGD: beta1 is the momentum, beta2
// the dampening, extra 1 for Nesterov's. Schedule-free: extra is the weight of z in y. Muon: beta1
// is the momentum, extra 1 for Nesterov's.
struct StepHyper {
  float lr, beta1, beta2, eps, weight_decay, extra, sign;
};
constexpr int64_t kHyperColumns = 7;

// What is constant over the elements of a tensor in one step; a rule sets those that it reads.
struct StepScalars {
  float beta1, beta2, one_minus_beta1, one_minus_beta2;
  float decay, step_size, inv_sqrt_bias2, eps, extra;
  float gradient_scale;  // clip coefficient over the loss scale, negative where maximised
};

// On a GPU to 2^-23 and, the quotient, to two units in the last place, what is no normal number
// being zero: correctly rounded ones are dozens of instructions.
FASTFT_HD float step_sqrt(float value) {
#if defined(__CUDA_ARCH__)
  float root;
  asm("sqrt.approx.ftz.f32 %0, %1;" : "=f"(root) : "f"(value));
  return root;
#else
  return __builtin_sqrtf(value);
#endif
}

template <typename T>
FASTFT_HD T step_quotient(T a, T b) {
#if defined(__CUDA_ARCH__)
  T quotient;
  asm("div.approx.ftz.f32 %0, %1, %2;" : "=f"(quotient) : "f"(a), "f"(b));
  return quotient;
#else
  return a / b;
#endif
}

FASTFT_HD float step_sign(float value) {
  return value > 0.0f ? 1.0f : (value < 0.0f ? -1.0f : 0.0f);
}

FASTFT_HD double step_pow(double base, double exponent) {
#if defined(__CUDA_ARCH__)
  return pow(base, exponent);
#else
  return __builtin_pow(base, exponent);
#endif
}

// 1 - beta in double: float32 holds 1 - 0.999f to three digits only.
FASTFT_HD float rest_of(float beta) { return static_cast<float>(1.0 - static_cast<double>(beta)); }

FASTFT_HD float inv_sqrt_bias(float beta, double step) {
  const double bias = 1.0 - step_pow(static_cast<double>(beta), step);
#if defined(__CUDA_ARCH__)
  return static_cast<float>(rsqrt(bias));
#else
  return static_cast<float>(1.0 / __builtin_sqrt(bias));
#endif
}

// Decoupled weight decay: Loshchilov & Hutter 2019, algorithm 2. States m, v.
struct AdamWRule {
  static constexpr int kStates = 2;
  FASTFT_HD static StepScalars prepare(const StepHyper& h, double step) {
    const double bias1 = 1.0 - step_pow(static_cast<double>(h.beta1), step);
    StepScalars s{};
    s.beta1 = h.beta1, s.one_minus_beta1 = rest_of(h.beta1);
    s.beta2 = h.beta2, s.one_minus_beta2 = rest_of(h.beta2);
    s.decay = 1.0f - h.lr * h.weight_decay;
    s.step_size = static_cast<float>(h.lr / bias1);
    s.inv_sqrt_bias2 = inv_sqrt_bias(h.beta2, step);
    s.eps = h.eps;
    return s;
  }
  template <typename T>
  FASTFT_HD static void update(T& p, T g, T& m, T& v, const StepScalars& s) {
    const T gradient = g * s.gradient_scale;
    m = s.beta1 * m + s.one_minus_beta1 * gradient;
    v = s.beta2 * v + s.one_minus_beta2 * gradient * gradient;
    p = p * s.decay - s.step_size * step_quotient(m, step_sqrt(v) * s.inv_sqrt_bias2 + s.eps);
  }
};

// Chen et al. 2023, algorithm 2. State m.
struct LionRule {
  static constexpr int kStates = 1;
  FASTFT_HD static StepScalars prepare(const StepHyper& h, double) {
    StepScalars s{};
    s.beta1 = h.beta1, s.one_minus_beta1 = rest_of(h.beta1);
    s.beta2 = h.beta2, s.one_minus_beta2 = rest_of(h.beta2);
    s.decay = 1.0f - h.lr * h.weight_decay;
    s.step_size = h.lr;
    return s;
  }
  template <typename T>
  FASTFT_HD static void update(T& p, T g, T& m, T&, const StepScalars& s) {
    const T gradient = g * s.gradient_scale;
    const T sign = step_sign(s.beta1 * m + s.one_minus_beta1 * gradient);
    m = s.beta2 * m + s.one_minus_beta2 * gradient;
    p = p * s.decay - s.step_size * sign;
  }
};

// torch.optim.SGD with momentum: decay joins the gradient, and the first gradient is the buffer.
struct SgdRule {
  static constexpr int kStates = 1;
  FASTFT_HD static StepScalars prepare(const StepHyper& h, double step) {
    StepScalars s{};
    s.beta1 = step > 1.0 ? h.beta1 : 0.0f;
    s.one_minus_beta1 = step > 1.0 ? rest_of(h.beta2) : 1.0f;
    s.beta2 = h.extra != 0.0f ? h.beta1 : 1.0f;
    s.decay = h.weight_decay;
    s.step_size = h.lr;
    s.extra = h.extra != 0.0f ? 1.0f : 0.0f;
    return s;
  }
  template <typename T>
  FASTFT_HD static void update(T& p, T g, T& m, T&, const StepScalars& s) {
    const T gradient = g * s.gradient_scale + s.decay * p;
    m = s.beta1 * m + s.one_minus_beta1 * gradient;
    p = p - s.step_size * (s.extra * gradient + s.beta2 * m);
  }
};

// Defazio et al. 2024, algorithm 1 as its authors implement it: p is y, the states are z and v.
struct ScheduleFreeRule {
  static constexpr int kStates = 2;
  FASTFT_HD static StepScalars prepare(const StepHyper& h, double step) {
    StepScalars s{};
    s.beta2 = h.beta2, s.one_minus_beta2 = rest_of(h.beta2);
    s.one_minus_beta1 = h.lr * (h.beta1 * (1.0f - h.extra) - 1.0f);
    s.decay = h.weight_decay;
    s.step_size = h.lr;
    s.inv_sqrt_bias2 = inv_sqrt_bias(h.beta2, step);
    s.eps = h.eps;
    s.extra = h.extra;
    return s;
  }
  template <typename T>
  FASTFT_HD static void update(T& p, T g, T& z, T& v, const StepScalars& s) {
    const T gradient = g * s.gradient_scale;
    v = s.beta2 * v + s.one_minus_beta2 * gradient * gradient;
    const T move = step_quotient(gradient, step_sqrt(v) * s.inv_sqrt_bias2 + s.eps) + s.decay * p;
    p = p + s.extra * (z - p) + s.one_minus_beta1 * move;
    z = z - s.step_size * move;
  }
};

// Jordan et al. 2024, what is orthogonalized: p is where it goes, and is not read. State m.
struct MuonRule {
  static constexpr int kStates = 1;
  FASTFT_HD static StepScalars prepare(const StepHyper& h, double) {
    StepScalars s{};
    s.beta1 = h.beta1, s.one_minus_beta1 = rest_of(h.beta1);
    s.beta2 = h.extra != 0.0f ? h.beta1 : 1.0f;
    s.extra = h.extra != 0.0f ? s.one_minus_beta1 : 0.0f;
    return s;
  }
  template <typename T>
  FASTFT_HD static void update(T& p, T g, T& m, T&, const StepScalars& s) {
    const T gradient = g * s.gradient_scale;
    m = s.beta1 * m + s.one_minus_beta1 * gradient;
    p = s.extra * gradient + s.beta2 * m;
  }
};

// The random words of stochastic rounding. A block of 256 elements has a key, Philox of its place,
// the tensor and the step under the seed; word w of the block, which serves elements 2 w and
// 2 w + 1 with 16 bits each, is a keyed two-round hash of w. States in bfloat16, always rounded so,
// draw from the words behind: kRoundingWords (and twice as many) on.
constexpr uint32_t kRoundingWords = kStateBlock / 2;
struct RoundingKey {
  uint32_t first, second;
};

FASTFT_HD RoundingKey rounding_key(uint64_t block, uint32_t step, uint32_t tensor, uint64_t seed) {
  uint32_t c0 = static_cast<uint32_t>(block), c1 = static_cast<uint32_t>(block >> 32);
  uint32_t c2 = step, c3 = tensor;
  uint32_t k0 = static_cast<uint32_t>(seed), k1 = static_cast<uint32_t>(seed >> 32);
  for (int round = 0; round < kPhiloxRounds; ++round) {
    philox_round(c0, c1, c2, c3, k0, k1);
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  return {c0 ^ c2, c1 ^ c3};
}

FASTFT_HD uint32_t rounding_word(RoundingKey key, uint32_t word) {
  uint32_t x = (word * 0x9E3779B9u) ^ key.first;
  x = (x ^ (x >> 16)) * 0x7FEB352Du;
  x = ((x ^ (x >> 15)) + key.second) * 0x846CA68Bu;
  return x ^ (x >> 16);
}

// Rounds up with the probability of what is cut off; `bits` is uniform over 16 bits.
FASTFT_HD bfloat16 round_stochastic(float value, uint32_t bits) {
  // Nothing is cut off of an infinity: it stays one.
  const uint32_t rounded = (float_bits(value) + bits) >> 16;
  return bfloat16{static_cast<uint16_t>(value != value ? 0x7fc0u : rounded)};
}

// The clip coefficient and whether the step runs; written to stats, see optimizer_step.py.
struct StepDecision {
  float norm, coefficient;
  bool run;
};

FASTFT_HD StepDecision decide_step(double sum_of_squares, bool has_norm, float max_norm,
                                   float inv_scale, float found_inf) {
  StepDecision d{};
  const double norm = has_norm ? static_cast<double>(inv_scale) *
#if defined(__CUDA_ARCH__)
                                     sqrt(sum_of_squares)
#else
                                     __builtin_sqrt(sum_of_squares)
#endif
                               : 0.0;
  d.norm = static_cast<float>(norm);
  d.run = norm <= 3.4028234663852886e38 && !(found_inf > 0.0f);  // false for NaN as well
  const double clip = max_norm > 0.0f ? max_norm / (norm + 1e-6) : 1.0;
  d.coefficient = d.run ? static_cast<float>(clip < 1.0 ? clip : 1.0) : 0.0f;
  return d;
}

}  // namespace FASTFT_ISA
}  // namespace fastft
