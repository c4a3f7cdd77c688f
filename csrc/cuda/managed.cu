// Managed memory for torch's pluggable allocator (torch.cuda.memory.CUDAPluggableAllocator, which
// finds these two by name in the module's file): states that the driver pages to the host.
#include <cuda_runtime.h>

#include <cstddef>
#include <cstdio>

#if defined(__GNUC__)
#define FASTFT_EXPORT __attribute__((visibility("default")))
#else
#define FASTFT_EXPORT
#endif

extern "C" {

// nullptr where there is no more: torch raises its own out-of-memory error.
FASTFT_EXPORT void* fastft_managed_malloc(std::ptrdiff_t size, int device, void* /*stream*/) {
  void* memory = nullptr;
  cudaError_t status = cudaSetDevice(device);
  if (status == cudaSuccess) {
    status = cudaMallocManaged(&memory, static_cast<std::size_t>(size), cudaMemAttachGlobal);
  }
  if (status != cudaSuccess) {
    std::fprintf(stderr, "fastft: %td bytes of managed memory: %s\n", size,
                 cudaGetErrorString(status));
    cudaGetLastError();  // or the next launch would report it
    return nullptr;
  }
  return memory;
}

FASTFT_EXPORT void fastft_managed_free(void* memory, std::ptrdiff_t /*size*/, int /*device*/,
                                       void* /*stream*/) {
  if (memory != nullptr) cudaFree(memory);
}
}
