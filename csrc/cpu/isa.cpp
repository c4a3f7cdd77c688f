// All CPU kernels for one instruction set. setup.py compiles this file once per set with
// -DFASTFT_ISA=<name> and that set's flags. The loops are plain C++ that the compiler vectorises:
// every instruction set runs the same source, so testing one tests the arithmetic of all.
// No std:: templates here: their instances would be shared between instruction sets.
#ifndef FASTFT_ISA
#error "compile with -DFASTFT_ISA=<instruction set>"
#endif

#include <cstdint>
#include <cstring>
#include <type_traits>
#if defined(_OPENMP)
#include <omp.h>
#endif
#if defined(__AVX512F__) && defined(__GNUC__) && !defined(__clang__)
// GCC 12 warns of its own intrinsics' undefined operands (its bug 105593).
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#pragma GCC diagnostic ignored "-Wuninitialized"
#endif
#if defined(__AVX512F__)
#include <immintrin.h>  // for what no compiler emits by itself; see thin.inc, optimizer_avx512.inc
#endif

#include "fastft/adafactor.h"
#include "fastft/dynamic8.h"
#include "fastft/glu.h"
#include "fastft/optimizer.h"
#include "fastft/philox.h"
#include "kernels.h"

#define FASTFT_CONCAT_(a, b) a##b
#define FASTFT_CONCAT(a, b) FASTFT_CONCAT_(a, b)

namespace fastft {
inline namespace FASTFT_ISA {

template <typename T>
struct Scalar {
  using type = T;
};

// Calls `run` with the Scalar of a DType code.
template <typename F>
static inline void by_dtype(int dtype, const F& run) {
  switch (static_cast<DType>(dtype)) {
    case DType::kFloat32:
      return run(Scalar<float>());
    case DType::kBFloat16:
      return run(Scalar<bfloat16>());
    case DType::kFloat16:
      return run(Scalar<float16>());
  }
}

static inline int64_t thread_index() {
#if defined(_OPENMP)
  return omp_get_thread_num();
#else
  return 0;
#endif
}

#include "attention.inc"
#include "cross_entropy.inc"
#include "divergence.inc"
#include "dropout.inc"
#include "embedding.inc"
#include "glu.inc"
#include "layer_norm.inc"
#include "lora.inc"
#include "dora_scale.inc"
#include "optimizer_step.inc"
#include "adafactor.inc"
#include "rms_norm.inc"
#include "rope.inc"
#include "thin_tiles.inc"
#include "thin.inc"
#include "product_tiles.inc"
#include "product.inc"
#include "deep_product.inc"
#include "attention_blocks.inc"
#include "attention_fused.inc"

}  // namespace FASTFT_ISA

extern const Kernels FASTFT_CONCAT(kernels_, FASTFT_ISA);
const Kernels FASTFT_CONCAT(kernels_, FASTFT_ISA) = {
    dropout_mask,
    dropout_apply,
    dropout_add,
    lora_dx,
    lora_da,
    cross_entropy,
    divergence,
    attention_softmax,
    attention_gradient,
    attention_extent,
    glu_forward,
    glu_backward,
    rms_norm_forward,
    rms_norm_backward,
    rope,
    layer_norm_forward,
    layer_norm_backward,
    dora_scale_forward,
    dora_scale_backward,
    dora_d_scale,
    dora_norm,
    embedding_backward,
    optimizer_step,
    adafactor_step,
    thin_scratch,
    thin_shrink,
    thin_expand,
    thin_pair,
    thin_back,
    product_scratch,
    product,
    deep_product_scratch,
    deep_product,
    attention_prefixes,
    attention_scratch,
    attention_fused,
};

}  // namespace fastft
