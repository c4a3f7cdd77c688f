// The part of DLPack's published layout (version 0, dmlc/dlpack) that hands over a CPU tensor.
#pragma once

#include <cstdint>

namespace fastft {
namespace dlpack {

struct Device {
  int32_t type;  // 1: CPU
  int32_t id;
};

struct DataType {
  uint8_t code;  // 2: float, 4: bfloat16
  uint8_t bits;
  uint16_t lanes;
};

struct Tensor {
  void* data;
  Device device;
  int32_t ndim;
  DataType dtype;
  int64_t* shape;
  int64_t* strides;
  uint64_t byte_offset;
};

struct ManagedTensor {
  Tensor tensor;
  void* manager;
  void (*deleter)(ManagedTensor*);
};

}  // namespace dlpack
}  // namespace fastft
