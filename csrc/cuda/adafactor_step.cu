// Adafactor over all tensors in five launches, whatever their number: sums of squares by row and by
// column, new moments, the updates' squares, each tensor's size of step, the write. A tile is one
// block's; in it lanes take eight neighbours each, as many lanes a row as its columns need. See
// fastft/adafactor.h and fastft/cuda_api.h.
#include <cuda_runtime.h>

#include <cstdint>

#include "cuda/lanes.cuh"
#include "fastft/adafactor.h"
#include "fastft/cuda_api.h"

namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / 32;
constexpr int kBlocks = 2;  // of a multiprocessor: left alone, ptxas takes 64 registers and spills

// How the warps of a block lie over rows of `width` columns, at most kStateBlock: `lanes` a row, of
// whose elements this thread has `count` from `at` on. A turn of the block takes `stride` rows,
// this warp's from `first` on, this thread's `own` rows further.
struct Lanes {
  int lanes, at, count, first, own, stride;
};

__device__ Lanes lanes_over(int64_t width) {
  Lanes l{};
  l.lanes = 1;
  while (l.lanes * kLane < width) l.lanes *= 2;
  const int lane = static_cast<int>(threadIdx.x) % 32, rows = 32 / l.lanes;
  l.at = lane % l.lanes * kLane;
  const int left = static_cast<int>(width) - l.at;
  l.count = left < 0 ? 0 : (left < kLane ? left : kLane);
  l.first = static_cast<int>(threadIdx.x) / 32 * rows;
  l.own = lane / l.lanes;
  l.stride = kWarps * rows;
  return l;
}

// Calls each(row, start, count) for this thread's eights from column `col` on; all lanes of a warp
// take every turn, those past the last row with count 0.
template <typename Each>
__device__ void over_rows(const FactoredTensor& t, const FactoredTile& f, const Lanes& l,
                          int64_t col, const Each& each) {
  for (int64_t base = f.row0 + l.first; base < f.row1; base += l.stride) {
    const int64_t row = base + l.own;
    each(row, (f.matrix * t.rows + row) * t.cols + col + l.at, row < f.row1 ? l.count : 0);
  }
}

__device__ float squares_of(const float (&values)[kLane]) {
  float sum = 0.0f;
#pragma unroll
  for (int i = 0; i < kLane; ++i) sum += values[i] * values[i];
  return sum;
}

// Elements past `count` are zero: load gives none of them.
__device__ void load_gradient(float (&g)[kLane], const FactoredTensor& t, int64_t start,
                              int count) {
  load_as(g, grad_dtype(t.step), t.step.grad, start, count);
}

__device__ void sum_tile(const FactoredCall& call, float& gradients, float& parameters) {
  __shared__ float columns[kWarps][kStateBlock];
  const FactoredTensor t = call.tensors[call.tile_tensor[blockIdx.x]];
  const FactoredTile f = tile_of(t, blockIdx.x);
  for (int64_t col = f.col0; col < f.col1; col += kStateBlock) {
    const int64_t width = f.col1 - col < kStateBlock ? f.col1 - col : kStateBlock;
    const Lanes l = lanes_over(width);
    float* rows = call.scratch + row_sum_at(t, f.matrix, col / kStateBlock);
    float down[kLane] = {};
    over_rows(t, f, l, col, [&](int64_t row, int64_t start, int count) {
      float g[kLane], p[kLane];
      load_gradient(g, t, start, count);
      load_param(p, t.step, start, count);
#pragma unroll
      for (int i = 0; i < kLane; ++i) down[i] += g[i] * g[i];
      float sum = squares_of(g);
      gradients += sum;
      parameters += squares_of(p);
      for (int offset = l.lanes / 2; offset > 0; offset /= 2)
        sum += __shfl_xor_sync(0xffffffffu, sum, offset);
      if (l.at == 0 && row < f.row1) rows[row] = sum;
    });
#pragma unroll
    for (int i = 0; i < kLane; ++i) {
      for (int offset = l.lanes; offset < 32; offset *= 2)
        down[i] += __shfl_xor_sync(0xffffffffu, down[i], offset);
      if (static_cast<int>(threadIdx.x) % 32 < l.lanes)
        columns[threadIdx.x / 32][l.at + i] = down[i];
    }
    __syncthreads();
    float* to = call.scratch + column_sum_at(t, f.matrix, f.row_tile) + col;
    for (int64_t i = threadIdx.x; i < width; i += kThreads) {
      float sum = 0.0f;
      for (int warp = 0; warp < kWarps; ++warp) sum += columns[warp][i];
      to[i] = sum;
    }
    __syncthreads();
  }
}

__global__ void __launch_bounds__(kThreads, kBlocks)
    sums_kernel(FactoredCall call, uint32_t* ticket) {
  float gradients = 0.0f, parameters = 0.0f;
  if (blockIdx.x < call.tiles) sum_tile(call, gradients, parameters);
  gradients = block_sum<float, kThreads>(gradients);
  if (threadIdx.x == 0 && blockIdx.x < call.tiles) call.partials[blockIdx.x] = gradients;
  __syncthreads();
  parameters = block_sum<float, kThreads>(parameters);
  if (threadIdx.x == 0 && blockIdx.x < call.tiles)
    call.partials[call.tiles + blockIdx.x] = parameters;
  if (!is_last_block(ticket, call.tiles > 0 ? static_cast<unsigned>(call.tiles) : 1)) return;
  if (call.needs_norm)
    sum_and_decide<kThreads>(call.partials, call.tiles, call.stats, call.max_norm);
  else if (threadIdx.x == 0)
    note_decision(call.stats, decision_of(call.stats, 0));
}

__global__ void __launch_bounds__(kThreads, kBlocks) moments_kernel(FactoredCall call) {
  const StepDecision d = decision_of(call.stats, 1);
  if (!d.run) return;
  const int64_t index = call.line_tensor[blockIdx.x];
  const FactoredTensor t = call.tensors[index];
  const FactoredHyper h = reinterpret_cast<const FactoredHyper*>(call.hyper)[index];
  const FactoredLines f = lines_of(t, blockIdx.x);
  __shared__ float shared_rate;
  if (threadIdx.x == 0)
    shared_rate = factored_rate(h, *reinterpret_cast<const float*>(t.step.step) + 1.0f);
  __syncthreads();
  const float rate = shared_rate, scale = d.coefficient * call.stats[3];
  const int64_t size = f.is_row ? t.rows : t.cols, across = f.is_row ? t.cols : t.rows;
  const int64_t parts = parts_of(across, f.is_row ? kStateBlock : t.tile_rows);
  const float* sums =
      call.scratch + (f.is_row ? row_sum_at(t, f.matrix, 0) : column_sum_at(t, f.matrix, 0));
  float* moments = reinterpret_cast<float*>(f.is_row ? t.row : t.column) + f.matrix * size;
  const float mean = scale * scale / static_cast<float>(across);
  float own = 0.0f;
  for (int64_t i = f.first + threadIdx.x; i < f.end; i += kThreads) {
    float total = 0.0f;
    for (int64_t part = 0; part < parts; ++part) total += sums[part * size + i];
    const float moment = blend(moments[i], mean * total, rate);
    moments[i] = moment;
    own += moment;
  }
  own = block_sum<float, kThreads>(own);
  if (f.is_row && threadIdx.x == 0)
    call.scratch[t.row_means + f.matrix * parts_of(t.rows, kLines) + f.item] = own;
}

// The sum of squares of this thread's updates; with kWrite the parameters are written instead.
template <bool kWrite>
__device__ float update_tile(const FactoredCall& call, float scale) {
  const int64_t index = call.tile_tensor[blockIdx.x];
  const FactoredTensor t = call.tensors[index];
  const FactoredHyper h = reinterpret_cast<const FactoredHyper*>(call.hyper)[index];
  const FactoredTile f = tile_of(t, blockIdx.x);
  const float eps1 = first_eps(h, param_dtype(t.step));
  const float most = inverse_root(least_variance(eps1));
  __shared__ float shared_mean;
  if (threadIdx.x == 0) shared_mean = mean_of_rows(call, t, f.matrix);
  __syncthreads();
  const float mean = shared_mean;
  const float* moments = reinterpret_cast<const float*>(t.row) + f.matrix * t.rows;
  const float size = kWrite ? call.partials[3 * call.tiles + index] : 0.0f;
  const float kept = 1.0f - h.lr * h.weight_decay, signed_scale = h.sign * scale;
  const Random random{call.seed,
                      static_cast<uint32_t>(*reinterpret_cast<const float*>(t.step.step)),
                      static_cast<uint32_t>(t.step.key)};
  float squares = 0.0f;
  for (int64_t col = f.col0; col < f.col1; col += kStateBlock) {
    const int64_t width = f.col1 - col < kStateBlock ? f.col1 - col : kStateBlock;
    const Lanes l = lanes_over(width);
    float column[kLane];
    const float* from = reinterpret_cast<const float*>(t.column) + f.matrix * t.cols + col;
    load(column, from + l.at, l.count);
#pragma unroll
    for (int i = 0; i < kLane; ++i) column[i] = inverse_root(column[i]);
    over_rows(t, f, l, col, [&](int64_t row, int64_t start, int count) {
      if (count == 0) return;
      const float own = t.row ? inverse_root(row_share(moments[row], mean, eps1)) : 1.0f;
      float g[kLane], u[kLane];
      load_gradient(g, t, start, count);
#pragma unroll
      for (int i = 0; i < kLane; ++i)
        u[i] = factored_update(signed_scale * g[i], own, column[i], most);
      if (!kWrite) {
        squares += squares_of(u);
        return;
      }
      float p[kLane];
      load_param(p, t.step, start, count);
#pragma unroll
      for (int i = 0; i < kLane; ++i) p[i] = p[i] * kept - size * u[i];
      store_param(p, t.step, start, count,
                  [&](const float (&values)[kLane], int64_t address, uint32_t words) {
                    store_stochastic_anywhere(values, address, start, count, random,
                                              static_cast<uint64_t>(t.step.offset + start), words);
                  });
    });
  }
  return squares;
}

__global__ void __launch_bounds__(kThreads, kBlocks) squares_kernel(FactoredCall call) {
  const StepDecision d = decision_of(call.stats, 1);
  if (!d.run) return;
  const float sum =
      block_sum<float, kThreads>(update_tile<false>(call, d.coefficient * call.stats[3]));
  if (threadIdx.x == 0) call.partials[2 * call.tiles + blockIdx.x] = sum;
}

// A tensor's size of step; its step is counted.
__global__ void __launch_bounds__(kThreads, kBlocks) sizes_kernel(FactoredCall call) {
  if (!decision_of(call.stats, 1).run) return;
  const int64_t index = blockIdx.x;
  const FactoredTensor t = call.tensors[index];
  const int64_t end = index + 1 < call.count ? call.tensors[index + 1].first_tile : call.tiles;
  double p = 0.0, u = 0.0;
  for (int64_t i = t.first_tile + threadIdx.x; i < end; i += kThreads) {
    p += call.partials[call.tiles + i];
    u += call.partials[2 * call.tiles + i];
  }
  p = block_sum<double, kThreads>(p);
  __syncthreads();
  u = block_sum<double, kThreads>(u);
  if (threadIdx.x != 0) return;
  float* count = reinterpret_cast<float*>(t.step.step);
  *count += 1.0f;
  const FactoredHyper h = reinterpret_cast<const FactoredHyper*>(call.hyper)[index];
  call.partials[3 * call.tiles + index] = factored_size(h, p, u, t.step.numel, *count);
}

__global__ void __launch_bounds__(kThreads, kBlocks) write_kernel(FactoredCall call) {
  const StepDecision d = decision_of(call.stats, 1);
  if (d.run) update_tile<true>(call, d.coefficient * call.stats[3]);
}

}  // namespace

extern "C" int fastft_adafactor_step_cuda(int device, const FactoredCall* given, uint32_t* ticket,
                                          void* stream) {
  const FactoredCall call = *given;
  constexpr int64_t kMost = 0x7fffffff;  // the grid's first axis
  if (call.tiles > kMost || call.lines > kMost || call.count > kMost) return cudaErrorInvalidValue;
  cudaError_t status = cudaSetDevice(device);
  if (status != cudaSuccess) return status;
  const cudaStream_t queue = static_cast<cudaStream_t>(stream);
  const unsigned tiles = static_cast<unsigned>(call.tiles), first = tiles > 0 ? tiles : 1;
  const unsigned lines = static_cast<unsigned>(call.lines);
  const unsigned tensors = static_cast<unsigned>(call.count);
  sums_kernel<<<first, kThreads, 0, queue>>>(call, ticket);
  if (lines > 0) moments_kernel<<<lines, kThreads, 0, queue>>>(call);
  if (tiles > 0) squares_kernel<<<tiles, kThreads, 0, queue>>>(call);
  if (tensors > 0) sizes_kernel<<<tensors, kThreads, 0, queue>>>(call);
  if (tiles > 0) write_kernel<<<tiles, kThreads, 0, queue>>>(call);
  return cudaGetLastError();
}
