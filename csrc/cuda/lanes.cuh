// What kernels of optimizers share: a lane's eight elements in and out, sums over a block, and what
// the last block of a launch does for all.
#pragma once

#include <cstdint>

#include "fastft/optimizer.h"

namespace {

using namespace fastft;

constexpr int kLane = 8;  // elements of a lane

// kLane elements as words, in accesses of up to 16 bytes that leave the caches to others. A torch
// tensor may start anywhere, so the caller asks first whether it is `whole`.
template <typename T>
struct Words {
  static constexpr int kCount = kLane * static_cast<int>(sizeof(T)) / 4;
  static constexpr int kIn = 4 / static_cast<int>(sizeof(T));  // elements of a word
  static constexpr int kBits = 8 * static_cast<int>(sizeof(T));
  static constexpr size_t kAlignment = kCount < 4 ? 4 * kCount : 16;
  uint32_t words[kCount];

  __device__ void read(const T* from) {
    if constexpr (kCount == 2) {
      const uint2 all = __ldcs(reinterpret_cast<const uint2*>(from));
      words[0] = all.x, words[1] = all.y;
    } else {
#pragma unroll
      for (int i = 0; i < kCount; i += 4) {
        const uint4 all = __ldcs(reinterpret_cast<const uint4*>(from) + i / 4);
        words[i] = all.x, words[i + 1] = all.y, words[i + 2] = all.z, words[i + 3] = all.w;
      }
    }
  }
  __device__ void write(T* to) const {
    if constexpr (kCount == 2) {
      __stcs(reinterpret_cast<uint2*>(to), uint2{words[0], words[1]});
    } else {
#pragma unroll
      for (int i = 0; i < kCount; i += 4)
        __stcs(reinterpret_cast<uint4*>(to) + i / 4,
               uint4{words[i], words[i + 1], words[i + 2], words[i + 3]});
    }
  }
  __device__ uint32_t bits(int i) const {
    return words[i / kIn] >> (kBits * (i % kIn)) & (0xffffffffu >> (32 - kBits));
  }
};

template <typename T>
__device__ bool whole(const T* at, int count) {
  return count == kLane && reinterpret_cast<uintptr_t>(at) % Words<T>::kAlignment == 0;
}

__device__ float from_bits(float, uint32_t bits) { return float_from_bits(bits); }
__device__ float from_bits(bfloat16, uint32_t bits) { return float_from_bits(bits << 16); }
__device__ float from_bits(float16, uint32_t bits) {
  return to_float(float16{static_cast<uint16_t>(bits)});
}
__device__ uint32_t to_bits(float value) { return float_bits(value); }
__device__ uint32_t to_bits(bfloat16 value) { return value.bits; }
__device__ uint32_t to_bits(float16 value) { return value.bits; }
__device__ uint32_t to_bits(uint8_t value) { return value; }

// kWhole: all eight are there and lie as Words wants them; else it is looked.
template <bool kWhole = false, typename T>
__device__ void load(float (&out)[kLane], const T* from, int count) {
  if (kWhole || whole(from, count)) {
    Words<T> all;
    all.read(from);
#pragma unroll
    for (int i = 0; i < kLane; ++i) out[i] = from_bits(T{}, all.bits(i));
  } else {
#pragma unroll
    for (int i = 0; i < kLane; ++i) out[i] = i < count ? to_float(from[i]) : 0.0f;
  }
}

template <bool kWhole = false, typename T>
__device__ void store(const T (&values)[kLane], int64_t address, int64_t start, int count) {
  T* to = reinterpret_cast<T*>(address) + start;
  if (kWhole || whole(to, count)) {
    Words<T> all{};
#pragma unroll
    for (int i = 0; i < kLane; ++i)
      all.words[i / Words<T>::kIn] |= to_bits(values[i]) << (Words<T>::kBits * (i % Words<T>::kIn));
    all.write(to);
  } else {
#pragma unroll
    for (int i = 0; i < kLane; ++i)
      if (i < count) to[i] = values[i];
  }
}

template <typename T, bool kWhole = false>
__device__ void store_rounded(const float (&values)[kLane], int64_t address, int64_t start,
                              int count) {
  T rounded[kLane];
#pragma unroll
  for (int i = 0; i < kLane; ++i) rounded[i] = from_float<T>(values[i]);
  store<kWhole>(rounded, address, start, count);
}

template <bool kWhole = false>
__device__ void load_as(float (&out)[kLane], DType dtype, int64_t address, int64_t start,
                        int count) {
  switch (dtype) {
    case DType::kFloat32:
      return load<kWhole>(out, reinterpret_cast<const float*>(address) + start, count);
    case DType::kBFloat16:
      return load<kWhole>(out, reinterpret_cast<const bfloat16*>(address) + start, count);
    default:
      return load<kWhole>(out, reinterpret_cast<const float16*>(address) + start, count);
  }
}

// Sum over the block, in an order that depends on its size only; thread 0 has the result.
template <typename T, int kSize>
__device__ T block_sum(T value) {
  __shared__ T sums[kSize / 32];
  for (int offset = 16; offset > 0; offset /= 2)
    value += __shfl_down_sync(0xffffffffu, value, offset);
  if (threadIdx.x % 32 == 0) sums[threadIdx.x / 32] = value;
  __syncthreads();
  if (threadIdx.x < 32) {
    value = threadIdx.x < kSize / 32 ? sums[threadIdx.x] : T(0);
    for (int offset = 16; offset > 0; offset /= 2)
      value += __shfl_down_sync(0xffffffffu, value, offset);
  }
  return value;
}

// The random bits of a step's rounding, by which csrc/cpu/optimizer_step.inc rounds the same
// elements.
struct Random {
  uint64_t seed;
  uint32_t step, tensor;

  __device__ RoundingKey key(uint64_t block) const {
    return rounding_key(block, step, tensor, seed);
  }
};

// The bits of eight numbers, of NaN those that no rounding makes a number of. kTogether: their sum
// is asked first, which has a NaN if one of them is one: fewer instructions, more registers.
template <bool kTogether>
__device__ void bits_of(uint32_t (&bits)[kLane], const float (&values)[kLane]) {
  float sum = 0.0f;
#pragma unroll
  for (int i = 0; i < kLane; ++i) {
    bits[i] = float_bits(values[i]);
    sum += values[i];
  }
  if (!kTogether || sum != sum) {
#pragma unroll
    for (int i = 0; i < kLane; ++i)
      if (values[i] != values[i]) bits[i] = 0x7fc00000u;
  }
}

// Eight bfloat16, each up with the probability of what is cut off: elements of one block from
// `place` on, which is a multiple of eight. words: where those of a parameter or of a state begin.
template <bool kWhole = false, bool kTogether = false>
__device__ void store_stochastic(const float (&values)[kLane], int64_t address, int64_t start,
                                 int count, RoundingKey key, uint32_t place, uint32_t words) {
  uint32_t bits[kLane];
  bits_of<kTogether>(bits, values);
  bfloat16 rounded[kLane];
#pragma unroll
  for (int i = 0; i < kLane; i += 2) {
    const uint32_t word = rounding_word(key, words + place / 2 + i / 2);
    const uint32_t both =
        __byte_perm(bits[i] + (word & 0xffffu), bits[i + 1] + (word >> 16), 0x7632);
    rounded[i] = bfloat16{static_cast<uint16_t>(both)};
    rounded[i + 1] = bfloat16{static_cast<uint16_t>(both >> 16)};
  }
  store<kWhole>(rounded, address, start, count);
}

// The same anywhere: of a shard, eight may lie across two blocks.
template <bool kTogether = false>
__device__ void store_stochastic_anywhere(const float (&values)[kLane], int64_t address,
                                          int64_t start, int count, const Random& random,
                                          uint64_t first, uint32_t words) {
  uint64_t block = first / kStateBlock;
  RoundingKey key = random.key(block);
  if (first % kLane == 0)
    return store_stochastic<false, kTogether>(values, address, start, count, key,
                                              static_cast<uint32_t>(first % kStateBlock), words);
  bfloat16 rounded[kLane];
#pragma unroll 1
  for (int half = 0; half < 2; ++half) {  // one key a turn
#pragma unroll
    for (int i = 0; i < kLane; ++i) {
      const uint64_t element = first + static_cast<uint64_t>(i);
      if (element / kStateBlock != block) continue;
      const uint32_t place = static_cast<uint32_t>(element % kStateBlock);
      const uint32_t word = rounding_word(key, words + place / 2);
      rounded[i] = round_stochastic(values[i], (word >> (16 * (place & 1))) & 0xffffu);
    }
    key = random.key(++block);
  }
  store(rounded, address, start, count);
}

// A parameter's elements, with what rounding has taken from them.
template <bool kWhole = false>
__device__ void load_param(float (&p)[kLane], const StepTensor& t, int64_t start, int count) {
  load_as<kWhole>(p, param_dtype(t), t.param, start, count);
  if (rounding(t) != Rounding::kCompensated) return;
  float rest[kLane];
  load<kWhole>(rest, reinterpret_cast<const bfloat16*>(t.compensation) + start, count);
#pragma unroll
  for (int i = 0; i < kLane; ++i) p[i] += rest[i];
}

// Rounded as the tensor asks for; stochastic(address, words) stores at random.
template <bool kWhole = false, typename Stochastic>
__device__ void store_param(const float (&p)[kLane], const StepTensor& t, int64_t start, int count,
                            const Stochastic& stochastic) {
  switch (param_dtype(t)) {
    case DType::kFloat32:
      return store<kWhole>(p, t.param, start, count);
    case DType::kFloat16:
      return store_rounded<float16, kWhole>(p, t.param, start, count);
    default:
      if (rounding(t) == Rounding::kStochastic) return stochastic(p, t.param, 0u);
      store_rounded<bfloat16, kWhole>(p, t.param, start, count);
      if (rounding(t) == Rounding::kCompensated) {
        float rest[kLane];
#pragma unroll
        for (int i = 0; i < kLane; ++i) rest[i] = p[i] - to_float(from_float<bfloat16>(p[i]));
        store_rounded<bfloat16, kWhole>(rest, t.compensation, start, count);
      }
  }
}

// partials: one float a block. tickets: zero before a launch and after it.
struct Scratch {
  float* partials;
  uint32_t* tickets;
};

// Whether all other blocks of the launch have ended: what they wrote can then be read. All threads
// of a block call it, as the last thing but that.
__device__ bool is_last_block(uint32_t* ticket, unsigned blocks) {
  __shared__ bool is_last;
  __syncthreads();
  if (threadIdx.x == 0) {
    __threadfence();
    is_last = atomicAdd(ticket, 1u) + 1 == blocks;
    if (is_last) *ticket = 0;
    __threadfence();
  }
  __syncthreads();
  return is_last;
}

__device__ void note_decision(float* stats, const StepDecision& d) {
  stats[0] = d.norm;
  stats[1] = d.coefficient;
  if (!d.run) stats[2] += 1.0f;
  stats[5] = d.run ? 1.0f : 0.0f;
}

// What the sum of all partials says of the step, into stats; a block of kSize threads.
template <int kSize>
__device__ void sum_and_decide(const float* partials, int64_t count, float* stats, float max_norm) {
  const volatile float* from = partials;  // other blocks wrote them
  double sum = 0.0;
  for (int64_t i = threadIdx.x; i < count; i += kSize) sum += from[i];
  sum = block_sum<double, kSize>(sum);
  if (threadIdx.x == 0) note_decision(stats, decide_step(sum, true, max_norm, stats[3], stats[4]));
}

// The decision noted by an earlier launch, or where no norm is needed, made here.
__device__ StepDecision decision_of(const float* stats, int needs_norm) {
  if (!needs_norm) return decide_step(0.0, false, 0.0f, stats[3], stats[4]);
  return {stats[0], stats[1], stats[5] != 0.0f};
}

}  // namespace
