// AdamW for all tensors of a step in three launches: partial sums of squares, one block that
// prepares what is constant over a tensor, and the update. See fastft/cuda_api.h.
#include <cuda_runtime.h>

#include <cstdint>

#include "fastft/adamw.h"
#include "fastft/cuda_api.h"

namespace {

using namespace fastft;

constexpr int kThreads = 256;
constexpr int kPrepareThreads = 1024;
constexpr int kVector = 4;
constexpr int kHyper = 5;
// AdamWScalars without the gradient scale, which is the same for all tensors.
constexpr int kScalars = 8;

struct Tables {
  const int64_t* addresses;
  const int64_t* sizes;
  const int32_t* dtypes;
  const int32_t* chunk_tensor;
  const int32_t* chunk_part;
  int64_t n_tensors;
  int64_t chunk;
};

// The part of one tensor that one block works on.
struct Chunk {
  int tensor;
  int64_t start;
  int64_t size;
};

__device__ Chunk chunk_of(const Tables& tables, int64_t block) {
  const int tensor = tables.chunk_tensor[block];
  const int64_t start = static_cast<int64_t>(tables.chunk_part[block]) * tables.chunk;
  const int64_t left = tables.sizes[tensor] - start;
  return {tensor, start, left < tables.chunk ? left : tables.chunk};
}

template <typename T>
__device__ T* at(const Tables& tables, int row, const Chunk& chunk) {
  const int64_t address = tables.addresses[row * tables.n_tensors + chunk.tensor];
  return reinterpret_cast<T*>(address) + chunk.start;
}

// kVector elements in one access; a torch tensor may start anywhere, so the caller asks first.
template <typename T>
struct alignas(sizeof(T) * kVector) Pack {
  T values[kVector];
};

template <typename T>
__device__ bool is_aligned(const T* pointer) {
  return reinterpret_cast<uintptr_t>(pointer) % alignof(Pack<T>) == 0;
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

template <typename G>
__device__ float sum_of_squares(const Tables& tables, const Chunk& chunk) {
  const G* grad = at<const G>(tables, 1, chunk);
  const int64_t vectors = is_aligned(grad) ? chunk.size / kVector : 0;
  float sum = 0.0f;
  for (int64_t i = threadIdx.x; i < vectors; i += kThreads) {
    const Pack<G> pack = reinterpret_cast<const Pack<G>*>(grad)[i];
#pragma unroll
    for (int j = 0; j < kVector; ++j) {
      const float g = to_float(pack.values[j]);
      sum += g * g;
    }
  }
  for (int64_t i = vectors * kVector + threadIdx.x; i < chunk.size; i += kThreads) {
    const float g = to_float(grad[i]);
    sum += g * g;
  }
  return sum;
}

__global__ void __launch_bounds__(kThreads) norm_kernel(Tables tables, float* partials) {
  const Chunk chunk = chunk_of(tables, blockIdx.x);
  float sum;
  switch (static_cast<DType>(tables.dtypes[chunk.tensor] % 4)) {
    case DType::kFloat32:
      sum = sum_of_squares<float>(tables, chunk);
      break;
    case DType::kBFloat16:
      sum = sum_of_squares<bfloat16>(tables, chunk);
      break;
    default:
      sum = sum_of_squares<float16>(tables, chunk);
      break;
  }
  sum = block_sum<float, kThreads>(sum);
  if (threadIdx.x == 0) partials[blockIdx.x] = sum;
}

__global__ void __launch_bounds__(kPrepareThreads)
    prepare_kernel(const float* partials, int64_t n_chunks, int64_t n_tensors, const float* hyper,
                   float* steps, float* scalars, float* stats, float max_norm) {
  __shared__ float shared_norm;
  double sum = 0.0;
  for (int64_t i = threadIdx.x; i < n_chunks; i += kPrepareThreads) sum += partials[i];
  sum = block_sum<double, kPrepareThreads>(sum);
  if (threadIdx.x == 0) shared_norm = static_cast<float>(sqrt(sum));
  __syncthreads();
  const float norm = shared_norm;
  const bool finite = norm < INFINITY;  // false for NaN as well
  if (threadIdx.x == 0) {
    const float limit = max_norm > 0.0f ? max_norm / (norm + 1e-6f) : 1.0f;
    stats[0] = norm;
    stats[1] = finite ? fminf(limit, 1.0f) : 0.0f;
    if (!finite) stats[2] += 1.0f;
  }
  if (!finite) return;
  for (int64_t i = threadIdx.x; i < n_tensors; i += kPrepareThreads) {
    const float* row = hyper + i * kHyper;
    const double count = static_cast<double>(steps[i]) + 1.0;
    steps[i] = static_cast<float>(count);
    const AdamWScalars s = adamw_scalars({row[0], row[1], row[2], row[3], row[4]},
                                         pow(static_cast<double>(row[1]), count),
                                         pow(static_cast<double>(row[2]), count), 1.0f);
    float* out = scalars + i * kScalars;
    out[0] = s.beta1;
    out[1] = s.beta2;
    out[2] = s.one_minus_beta1;
    out[3] = s.one_minus_beta2;
    out[4] = s.decay;
    out[5] = s.step_size;
    out[6] = s.inv_sqrt_bias2;
    out[7] = s.eps;
  }
}

template <typename P, typename G>
__device__ void update(const Tables& tables, const Chunk& chunk, const AdamWScalars& s) {
  P* param = at<P>(tables, 0, chunk);
  const G* grad = at<const G>(tables, 1, chunk);
  float* exp_avg = at<float>(tables, 2, chunk);
  float* exp_avg_sq = at<float>(tables, 3, chunk);
  const bool aligned =
      is_aligned(param) && is_aligned(grad) && is_aligned(exp_avg) && is_aligned(exp_avg_sq);
  const int64_t vectors = aligned ? chunk.size / kVector : 0;
  for (int64_t i = threadIdx.x; i < vectors; i += kThreads) {
    Pack<P> p = reinterpret_cast<Pack<P>*>(param)[i];
    const Pack<G> g = reinterpret_cast<const Pack<G>*>(grad)[i];
    Pack<float> m = reinterpret_cast<Pack<float>*>(exp_avg)[i];
    Pack<float> v = reinterpret_cast<Pack<float>*>(exp_avg_sq)[i];
#pragma unroll
    for (int j = 0; j < kVector; ++j) {
      float value = to_float(p.values[j]);
      adamw_update(value, to_float(g.values[j]), m.values[j], v.values[j], s);
      p.values[j] = from_float<P>(value);
    }
    reinterpret_cast<Pack<P>*>(param)[i] = p;
    reinterpret_cast<Pack<float>*>(exp_avg)[i] = m;
    reinterpret_cast<Pack<float>*>(exp_avg_sq)[i] = v;
  }
  for (int64_t i = vectors * kVector + threadIdx.x; i < chunk.size; i += kThreads) {
    float value = to_float(param[i]);
    adamw_update(value, to_float(grad[i]), exp_avg[i], exp_avg_sq[i], s);
    param[i] = from_float<P>(value);
  }
}

template <typename P>
__device__ void update_for_grad(const Tables& tables, const Chunk& chunk, const AdamWScalars& s) {
  switch (static_cast<DType>(tables.dtypes[chunk.tensor] % 4)) {
    case DType::kFloat32:
      update<P, float>(tables, chunk, s);
      break;
    case DType::kBFloat16:
      update<P, bfloat16>(tables, chunk, s);
      break;
    default:
      update<P, float16>(tables, chunk, s);
      break;
  }
}

__global__ void __launch_bounds__(kThreads)
    update_kernel(Tables tables, const float* scalars, const float* stats, float sign) {
  if (!(stats[0] < INFINITY)) return;
  const Chunk chunk = chunk_of(tables, blockIdx.x);
  const float* row = scalars + static_cast<int64_t>(chunk.tensor) * kScalars;
  const AdamWScalars s{row[0], row[1], row[2], row[3],         row[4],
                       row[5], row[6], row[7], stats[1] * sign};
  switch (static_cast<DType>(tables.dtypes[chunk.tensor] / 4)) {
    case DType::kFloat32:
      update_for_grad<float>(tables, chunk, s);
      break;
    case DType::kBFloat16:
      update_for_grad<bfloat16>(tables, chunk, s);
      break;
    default:
      update_for_grad<float16>(tables, chunk, s);
      break;
  }
}

}  // namespace

extern "C" {

const char* fastft_cuda_error_string(int status) {
  return cudaGetErrorString(static_cast<cudaError_t>(status));
}

int fastft_adamw_cuda(int device, const int64_t* addresses, const int64_t* sizes,
                      const int32_t* dtypes, const int32_t* chunk_tensor, const int32_t* chunk_part,
                      int64_t n_tensors, int64_t n_chunks, int64_t chunk, float* partials,
                      float* scalars, float* steps, const float* hyper, float* stats,
                      float max_norm, int maximize, void* stream) {
  if (n_chunks > 0x7fffffff) return cudaErrorInvalidValue;  // the grid's first axis
  cudaError_t status = cudaSetDevice(device);
  if (status != cudaSuccess) return status;
  const cudaStream_t queue = static_cast<cudaStream_t>(stream);
  const Tables tables{addresses, sizes, dtypes, chunk_tensor, chunk_part, n_tensors, chunk};
  const unsigned blocks = static_cast<unsigned>(n_chunks);
  if (blocks > 0) {
    norm_kernel<<<blocks, kThreads, 0, queue>>>(tables, partials);
    if ((status = cudaGetLastError()) != cudaSuccess) return status;
  }
  prepare_kernel<<<1, kPrepareThreads, 0, queue>>>(partials, n_chunks, n_tensors, hyper, steps,
                                                   scalars, stats, max_norm);
  if ((status = cudaGetLastError()) != cudaSuccess) return status;
  if (blocks > 0) {
    update_kernel<<<blocks, kThreads, 0, queue>>>(tables, scalars, stats, maximize ? -1.0f : 1.0f);
    status = cudaGetLastError();
  }
  return status;
}
}
