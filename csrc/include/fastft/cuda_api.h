// Launchers of csrc/cuda: raw device addresses, int64 sizes and a stream in, a cudaError_t out.
// No torch, no Python and no CUDA header, so that bind.cpp and tests need none.
#pragma once

#include <cstdint>

extern "C" {

// cudaGetErrorString(status).
const char* fastft_cuda_error_string(int status);

// One AdamW step of all tensors in place: norm, clip, skip of a non-finite norm, update.
// The formula is that of fastft/adamw.h; sums are two-stage and in a fixed order.
//
//   device        index of the GPU that all addresses are on
//   addresses     int64 (4, n_tensors): params, grads, exp_avgs, exp_avg_sqs
//   sizes         int64 (n_tensors): elements
//   dtypes        int32 (n_tensors): 4 * DType of the parameter + DType of the gradient
//   chunk_tensor  int32 (n_chunks): index of the tensor a chunk belongs to
//   chunk_part    int32 (n_chunks): the chunk starts at chunk_part * chunk elements
//   partials      float32 (n_chunks), scalars float32 (n_tensors, 8): scratch
//   steps         float32 (n_tensors), incremented
//   hyper         float32 (n_tensors, 5): lr, beta1, beta2, eps, weight_decay
//   stats         float32 (3): norm and clip coefficient written, skipped steps incremented
//   max_norm      0 for no clipping
// Nothing waits for the device. n_tensors = 0 and tensors of no elements are fine.
int fastft_adamw_cuda(int device, const int64_t* addresses, const int64_t* sizes,
                      const int32_t* dtypes, const int32_t* chunk_tensor, const int32_t* chunk_part,
                      int64_t n_tensors, int64_t n_chunks, int64_t chunk, float* partials,
                      float* scalars, float* steps, const float* hyper, float* stats,
                      float max_norm, int maximize, void* stream);
}
