// Launchers of csrc/cuda: raw device addresses, int64 sizes and a stream in, a cudaError_t out.
// No torch, no Python and no CUDA header, so that bind.cpp and tests need none.
#pragma once

#include <cstdint>

namespace fastft {
struct StepTensor;
struct FactoredCall;
}  // namespace fastft

extern "C" {

// cudaGetErrorString(status).
const char* fastft_cuda_error_string(int status);

// One step of an optimizer over all tensors, in place: norm, clip, skip, update. The formulas are
// those of fastft/optimizer.h; sums are two-stage and in a fixed order. All addresses are the
// GPU's.
//
//   device        index of the GPU
//   rule          an OptimizerRule, the same for all tensors
//   tensors       (n_tensors) rows
//   chunk_tensor  int32 (n_chunks): index of the tensor a chunk belongs to
//   chunk_part    int32 (n_chunks): the chunk starts at chunk_part * chunk elements
//   n_usual       of so many chunks, the first, the tensors' codes are kUsualCodes
//   chunk         a multiple of kStateBlock, at most 32 of them
//   codes         uint32 (kDynamic8Words) of dynamic8_words, on 16 bytes; null without 8-bit states
//   partials      float32 (n_chunks, at least 1): scratch
//   tickets       uint32 (2): zero before the call and after it
//   hyper         float32 (n_tensors, kHyperColumns)
//   stats         float32 (6): norm and clip coefficient written, skipped steps incremented, 1 over
//                 the loss scale and found_inf read, whether the step runs written
//   max_norm      0 for no clipping
//   needs_norm    0: gradients are not summed, and only found_inf can skip the step
// Nothing waits for the device. n_tensors = 0 and tensors of no elements are fine.
int fastft_optimizer_step_cuda(int device, int rule, const fastft::StepTensor* tensors,
                               int64_t n_tensors, const int32_t* chunk_tensor,
                               const int32_t* chunk_part, int64_t n_chunks, int64_t n_usual,
                               int64_t chunk, const uint32_t* codes, float* partials,
                               uint32_t* tickets, const float* hyper, float* stats, float max_norm,
                               int needs_norm, uint64_t seed, void* stream);

// One step of Adafactor over all tensors, in place: norm, clip, skip, moments, update. The formulas
// and the call are those of fastft/adafactor.h; `call` itself is the host's. ticket: uint32 (1),
// zero before the call and after it. Sums are in a fixed order, and nothing waits for the device.
int fastft_adafactor_step_cuda(int device, const fastft::FactoredCall* call, uint32_t* ticket,
                               void* stream);
}
