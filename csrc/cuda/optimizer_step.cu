// A step of an optimizer over all tensors in one launch, two where gradients are summed first. What
// comes after all blocks of a launch, the last of them to end does. A warp takes 256 elements,
// eight a lane: the block of 8-bit states. See fastft/cuda_api.h.
#include <cuda_runtime.h>

#include <cstdint>

#include "cuda/lanes.cuh"
#include "fastft/cuda_api.h"
#include "fastft/dynamic8.h"
#include "fastft/optimizer.h"
#include "fastft/philox.h"

namespace {

using namespace fastft;

constexpr int kThreads = 128;
constexpr int kUpdateBlocks = 5;  // of a multiprocessor: 96 registers, of which 80 spill
static_assert(kLane * 32 == kStateBlock, "a warp holds the block of an 8-bit state");

struct Tables {
  const StepTensor* tensors;
  const int32_t* chunk_tensor;
  const int32_t* chunk_part;
  int64_t chunk;
  int64_t n_chunks;
  unsigned blocks;  // of a launch: n_chunks, but at least one
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

// This thread's.
__device__ float squares_of_chunk(const Tables& tables) {
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
  return sum;
}

__global__ void __launch_bounds__(kThreads)
    norm_kernel(Tables tables, Scratch scratch, float* stats, float max_norm) {
  float sum = blockIdx.x < tables.n_chunks ? squares_of_chunk(tables) : 0.0f;
  sum = block_sum<float, kThreads>(sum);
  if (threadIdx.x == 0) scratch.partials[blockIdx.x] = sum;
  if (!is_last_block(&scratch.tickets[0], tables.blocks)) return;
  sum_and_decide<kThreads>(scratch.partials, tables.blocks, stats, max_norm);
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

// One block's part of one tensor.
template <typename Rule>
__device__ void update_chunk(const Tables& tables, const StepHyper* hyper, float coefficient,
                             uint64_t seed) {
  __shared__ StepScalars prepared;
  const int64_t index = tables.chunk_tensor[blockIdx.x];
  const StepTensor t = tables.tensors[index];
  const Chunk chunk = chunk_of(tables, t, blockIdx.x);
  const float taken = *reinterpret_cast<const float*>(t.step) + 1.0f;  // counted when all is done
  if (threadIdx.x == 0) {
    StepScalars own = Rule::prepare(hyper[index], static_cast<double>(taken));
    own.gradient_scale = hyper[index].sign * coefficient;
    prepared = own;
  }
  __syncthreads();
  const StepScalars& s = prepared;
  const StateKind kind = state_kind(t);
  const uint32_t step = static_cast<uint32_t>(taken);
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
    load_param(p, t, start, count);
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
    store_param(p, t, start, count, seed, step);
  }
}

template <typename Rule>
__global__ void __launch_bounds__(kThreads, kUpdateBlocks)
    update_kernel(Tables tables, Scratch scratch, const StepHyper* hyper, int64_t n_tensors,
                  float* stats, int needs_norm, uint64_t seed) {
  const StepDecision d = decision_of(stats, needs_norm);
  if (d.run && blockIdx.x < tables.n_chunks)
    update_chunk<Rule>(tables, hyper, d.coefficient * stats[3], seed);
  if (!is_last_block(&scratch.tickets[1], tables.blocks)) return;
  if (threadIdx.x == 0 && !needs_norm) note_decision(stats, d);
  for (int64_t i = threadIdx.x; d.run && i < n_tensors; i += kThreads)
    *reinterpret_cast<float*>(tables.tensors[i].step) += 1.0f;
}

template <typename Rule>
cudaError_t launch(const Tables& tables, const Scratch& scratch, const StepHyper* hyper,
                   int64_t n_tensors, float* stats, float max_norm, int needs_norm, uint64_t seed,
                   cudaStream_t queue) {
  const unsigned blocks = tables.blocks;
  if (needs_norm) {
    norm_kernel<<<blocks, kThreads, 0, queue>>>(tables, scratch, stats, max_norm);
    const cudaError_t status = cudaGetLastError();
    if (status != cudaSuccess) return status;
  }
  update_kernel<Rule>
      <<<blocks, kThreads, 0, queue>>>(tables, scratch, hyper, n_tensors, stats, needs_norm, seed);
  return cudaGetLastError();
}

}  // namespace

extern "C" {

const char* fastft_cuda_error_string(int status) {
  return cudaGetErrorString(static_cast<cudaError_t>(status));
}

int fastft_optimizer_step_cuda(int device, int rule, const StepTensor* tensors, int64_t n_tensors,
                               const int32_t* chunk_tensor, const int32_t* chunk_part,
                               int64_t n_chunks, int64_t chunk, float* partials, uint32_t* tickets,
                               const float* hyper, float* stats, float max_norm, int needs_norm,
                               uint64_t seed, void* stream) {
  if (n_chunks > 0x7fffffff) return cudaErrorInvalidValue;  // the grid's first axis
  const cudaError_t status = cudaSetDevice(device);
  if (status != cudaSuccess) return status;
  const unsigned blocks = n_chunks > 0 ? static_cast<unsigned>(n_chunks) : 1;
  const Tables tables{tensors, chunk_tensor, chunk_part, chunk, n_chunks, blocks};
  const Scratch scratch{partials, tickets};
  const auto run = [&](auto which) {
    return launch<decltype(which)>(tables, scratch, reinterpret_cast<const StepHyper*>(hyper),
                                   n_tensors, stats, max_norm, needs_norm, seed,
                                   static_cast<cudaStream_t>(stream));
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
    case OptimizerRule::kMuon:
      return run(MuonRule{});
  }
  return cudaErrorInvalidValue;
}
}
