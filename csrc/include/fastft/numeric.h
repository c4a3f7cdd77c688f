// Scalar types of the kernels: float, bfloat16 and float16 as 16-bit storage with
// float32 arithmetic. Shared by csrc/cpu and csrc/cuda; no torch and no Python header.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__CUDACC__)
#define FASTFT_HD __host__ __device__ __forceinline__
#else
#define FASTFT_HD inline __attribute__((always_inline))
#endif

// csrc/cpu/isa.cpp is compiled once per instruction set into one library. Without a namespace of
// its own, the linker would keep one copy of each inline function, perhaps one full of AVX-512.
#ifndef FASTFT_ISA
#define FASTFT_ISA generic
#endif

namespace fastft {

// Codes used across the binding; fastft/native.py holds the same table.
enum class DType : int { kFloat32 = 0, kBFloat16 = 1, kFloat16 = 2 };

inline namespace FASTFT_ISA {

struct bfloat16 {
  uint16_t bits;
};
struct float16 {
  uint16_t bits;
};

FASTFT_HD uint32_t float_bits(float value) {
#if defined(__CUDA_ARCH__)
  return __float_as_uint(value);
#else
  uint32_t bits;
  memcpy(&bits, &value, sizeof bits);
  return bits;
#endif
}

FASTFT_HD float float_from_bits(uint32_t bits) {
#if defined(__CUDA_ARCH__)
  return __uint_as_float(bits);
#else
  float value;
  memcpy(&value, &bits, sizeof value);
  return value;
#endif
}

FASTFT_HD float to_float(float value) { return value; }

FASTFT_HD float to_float(bfloat16 value) {
  return float_from_bits(static_cast<uint32_t>(value.bits) << 16);
}

FASTFT_HD float to_float(float16 value) {
  const uint32_t sign = static_cast<uint32_t>(value.bits & 0x8000u) << 16;
  uint32_t exponent = (value.bits >> 10) & 0x1fu;
  uint32_t mantissa = value.bits & 0x3ffu;
  if (exponent == 31u) return float_from_bits(sign | 0x7f800000u | (mantissa << 13));
  if (exponent == 0u) {
    const float magnitude = static_cast<float>(mantissa) * 5.9604644775390625e-8f;  // 2^-24
    return float_from_bits(sign | float_bits(magnitude));
  }
  return float_from_bits(sign | ((exponent + 112u) << 23) | (mantissa << 13));
}

template <typename T>
FASTFT_HD T from_float(float value);

template <>
FASTFT_HD float from_float<float>(float value) {
  return value;
}

// Round to nearest even; every NaN becomes the quiet NaN 0x7fc0, as in torch.
template <>
FASTFT_HD bfloat16 from_float<bfloat16>(float value) {
  const uint32_t bits = float_bits(value);
  const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  const bool is_nan = (bits & 0x7fffffffu) > 0x7f800000u;
  return bfloat16{static_cast<uint16_t>(is_nan ? 0x7fc0u : rounded)};
}

template <>
FASTFT_HD float16 from_float<float16>(float value) {
  const uint32_t bits = float_bits(value);
  const uint32_t sign = (bits >> 16) & 0x8000u;
  const uint32_t magnitude = bits & 0x7fffffffu;
  uint32_t half;
  if (magnitude > 0x7f800000u) {
    half = 0x7e00u;  // NaN
  } else if (magnitude >= 0x477ff000u) {
    half = 0x7c00u;  // rounds to infinity: >= 65520
  } else if (magnitude < 0x38800000u) {
    // Subnormal: adding 0.5 aligns the mantissa so that the FPU rounds to nearest even.
    half = float_bits(float_from_bits(magnitude) + 0.5f) - 0x3f000000u;
  } else {
    half = (magnitude - 0x38000000u + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
  }
  return float16{static_cast<uint16_t>(sign | half)};
}

}  // namespace FASTFT_ISA
}  // namespace fastft
