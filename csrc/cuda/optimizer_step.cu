// A step of an optimizer over all tensors in one launch, two where gradients are summed first. What
// comes after all blocks of a launch, the last of them to end does. A warp takes 256 elements,
// eight a lane: the block of 8-bit states. Tensors whose codes are kUsualCodes have a kernel of
// their own, a launch before the rest's. See fastft/cuda_api.h.
#include <cuda_runtime.h>

#include <cstdint>

#include "cuda/lanes.cuh"
#include "fastft/cuda_api.h"
#include "fastft/dynamic8.h"
#include "fastft/optimizer.h"

namespace {

using namespace fastft;

constexpr int kThreads = 128;
// bfloat16 weights and gradients, 8-bit states, stochastic rounding: what large models are trained
// with. Knowing that, the compiler leaves out a third of the instructions and 24 registers.
constexpr int kUsualCodes =
    static_cast<int>(DType::kBFloat16) + 4 * static_cast<int>(DType::kBFloat16) +
    16 * static_cast<int>(StateKind::kEightBit) + 64 * static_cast<int>(Rounding::kStochastic);
constexpr int kAnyCodes = -1;

// Of a multiprocessor: 96 registers, of which two or three spill; where codes are known 72 on
// Hopper and 80 before, of which none does. Blackwell's code needs more.
constexpr int update_blocks(int codes, int major) {
  if (codes == kAnyCodes) return major < 10 ? 5 : 3;
  return major < 9 ? 6 : (major < 10 ? 7 : 4);
}
#if defined(__CUDA_ARCH__)
constexpr int kMajor = __CUDA_ARCH__ / 100;
#else
constexpr int kMajor = 0;  // the host only declares the kernel
#endif
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

// The byte that holds the sign of each of two numbers, repeated, in the lowest bytes.
__device__ uint32_t sign_bytes(float a, float b) {
#if defined(__CUDA_ARCH__)
  uint32_t bytes;
  asm("prmt.b32 %0, %1, %2, 0xfb;" : "=r"(bytes) : "r"(float_bits(a)), "r"(float_bits(b)));
  return bytes;
#else
  return (float_bits(a) >> 31) * 0xffu | (float_bits(b) >> 31) * 0xff00u;
#endif
}

// The codes of 8-bit states where a block of threads reads them.
struct SharedCodes {
  alignas(16) uint32_t words[kDynamic8Words];

  __device__ void fill(const uint4* from) {
    for (int i = static_cast<int>(threadIdx.x); i < kDynamic8Words / 4; i += kThreads)
      reinterpret_cast<uint4*>(words)[i] = from[i];
  }

  template <bool kSigned>
  __device__ float value(uint8_t code) const {
    return float_from_bits(words[Dynamic8Words<kSigned>::kValues + code]);
  }

  // Four numbers in [-1, 1], or [0, 1] of the unsigned map: their nearest codes.
  template <bool kSigned>
  __device__ uint32_t code(const float* x) const {
    using Words = Dynamic8Words<kSigned>;
    uint32_t sums[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      // -1 has no code: it takes that of its neighbour.
      const float a = fmaxf(fabsf(kSigned ? fmaxf(x[i], -0.9921875f) : x[i]), kDynamic8Least);
      const uint32_t bits = float_bits(a);
      sums[i] =
          words[Words::kSteps + (bits >> Words::kRest) - Words::kFirst] + (bits << Words::kShift);
    }
    const uint32_t codes = __byte_perm(__byte_perm(sums[0], sums[1], 0x73),
                                       __byte_perm(sums[2], sums[3], 0x73), 0x5410);
    if (!kSigned) return codes;
    // 127 + k becomes 127 - k: all bits turned, and less one.
    const uint32_t negative = __byte_perm(sign_bytes(x[0], x[1]), sign_bytes(x[2], x[3]), 0x5410);
    return (codes ^ negative) - (negative & 0x01010101u);
  }
};

template <bool kWhole, bool kSigned>
__device__ void load_state(float (&out)[kLane], const SharedCodes& codes, int64_t address,
                           const float* absmax, int64_t start, int count) {
  const uint8_t* from = reinterpret_cast<const uint8_t*>(address) + start;
  const float scale = *absmax;
  Words<uint8_t> all{};
  if (kWhole || whole(from, count)) {
    all.read(from);
  } else {
#pragma unroll
    for (int i = 0; i < kLane; ++i) {
      const uint32_t code = i < count ? from[i] : (kSigned ? 127u : 0u);
      all.words[i / 4] |= code << (8 * (i % 4));
    }
  }
#pragma unroll
  for (int i = 0; i < kLane; ++i)
    out[i] = scale * codes.value<kSigned>(static_cast<uint8_t>(all.bits(i)));
}

template <bool kWhole, bool kSigned>
__device__ void store_state(const float (&in)[kLane], const SharedCodes& codes, int64_t address,
                            float* absmax, int64_t start, int count) {
  float top = 0.0f;  // fmaxf passes NaN over
#pragma unroll
  for (int i = 0; i < kLane; ++i)
    if (kWhole || i < count) top = fmaxf(top, fabsf(in[i]));
  top = float_from_bits(__reduce_max_sync(0xffffffffu, float_bits(top)));
  const float inverse = top >= 1.17549435e-38f ? step_quotient(1.0f, top) : 0.0f;
  float scaled[kLane];
#pragma unroll
  for (int i = 0; i < kLane; ++i) scaled[i] = in[i] * inverse;
  const uint32_t packed[2] = {codes.code<kSigned>(scaled), codes.code<kSigned>(scaled + 4)};
  uint8_t bytes[kLane];
#pragma unroll
  for (int i = 0; i < kLane; ++i) bytes[i] = static_cast<uint8_t>(packed[i / 4] >> (8 * (i % 4)));
  store<kWhole>(bytes, address, start, count);
  if (threadIdx.x % 32 == 0) *absmax = inverse > 0.0f ? top : 0.0f;
}

// A tensor in shared memory, itself or, where its codes are known, with a constant in their place.
template <int kCodes>
__device__ decltype(auto) known(const StepTensor& t) {
  if constexpr (kCodes == kAnyCodes) {
    return (t);
  } else {
    StepTensor own = t;
    own.codes = kCodes;
    return own;
  }
}

// What a chunk's tiles share.
struct ChunkCall {
  const StepTensor& t;
  const StepScalars& s;
  const SharedCodes& codes;
  Random random;
  RoundingKey own;  // of the lane's block of the chunk, where those are the tensor's own
  bool aligned;     // whether they are
};

// 256 elements of a chunk, eight a lane; kWhole: all are there, on borders of 16 bytes.
template <typename Rule, int kCodes, bool kWhole>
__device__ void update_tile(const ChunkCall& c, int64_t begin, int tile, int64_t left) {
  const StepTensor& t = known<kCodes>(c.t);
  const StateKind kind = state_kind(t);
  const int lane = static_cast<int>(threadIdx.x % 32) * kLane;
  const int count =
      kWhole ? kLane
             : static_cast<int>(left - lane < 0 ? 0 : (left - lane < kLane ? left - lane : kLane));
  const int64_t start = begin + lane, block = begin / kStateBlock;
  float* absmax1 = reinterpret_cast<float*>(t.absmax1) + block;
  float* absmax2 = reinterpret_cast<float*>(t.absmax2) + block;
  float p[kLane], g[kLane], first[kLane] = {}, second[kLane] = {};
  load_as<kWhole>(g, grad_dtype(t), t.grad, start, count);
  load_param<kWhole>(p, t, start, count);
  if (kind == StateKind::kEightBit) {
    load_state<kWhole, true>(first, c.codes, t.state1, absmax1, start, count);
    if (Rule::kStates > 1)
      load_state<kWhole, false>(second, c.codes, t.state2, absmax2, start, count);
  } else {
    const DType dtype = kind == StateKind::kBFloat16 ? DType::kBFloat16 : DType::kFloat32;
    if (t.state1) load_as<kWhole>(first, dtype, t.state1, start, count);
    if (t.state2) load_as<kWhole>(second, dtype, t.state2, start, count);
  }
#pragma unroll
  for (int i = 0; i < kLane; ++i) Rule::update(p[i], g[i], first[i], second[i], c.s);
  RoundingKey key{};
  if (c.aligned)
    key = {__shfl_sync(0xffffffffu, c.own.first, tile),
           __shfl_sync(0xffffffffu, c.own.second, tile)};
  const auto stochastic = [&](const float (&values)[kLane], int64_t address, uint32_t words) {
    if (c.aligned)
      return store_stochastic<kWhole, kCodes != kAnyCodes>(values, address, start, count, key,
                                                           static_cast<uint32_t>(lane), words);
    store_stochastic_anywhere<kCodes != kAnyCodes>(values, address, start, count, c.random,
                                                   static_cast<uint64_t>(t.offset + start), words);
  };
  if (kind == StateKind::kEightBit) {
    __syncwarp();  // the block's scale has been read by all before one lane writes it
    store_state<kWhole, true>(first, c.codes, t.state1, absmax1, start, count);
    if (Rule::kStates > 1)
      store_state<kWhole, false>(second, c.codes, t.state2, absmax2, start, count);
  } else if (kind == StateKind::kBFloat16) {
    if (t.state1) stochastic(first, t.state1, kRoundingWords);
    if (t.state2) stochastic(second, t.state2, 2 * kRoundingWords);
  } else {
    if (t.state1) store<kWhole>(first, t.state1, start, count);
    if (t.state2) store<kWhole>(second, t.state2, start, count);
  }
  store_param<kWhole>(p, t, start, count, stochastic);
}

// Asks for what a lane reads from `start` on, so that it is near by then.
__device__ void ask_for(int64_t address, int64_t start, int64_t size) {
#if defined(__CUDA_ARCH__)
  if (address) asm volatile("prefetch.global.L2 [%0];" ::"l"(address + start * size));
#endif
}

template <int kCodes>
__device__ void ask_for_all(const StepTensor& shared, int64_t start) {
  const StepTensor& t = known<kCodes>(shared);
  const auto bytes = [](DType dtype) { return dtype == DType::kFloat32 ? 4 : 2; };
  const StateKind kind = state_kind(t);
  const int state = kind == StateKind::kEightBit ? 1 : (kind == StateKind::kBFloat16 ? 2 : 4);
  ask_for(t.grad, start, bytes(grad_dtype(t)));
  ask_for(t.param, start, bytes(param_dtype(t)));
  ask_for(t.state1, start, state);
  ask_for(t.state2, start, state);
}

// What the chunks of a block of threads share.
struct Shared {
  StepTensor t;
  StepScalars scalars;
  SharedCodes codes;
};

// A chunk of one tensor.
template <typename Rule, int kCodes>
__device__ void update_chunk(const Tables& tables, int64_t number, Shared& shared,
                             const StepHyper* hyper, float coefficient, uint64_t seed) {
  const int64_t index = tables.chunk_tensor[number];
  __syncthreads();  // the chunk before this one is done
  if (threadIdx.x < kStepColumns)
    reinterpret_cast<int64_t*>(&shared.t)[threadIdx.x] =
        reinterpret_cast<const int64_t*>(tables.tensors + index)[threadIdx.x];
  __syncthreads();
  const StepTensor& t = shared.t;
  const Chunk chunk = chunk_of(tables, t, number);
  const float taken = *reinterpret_cast<const float*>(t.step) + 1.0f;  // counted when all is done
  if (threadIdx.x == 0) {
    StepScalars own = Rule::prepare(hyper[index], static_cast<double>(taken));
    own.gradient_scale = hyper[index].sign * coefficient;
    shared.scalars = own;
  }
  const Random random{seed, static_cast<uint32_t>(taken), static_cast<uint32_t>(t.key)};
  const bool draws = rounding(t) == Rounding::kStochastic || state_kind(t) == StateKind::kBFloat16;
  const bool aligned = draws && t.offset % kStateBlock == 0;
  RoundingKey key{};
  if (aligned)
    key =
        random.key(static_cast<uint64_t>(t.offset + chunk.start) / kStateBlock + threadIdx.x % 32);
  __syncthreads();
  const ChunkCall call{t, shared.scalars, shared.codes, random, key, aligned};
  const bool vectors = (t.param | t.grad | t.state1 | t.state2 | t.compensation) % 16 == 0;
  // Every lane of a warp takes each turn: the largest of a block is that of all of them.
  for (int64_t at = threadIdx.x / 32 * kStateBlock; at < chunk.size;
       at += kThreads / 32 * kStateBlock) {
    const int tile = static_cast<int>(at / kStateBlock);
    const int64_t next = at + kThreads / 32 * kStateBlock + threadIdx.x % 32 * kLane;
    if (next < chunk.size) ask_for_all<kCodes>(t, chunk.start + next);
    if (vectors && at + kStateBlock <= chunk.size)
      update_tile<Rule, kCodes, true>(call, chunk.start + at, tile, kStateBlock);
    else
      update_tile<Rule, kCodes, false>(call, chunk.start + at, tile, chunk.size - at);
  }
}

// A block takes every so-manieth chunk: no more blocks than run at a time have the codes to read.
// ends: no launch of this step comes after.
template <typename Rule, int kCodes>
__global__ void __launch_bounds__(kThreads, update_blocks(kCodes, kMajor))
    update_kernel(Tables tables, const uint4* codes, Scratch scratch, const StepHyper* hyper,
                  int64_t n_tensors, float* stats, int needs_norm, uint64_t seed, bool ends) {
  __shared__ Shared shared;
  const StepDecision d = decision_of(stats, needs_norm);
  if (d.run) {
    if (codes) shared.codes.fill(codes);
    for (int64_t i = blockIdx.x; i < tables.n_chunks; i += tables.blocks)
      update_chunk<Rule, kCodes>(tables, i, shared, hyper, d.coefficient * stats[3], seed);
  }
  if (!ends || !is_last_block(&scratch.tickets[1], tables.blocks)) return;
  if (threadIdx.x == 0 && !needs_norm) note_decision(stats, d);
  for (int64_t i = threadIdx.x; d.run && i < n_tensors; i += kThreads)
    *reinterpret_cast<float*>(tables.tensors[i].step) += 1.0f;
}

// Rules whose states may be in 8 bits.
template <typename Rule>
constexpr bool kHasUsual = false;
template <>
constexpr bool kHasUsual<AdamWRule> = true;
template <>
constexpr bool kHasUsual<LionRule> = true;

struct Device {
  int processors = 0, major = 0;
  cudaStream_t queue;

  unsigned blocks(int codes, const Tables& tables) const {
    const unsigned resident = static_cast<unsigned>(processors * update_blocks(codes, major));
    return tables.blocks < resident ? tables.blocks : resident;
  }
};

Tables part_of(Tables all, int64_t first, int64_t count) {
  all.chunk_tensor += first;
  all.chunk_part += first;
  all.n_chunks = count;
  all.blocks = count > 0 ? static_cast<unsigned>(count) : 1;
  return all;
}

template <typename Rule, int kCodes>
cudaError_t update(Tables tables, const uint4* codes, const Scratch& scratch,
                   const StepHyper* hyper, int64_t n_tensors, float* stats, int needs_norm,
                   uint64_t seed, const Device& device, bool ends) {
  const unsigned blocks = tables.blocks = device.blocks(kCodes, tables);
  const cudaStream_t queue = device.queue;
  update_kernel<Rule, kCodes><<<blocks, kThreads, 0, queue>>>(
      tables, codes, scratch, hyper, n_tensors, stats, needs_norm, seed, ends);
  return cudaGetLastError();
}

template <typename Rule>
cudaError_t launch(const Tables& tables, int64_t n_usual, const uint4* codes,
                   const Scratch& scratch, const StepHyper* hyper, int64_t n_tensors, float* stats,
                   float max_norm, int needs_norm, uint64_t seed, const Device& device) {
  cudaError_t status = cudaSuccess;
  if (needs_norm) {
    const unsigned blocks = tables.blocks;
    const cudaStream_t queue = device.queue;
    norm_kernel<<<blocks, kThreads, 0, queue>>>(tables, scratch, stats, max_norm);
    status = cudaGetLastError();
  }
  if constexpr (kHasUsual<Rule>) {
    const bool ends = n_usual == tables.n_chunks;
    if (n_usual > 0 && status == cudaSuccess)
      status = update<Rule, kUsualCodes>(part_of(tables, 0, n_usual), codes, scratch, hyper,
                                         n_tensors, stats, needs_norm, seed, device, ends);
    if (n_usual > 0 && ends) return status;
  } else if (n_usual > 0) {
    return cudaErrorInvalidValue;
  }
  if (status != cudaSuccess) return status;
  return update<Rule, kAnyCodes>(part_of(tables, n_usual, tables.n_chunks - n_usual), codes,
                                 scratch, hyper, n_tensors, stats, needs_norm, seed, device, true);
}

}  // namespace

extern "C" {

const char* fastft_cuda_error_string(int status) {
  return cudaGetErrorString(static_cast<cudaError_t>(status));
}

int fastft_optimizer_step_cuda(int device, int rule, const StepTensor* tensors, int64_t n_tensors,
                               const int32_t* chunk_tensor, const int32_t* chunk_part,
                               int64_t n_chunks, int64_t n_usual, int64_t chunk,
                               const uint32_t* codes, float* partials, uint32_t* tickets,
                               const float* hyper, float* stats, float max_norm, int needs_norm,
                               uint64_t seed, void* stream) {
  if (n_chunks > 0x7fffffff) return cudaErrorInvalidValue;  // the grid's first axis
  if (n_usual < 0 || n_usual > n_chunks) return cudaErrorInvalidValue;
  if (chunk % kStateBlock || chunk > 32 * kStateBlock) return cudaErrorInvalidValue;
  Device where{};
  where.queue = static_cast<cudaStream_t>(stream);
  cudaError_t status = cudaSetDevice(device);
  if (status == cudaSuccess)
    status = cudaDeviceGetAttribute(&where.processors, cudaDevAttrMultiProcessorCount, device);
  if (status == cudaSuccess)
    status = cudaDeviceGetAttribute(&where.major, cudaDevAttrComputeCapabilityMajor, device);
  if (status != cudaSuccess) return status;
  const Tables tables = part_of({tensors, chunk_tensor, chunk_part, chunk, 0, 1}, 0, n_chunks);
  const Scratch scratch{partials, tickets};
  const auto run = [&](auto which) {
    return launch<decltype(which)>(tables, n_usual, reinterpret_cast<const uint4*>(codes), scratch,
                                   reinterpret_cast<const StepHyper*>(hyper), n_tensors, stats,
                                   max_norm, needs_norm, seed, where);
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
