// Enough of CUDA to run a kernel on the CPU: a block is a set of threads, a barrier is a barrier.
// Only what csrc/cuda uses; a kernel that needs more extends it. Blocks run one after another.
#pragma once

#include <algorithm>
#include <atomic>
#include <barrier>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <memory>
#include <thread>
#include <vector>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __shared__ static
#define __launch_bounds__(...)

struct Index {
  unsigned x = 0;
};
inline thread_local Index threadIdx;
inline Index blockIdx;

namespace host {

struct Warp {
  std::barrier<> barrier{32};
  double lanes[32];
};
inline std::unique_ptr<std::barrier<>> block;
inline std::vector<std::unique_ptr<Warp>> warps;

// kernel<<<blocks, threads, 0, stream>>>(args...)
template <typename Kernel, typename... Args>
void launch(Kernel kernel, unsigned blocks, unsigned threads, Args... args) {
  for (unsigned b = 0; b < blocks; ++b) {
    blockIdx.x = b;
    block = std::make_unique<std::barrier<>>(threads);
    warps.clear();
    for (unsigned w = 0; w < threads / 32; ++w) warps.push_back(std::make_unique<Warp>());
    std::vector<std::thread> pool;
    for (unsigned t = 0; t < threads; ++t)
      pool.emplace_back([=] {
        threadIdx.x = t;
        kernel(args...);
        block->arrive_and_drop();
      });
    for (auto& thread : pool) thread.join();
  }
}

}  // namespace host

inline void __syncthreads() { host::block->arrive_and_wait(); }

template <typename T>
T __shfl_down_sync(unsigned, T value, int offset) {
  host::Warp& warp = *host::warps[threadIdx.x / 32];
  const unsigned lane = threadIdx.x % 32;
  warp.lanes[lane] = static_cast<double>(value);
  warp.barrier.arrive_and_wait();
  const T other = lane + offset < 32 ? static_cast<T>(warp.lanes[lane + offset]) : value;
  warp.barrier.arrive_and_wait();
  return other;
}

template <typename T>
T __shfl_xor_sync(unsigned, T value, int mask) {
  host::Warp& warp = *host::warps[threadIdx.x / 32];
  const unsigned lane = threadIdx.x % 32;
  warp.lanes[lane] = static_cast<double>(value);
  warp.barrier.arrive_and_wait();
  const T other = static_cast<T>(warp.lanes[lane ^ static_cast<unsigned>(mask)]);
  warp.barrier.arrive_and_wait();
  return other;
}

template <typename T>
T __shfl_sync(unsigned, T value, int from) {
  return __shfl_xor_sync(0, value, static_cast<int>(threadIdx.x % 32) ^ from);
}

inline unsigned __reduce_max_sync(unsigned, unsigned value) {
  for (int offset = 16; offset > 0; offset /= 2)
    value = std::max(value, __shfl_xor_sync(0, value, offset));
  return value;
}

inline void __threadfence() { std::atomic_thread_fence(std::memory_order_seq_cst); }
inline unsigned atomicAdd(unsigned* at, unsigned value) {
  return std::atomic_ref<unsigned>(*at).fetch_add(value);
}

inline void __syncwarp() { host::warps[threadIdx.x / 32]->barrier.arrive_and_wait(); }

template <typename T>
T __ldcs(const T* from) {
  return *from;
}
template <typename T>
void __stcs(T* to, T value) {
  *to = value;
}

struct uint2 {
  unsigned x, y;
};
struct uint4 {
  unsigned x, y, z, w;
};
inline unsigned __byte_perm(unsigned low, unsigned high, unsigned select) {
  const uint64_t both = static_cast<uint64_t>(high) << 32 | low;
  unsigned out = 0;
  for (int i = 0; i < 4; ++i)
    out |= static_cast<unsigned>(both >> (8 * (select >> (4 * i) & 7)) & 0xff) << (8 * i);
  return out;
}

using cudaStream_t = void*;
enum cudaError_t { cudaSuccess = 0, cudaErrorInvalidValue = 1 };
inline const char* cudaGetErrorString(cudaError_t) { return "emulated"; }
inline cudaError_t cudaGetLastError() { return cudaSuccess; }
inline cudaError_t cudaSetDevice(int) { return cudaSuccess; }

// Fewer blocks than chunks: some take several.
enum { cudaDevAttrMultiProcessorCount, cudaDevAttrComputeCapabilityMajor };
inline cudaError_t cudaDeviceGetAttribute(int* value, int, int) {
  *value = 1;
  return cudaSuccess;
}
