// A step of an optimizer over all tensors in two launches, three where gradients are summed:
// partial sums of squares, one block that decides and prepares what is constant over a tensor, the
// update. A warp takes 256 elements, eight a lane: the block of 8-bit states. See
// fastft/cuda_api.h.
#include <cuda_runtime.h>

#include <cstdint>

#include "fastft/cuda_api.h"
#include "fastft/dynamic8.h"
#include "fastft/optimizer.h"
#include "fastft/philox.h"

namespace {

using namespace fastft;

constexpr int kThreads = 128;
constexpr int kPrepareThreads = 512;
constexpr int kUpdateBlocks = 5;  // of a multiprocessor: 96 registers, of which 80 spill
constexpr int kLane = 8;          // elements of a lane
static_assert(kLane * 32 == kStateBlock, "a warp holds the block of an 8-bit state");

struct Tables {
  const StepTensor* tensors;
  const int32_t* chunk_tensor;
  const int32_t* chunk_part;
  int64_t chunk;
};

// The part of one tensor that one block works on.
struct Chunk {
  int64_t start, size;
};

__device__ Chunk chunk_of(const Tables& tables, const StepTensor& tensor, int64_t block) {
  const int64_t start = static_cast<int64_t>(tables.chunk_part[block]) * tables.chunk;
  const int64_t left = tensor.numel - start;
  return {start, left < tables.chunk ? left : tables.chunk};
}

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

__global__ void __launch_bounds__(kThreads) norm_kernel(Tables tables, float* partials) {
  const StepTensor tensor = tables.tensors[tables.chunk_tensor[blockIdx.x]];
  const Chunk chunk = chunk_of(tables, tensor, blockIdx.x);
  float sum = 0.0f;
  for (int64_t i = threadIdx.x * kLane; i < chunk.size; i += kThreads * kLane) {
    const int64_t left = chunk.size - i;
    float g[kLane];
    load_as(g, grad_dtype(tensor), tensor.grad, chunk.start + i,
            static_cast<int>(left < kLane ? left : kLane));
#pragma unroll
    for (int j = 0; j < kLane; ++j) sum += g[j] * g[j];
  }
  sum = block_sum<float, kThreads>(sum);
  if (threadIdx.x == 0) partials[blockIdx.x] = sum;
}

template <typename Rule>
__global__ void __launch_bounds__(kPrepareThreads)
    prepare_kernel(const float* partials, int64_t n_chunks, int64_t n_tensors,
                   const StepTensor* tensors, const StepHyper* hyper, StepScalars* scalars,
                   float* stats, float max_norm, int needs_norm) {
  __shared__ StepDecision shared_decision;
  double sum = 0.0;
  if (needs_norm)
    for (int64_t i = threadIdx.x; i < n_chunks; i += kPrepareThreads) sum += partials[i];
  sum = block_sum<double, kPrepareThreads>(sum);
  if (threadIdx.x == 0) {
    const StepDecision d = decide_step(sum, needs_norm != 0, max_norm, stats[3], stats[4]);
    stats[0] = d.norm;
    stats[1] = d.coefficient;
    if (!d.run) stats[2] += 1.0f;
    stats[5] = d.run ? 1.0f : 0.0f;
    shared_decision = d;
  }
  __syncthreads();
  const StepDecision decision = shared_decision;
  if (!decision.run) return;
  for (int64_t i = threadIdx.x; i < n_tensors; i += kPrepareThreads) {
    float* count = reinterpret_cast<float*>(tensors[i].step);
    const double step = static_cast<double>(*count) + 1.0;
    *count = static_cast<float>(step);
    StepScalars s = Rule::prepare(hyper[i], step);
    s.gradient_scale = hyper[i].sign * (decision.coefficient * stats[3]);
    scalars[i] = s;
  }
}

// The largest of a warp, in all its lanes.
__device__ float warp_max(float value) {
  for (int offset = 16; offset > 0; offset /= 2) {
    const float other = __shfl_xor_sync(0xffffffffu, value, offset);
    value = other > value ? other : value;
  }
  return value;
}

template <bool kSigned>
__device__ void load_state(float (&out)[kLane], int64_t codes, const float* absmax, int64_t start,
                           int count) {
  const uint8_t* from = reinterpret_cast<const uint8_t*>(codes) + start;
  const float scale = *absmax;
  Pack<uint8_t> pack{};
  if (count == kLane && reinterpret_cast<uintptr_t>(from) % alignof(Pack<uint8_t>) == 0) {
    pack = *reinterpret_cast<const Pack<uint8_t>*>(from);
  } else {
#pragma unroll
    for (int i = 0; i < kLane; ++i)
      pack.values[i] = i < count ? from[i] : uint8_t(kSigned ? 127 : 0);
  }
#pragma unroll
  for (int i = 0; i < kLane; ++i)
    out[i] = scale * (kSigned ? dynamic8_decode_signed(pack.values[i])
                              : dynamic8_decode_unsigned(pack.values[i]));
}

template <bool kSigned>
__device__ void store_state(const float (&in)[kLane], int64_t codes, float* absmax, int64_t start,
                            int count) {
  float top = 0.0f;
#pragma unroll
  for (int i = 0; i < kLane; ++i) {
    const float size = in[i] < 0.0f ? -in[i] : in[i];
    top = i < count && size > top ? size : top;
  }
  top = warp_max(top);
  const float inverse = dynamic8_inverse(top);
  uint8_t packed[kLane];
#pragma unroll
  for (int i = 0; i < kLane; ++i)
    packed[i] = kSigned ? dynamic8_encode_signed(in[i] * inverse)
                        : dynamic8_encode_unsigned(in[i] * inverse);
  store(packed, codes, start, count);
  if (threadIdx.x % 32 == 0) *absmax = inverse > 0.0f ? top : 0.0f;
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

template <typename Rule>
__global__ void __launch_bounds__(kThreads, kUpdateBlocks)
    update_kernel(Tables tables, const StepScalars* scalars, const float* stats, uint64_t seed) {
  if (stats[5] == 0.0f) return;
  const int64_t index = tables.chunk_tensor[blockIdx.x];
  const StepTensor t = tables.tensors[index];
  const Chunk chunk = chunk_of(tables, t, blockIdx.x);
  const StepScalars s = scalars[index];
  const StateKind kind = state_kind(t);
  const Rounding how = rounding(t);
  const uint32_t step = static_cast<uint32_t>(*reinterpret_cast<const float*>(t.step));
  // Every lane of a warp takes each turn: the largest of a block is that of all of them.
  for (int64_t tile = threadIdx.x / 32 * kStateBlock; tile < chunk.size;
       tile += kThreads / 32 * kStateBlock) {
    const int64_t offset = tile + threadIdx.x % 32 * kLane, left = chunk.size - offset;
    const int count = static_cast<int>(left < 0 ? 0 : (left < kLane ? left : kLane));
    const int64_t start = chunk.start + offset, block = (chunk.start + tile) / kStateBlock;
    float* absmax1 = reinterpret_cast<float*>(t.absmax1) + block;
    float* absmax2 = reinterpret_cast<float*>(t.absmax2) + block;
    float p[kLane], g[kLane], first[kLane] = {}, second[kLane] = {};
    load_as(g, grad_dtype(t), t.grad, start, count);
    load_as(p, param_dtype(t), t.param, start, count);
    if (how == Rounding::kCompensated) {
      float rest[kLane];
      load<bfloat16>(rest, t.compensation, start, count);
#pragma unroll
      for (int i = 0; i < kLane; ++i) p[i] += rest[i];
    }
    if (kind == StateKind::kEightBit) {
      load_state<true>(first, t.state1, absmax1, start, count);
      if (Rule::kStates > 1) load_state<false>(second, t.state2, absmax2, start, count);
    } else {
      const DType dtype = kind == StateKind::kBFloat16 ? DType::kBFloat16 : DType::kFloat32;
      if (t.state1) load_as(first, dtype, t.state1, start, count);
      if (t.state2) load_as(second, dtype, t.state2, start, count);
    }
#pragma unroll
    for (int i = 0; i < kLane; ++i) Rule::update(p[i], g[i], first[i], second[i], s);
    if (kind == StateKind::kEightBit) {
      __syncwarp();  // the block's scale has been read by all before one lane writes it
      store_state<true>(first, t.state1, absmax1, start, count);
      if (Rule::kStates > 1) store_state<false>(second, t.state2, absmax2, start, count);
    } else if (kind == StateKind::kBFloat16) {
      if (t.state1) store_stochastic(first, t.state1, t, start, count, kRoundingWords, seed, step);
      if (t.state2)
        store_stochastic(second, t.state2, t, start, count, 2 * kRoundingWords, seed, step);
    } else {
      if (t.state1) store(first, t.state1, start, count);
      if (t.state2) store(second, t.state2, start, count);
    }
    switch (param_dtype(t)) {
      case DType::kFloat32:
        store(p, t.param, start, count);
        break;
      case DType::kFloat16:
        store_rounded<float16>(p, t.param, start, count);
        break;
      default:
        if (how == Rounding::kStochastic) {
          store_stochastic(p, t.param, t, start, count, 0, seed, step);
          break;
        }
        store_rounded<bfloat16>(p, t.param, start, count);
        if (how == Rounding::kCompensated) {
          float rest[kLane];
#pragma unroll
          for (int i = 0; i < kLane; ++i) rest[i] = p[i] - to_float(from_float<bfloat16>(p[i]));
          store_rounded<bfloat16>(rest, t.compensation, start, count);
        }
    }
  }
}

template <typename Rule>
cudaError_t launch(const Tables& tables, int64_t n_tensors, unsigned blocks, float* partials,
                   StepScalars* scalars, const StepHyper* hyper, float* stats, float max_norm,
                   int needs_norm, uint64_t seed, cudaStream_t queue) {
  cudaError_t status = cudaSuccess;
  if (blocks > 0 && needs_norm) {
    norm_kernel<<<blocks, kThreads, 0, queue>>>(tables, partials);
    if ((status = cudaGetLastError()) != cudaSuccess) return status;
  }
  prepare_kernel<Rule><<<1, kPrepareThreads, 0, queue>>>(partials, static_cast<int64_t>(blocks),
                                                         n_tensors, tables.tensors, hyper, scalars,
                                                         stats, max_norm, needs_norm);
  if ((status = cudaGetLastError()) != cudaSuccess) return status;
  if (blocks > 0) {
    update_kernel<Rule><<<blocks, kThreads, 0, queue>>>(tables, scalars, stats, seed);
    status = cudaGetLastError();
  }
  return status;
}

}  // namespace

extern "C" {

const char* fastft_cuda_error_string(int status) {
  return cudaGetErrorString(static_cast<cudaError_t>(status));
}

int fastft_optimizer_step_cuda(int device, int rule, const StepTensor* tensors, int64_t n_tensors,
                               const int32_t* chunk_tensor, const int32_t* chunk_part,
                               int64_t n_chunks, int64_t chunk, float* partials, float* scalars,
                               const float* hyper, float* stats, float max_norm, int needs_norm,
                               uint64_t seed, void* stream) {
  if (n_chunks > 0x7fffffff) return cudaErrorInvalidValue;  // the grid's first axis
  cudaError_t status = cudaSetDevice(device);
  if (status != cudaSuccess) return status;
  const Tables tables{tensors, chunk_tensor, chunk_part, chunk};
  const auto run = [&](auto which) {
    return launch<decltype(which)>(tables, n_tensors, static_cast<unsigned>(n_chunks), partials,
                                   reinterpret_cast<StepScalars*>(scalars),
                                   reinterpret_cast<const StepHyper*>(hyper), stats, max_norm,
                                   needs_norm, seed, static_cast<cudaStream_t>(stream));
  };
  switch (static_cast<OptimizerRule>(rule)) {
    case OptimizerRule::kAdamW:
      return run(AdamWRule{});
    case OptimizerRule::kLion:
      return run(LionRule{});
    case OptimizerRule::kSgd:
      return run(SgdRule{});
    case OptimizerRule::kScheduleFree:
      return run(ScheduleFreeRule{});
  }
  return cudaErrorInvalidValue;
}
}
