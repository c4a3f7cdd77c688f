// Large blocks of memory that are handed out again instead of being returned to the system.
#pragma once

#include <cstddef>
#include <cstdint>

#include "fastft/dlpack.h"

namespace fastft {

struct PoolStats {
  size_t live, peak, mapped;  // bytes handed out, the most there were, and those held
};

// A dense tensor of the pool's memory, uninitialised; its deleter gives the block back. Null where
// there is no memory.
dlpack::ManagedTensor* pool_tensor(const int64_t* shape, const int64_t* strides, int ndim,
                                   dlpack::DataType dtype);
PoolStats pool_stats();
// Returns idle blocks, and what the C library holds, to the system, and forgets the peak.
void pool_trim();

}  // namespace fastft
