// Run-time choice of the instruction set.
#pragma once

#include "kernels.h"

namespace fastft {

struct Isa {
  const char* name;
  bool (*runs_here)();
  const Kernels* kernels;
};

// Best first; the last one, "generic", runs everywhere.
extern const Isa kIsas[];
extern const int kIsaCount;

const Isa& isa();            // the best one this processor runs
bool has_native_bfloat16();  // AVX512-BF16 or AMX: 16-bit products pay

}  // namespace fastft
