// What kernels of optimizers share: a lane's eight elements in and out, sums over a block, and what
// the last block of a launch does for all.
#pragma once

#include <cstdint>

#include "fastft/optimizer.h"

namespace {

using namespace fastft;

constexpr int kLane = 8;  // elements of a lane

// kLane elements in one access; a torch tensor may start anywhere, so the caller asks first.
template <typename T>
struct alignas(sizeof(T) * kLane < 16 ? sizeof(T) * kLane : 16) Pack {
  T values[kLane];
};

template <typename T>
__device__ void load(float (&out)[kLane], int64_t address, int64_t start, int count) {
  const T* from = reinterpret_cast<const T*>(address) + start;
  if (count == kLane && reinterpret_cast<uintptr_t>(from) % alignof(Pack<T>) == 0) {
    const Pack<T> pack = *reinterpret_cast<const Pack<T>*>(from);
#pragma unroll
    for (int i = 0; i < kLane; ++i) out[i] = to_float(pack.values[i]);
  } else {
#pragma unroll
    for (int i = 0; i < kLane; ++i) out[i] = i < count ? to_float(from[i]) : 0.0f;
  }
}

template <typename T>
__device__ void store(const T (&values)[kLane], int64_t address, int64_t start, int count) {
  T* to = reinterpret_cast<T*>(address) + start;
  if (count == kLane && reinterpret_cast<uintptr_t>(to) % alignof(Pack<T>) == 0) {
    Pack<T> pack;
#pragma unroll
    for (int i = 0; i < kLane; ++i) pack.values[i] = values[i];
    *reinterpret_cast<Pack<T>*>(to) = pack;
  } else {
#pragma unroll
    for (int i = 0; i < kLane; ++i)
      if (i < count) to[i] = values[i];
  }
}

template <typename T>
__device__ void store_rounded(const float (&values)[kLane], int64_t address, int64_t start,
                              int count) {
  T rounded[kLane];
#pragma unroll
  for (int i = 0; i < kLane; ++i) rounded[i] = from_float<T>(values[i]);
  store(rounded, address, start, count);
}

__device__ void load_as(float (&out)[kLane], DType dtype, int64_t address, int64_t start,
                        int count) {
  switch (dtype) {
    case DType::kFloat32:
      return load<float>(out, address, start, count);
    case DType::kBFloat16:
      return load<bfloat16>(out, address, start, count);
    default:
      return load<float16>(out, address, start, count);
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

// Eight bfloat16, each up with the probability of what is cut off, by the bits that
// csrc/cpu/optimizer_step.inc gives the same elements. words: where those of a parameter or of a
// state begin in a block's.
__device__ void store_stochastic(const float (&values)[kLane], int64_t address, const StepTensor& t,
                                 int64_t start, int count, uint32_t words, uint64_t seed,
                                 uint32_t step) {
  const uint64_t first = static_cast<uint64_t>(t.offset + start);
  const uint32_t tensor = static_cast<uint32_t>(t.key);
  uint64_t block = first / kStateBlock;
  RoundingKey key = rounding_key(block, step, tensor, seed);
  bfloat16 rounded[kLane];
#pragma unroll
  for (int i = 0; i < kLane; ++i) {
    const uint64_t element = first + static_cast<uint64_t>(i);
    if (element / kStateBlock != block) {  // a shard's eight may lie across two blocks
      block = element / kStateBlock;
      key = rounding_key(block, step, tensor, seed);
    }
    const uint32_t place = static_cast<uint32_t>(element % kStateBlock);
    const uint32_t word = rounding_word(key, words + place / 2);
    rounded[i] = round_stochastic(values[i], (word >> (16 * (place & 1))) & 0xffffu);
  }
  store(rounded, address, start, count);
}

// A parameter's elements, with what rounding has taken from them.
__device__ void load_param(float (&p)[kLane], const StepTensor& t, int64_t start, int count) {
  load_as(p, param_dtype(t), t.param, start, count);
  if (rounding(t) != Rounding::kCompensated) return;
  float rest[kLane];
  load<bfloat16>(rest, t.compensation, start, count);
#pragma unroll
  for (int i = 0; i < kLane; ++i) p[i] += rest[i];
}

// Rounded as the tensor asks for. step: of this step, counted from 1.
__device__ void store_param(const float (&p)[kLane], const StepTensor& t, int64_t start, int count,
                            uint64_t seed, uint32_t step) {
  switch (param_dtype(t)) {
    case DType::kFloat32:
      return store(p, t.param, start, count);
    case DType::kFloat16:
      return store_rounded<float16>(p, t.param, start, count);
    default:
      if (rounding(t) == Rounding::kStochastic)
        return store_stochastic(p, t.param, t, start, count, 0, seed, step);
      store_rounded<bfloat16>(p, t.param, start, count);
      if (rounding(t) == Rounding::kCompensated) {
        float rest[kLane];
#pragma unroll
        for (int i = 0; i < kLane; ++i) rest[i] = p[i] - to_float(from_float<bfloat16>(p[i]));
        store_rounded<bfloat16>(rest, t.compensation, start, count);
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
