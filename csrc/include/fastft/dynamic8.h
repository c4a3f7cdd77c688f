// 8-bit states: block-wise dynamic codes (Dettmers et al. 2022, https://arxiv.org/abs/2110.02861),
// the maps of bitsandbytes in closed form. A block's values are divided by their largest magnitude.
//
//   signed    q = 127 +- k: decade i = floor(log2 k) in 0..6 has 2^i values,
//             10^(i-6) (0.1 + 0.9 (k + 1/2 - 2^i) / 2^i); 127 is 0, 255 is 1
//   unsigned  q = k - 1: decade i = floor(log2 k) - 1 in 0..6 has 2^(i+1) values; 0 is 0, 255 is 1
#pragma once

#include "fastft/numeric.h"

namespace fastft {
inline namespace FASTFT_ISA {

// 10^(i - 6) for i in 0..7.
FASTFT_HD float dynamic8_decade(int32_t i) {
  const float ones = (i & 1) ? 1e-5f : 1e-6f;
  const float twos = (i & 2) ? 100.0f : 1.0f;
  return ones * twos * ((i & 4) ? 1e4f : 1.0f);
}

// The value of the k-th code of decade floor(log2 k) - `first`.
FASTFT_HD float dynamic8_value(int32_t k, int32_t first) {
  const uint32_t bits = float_bits(static_cast<float>(k) + 0.5f);
  const int32_t exponent = static_cast<int32_t>(bits >> 23) - 127;
  const float mantissa = float_from_bits((bits & 0x7fffffu) | 0x3f800000u);
  return dynamic8_decade(exponent - first) * (0.9f * (mantissa - 1.0f) + 0.1f);
}

FASTFT_HD float dynamic8_decode_signed(uint8_t code) {
  const int32_t k = static_cast<int32_t>(code) - 127;
  const int32_t size = k < 0 ? -k : k;
  const float value = dynamic8_value(size, 0);
  const float magnitude = size == 0 ? 0.0f : (size == 128 ? 1.0f : value);
  return k < 0 ? -magnitude : magnitude;
}

FASTFT_HD float dynamic8_decode_unsigned(uint8_t code) {
  const int32_t k = static_cast<int32_t>(code) + 1;
  const float value = dynamic8_value(k, 1);
  return k == 1 ? 0.0f : (k == 256 ? 1.0f : value);
}

// floor(a slope + start) is k within a decade; where the next decade begins lies half way between
// its first value and the last one of this. Returns k for 0 <= a <= 1, without 0 and 1 themselves.
template <bool kSigned>
FASTFT_HD int32_t dynamic8_index(float a) {
  constexpr float cells = kSigned ? 1.0f : 2.0f, gap = kSigned ? 0.9f : 0.45f;
  float slope = cells * 1e6f / 0.9f, start = cells * (8.0f / 9.0f);
#define FASTFT_DECADE(two, edge, per_edge)                    \
  {                                                           \
    const bool above = a >= edge * (1.0f + 2.0f * gap / two); \
    slope = above ? cells * two * per_edge / 0.9f : slope;    \
    start = above ? cells * two * (8.0f / 9.0f) : start;      \
  }
  FASTFT_DECADE(2.0f, 1e-6f, 1e5f)
  FASTFT_DECADE(4.0f, 1e-5f, 1e4f)
  FASTFT_DECADE(8.0f, 1e-4f, 1e3f)
  FASTFT_DECADE(16.0f, 1e-3f, 1e2f)
  FASTFT_DECADE(32.0f, 1e-2f, 1e1f)
  FASTFT_DECADE(64.0f, 1e-1f, 1.0f)
#undef FASTFT_DECADE
  const float k = a * slope + start, last = start * 2.25f - 0.5f;
  return static_cast<int32_t>(k < last ? k : last);
}

// What a block's values are multiplied by, given its largest magnitude. Below the smallest normal
// number its reciprocal is no number: such a block is zero, and so is this.
FASTFT_HD float dynamic8_inverse(float top) { return top >= 1.17549435e-38f ? 1.0f / top : 0.0f; }

// x in [-1, 1]: the nearest code.
FASTFT_HD uint8_t dynamic8_encode_signed(float x) {
  const float a = x < 0.0f ? -x : x;
  int32_t k = dynamic8_index<true>(a);
  k = a < 2.75e-7f ? 0 : k;
  k = x >= 0.996484375f ? 128 : k;
  return static_cast<uint8_t>(127 + (x < 0.0f ? -k : k));
}

// a in [0, 1]: the nearest code but 0, so that no second moment vanishes by rounding.
FASTFT_HD uint8_t dynamic8_encode_unsigned(float a) {
  const int32_t k = dynamic8_index<false>(a);
  const int32_t code = k < 2 ? 1 : k - 1;
  return static_cast<uint8_t>(a >= 0.99824219f ? 255 : code);
}

// Both maps as a GPU reads them: the values of the 256 codes, and for a quotient a >= 2^-22 by its
// exponent and kBits bits of its mantissa a word. What is left of a's bits, shifted to the top and
// added to that, has the nearest code in its highest byte: at most one border lies in a step. The
// signed map's codes are those of a > 0.
template <bool kSigned>
struct Dynamic8Words {
  static constexpr int kBits = kSigned ? 6 : 7;
  static constexpr int kRest = 23 - kBits, kShift = 24 - kRest;
  static constexpr uint32_t kFirst = (127u - 22u) << kBits, kLast = 127u << kBits;  // 2^-22 and 1
  static constexpr int kValues = kSigned ? 0 : 256;  // where they are
  static constexpr int kSteps = kSigned ? 512 : 512 + 22 * 64 + 1;
};
constexpr float kDynamic8Least = 2.384185791015625e-07f;       // 2^-22
constexpr int kDynamic8Words = 512 + 22 * (64 + 128) + 2 + 2;  // and two to fill sixteen bytes

template <bool kSigned>
inline void dynamic8_words_of(uint32_t* words) {
  using Words = Dynamic8Words<kSigned>;
  const auto code = [](uint32_t bits) -> uint32_t {
    const float a = float_from_bits(bits);
    return kSigned ? dynamic8_encode_signed(a) : dynamic8_encode_unsigned(a);
  };
  for (int i = 0; i < 256; ++i) {
    const uint8_t q = static_cast<uint8_t>(i);
    words[Words::kValues + i] =
        float_bits(kSigned ? dynamic8_decode_signed(q) : dynamic8_decode_unsigned(q));
  }
  for (uint32_t step = Words::kFirst; step <= Words::kLast; ++step) {
    const uint32_t begin = step << Words::kRest, end = begin + (1u << Words::kRest);
    const uint32_t below = code(begin);
    uint32_t low = begin, high = end;  // the least bits whose code is another lie in (low, high]
    while (high - low > 1) {
      const uint32_t middle = low + (high - low) / 2;
      (code(middle) == below ? low : high) = middle;
    }
    const uint32_t carry = ((end - high) << Words::kShift) & 0xffffffu;
    const uint32_t known = (begin << Words::kShift) & 0xff000000u;
    words[Words::kSteps + static_cast<int>(step - Words::kFirst)] = (below << 24) + carry - known;
  }
}

// kDynamic8Words words.
inline void dynamic8_words(uint32_t* words) {
  dynamic8_words_of<true>(words);
  dynamic8_words_of<false>(words);
  words[kDynamic8Words - 2] = words[kDynamic8Words - 1] = 0;
}

}  // namespace FASTFT_ISA
}  // namespace fastft
