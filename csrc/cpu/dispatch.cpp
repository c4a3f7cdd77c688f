#include "dispatch.h"

namespace fastft {

extern const Kernels kernels_generic;
#if defined(FASTFT_X86)
extern const Kernels kernels_avx2;
extern const Kernels kernels_avx512;
extern const Kernels kernels_avx512bf16;

static bool has_avx2() {
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
         __builtin_cpu_supports("f16c");
}

static bool has_avx512() {
  return has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
}

static bool has_avx512bf16() { return has_avx512() && __builtin_cpu_supports("avx512bf16"); }
#endif

static bool always() { return true; }

const Isa kIsas[] = {
#if defined(FASTFT_X86)
    {"avx512bf16", has_avx512bf16, &kernels_avx512bf16},
    {"avx512", has_avx512, &kernels_avx512},
    {"avx2", has_avx2, &kernels_avx2},
#endif
    {"generic", always, &kernels_generic},
};
const int kIsaCount = sizeof(kIsas) / sizeof(kIsas[0]);

const Isa& isa() {
  static const Isa& best = []() -> const Isa& {
    for (const Isa& candidate : kIsas)
      if (candidate.runs_here()) return candidate;
    return kIsas[kIsaCount - 1];
  }();
  return best;
}

bool has_native_bfloat16() {
#if defined(FASTFT_X86)
  return has_avx512bf16();
#else
  return false;
#endif
}

}  // namespace fastft
