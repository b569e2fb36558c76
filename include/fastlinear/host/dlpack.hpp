// The part of DLPack 1.3's C exchange table that is read here (github.com/dmlc/dlpack, dlpack.h).
#pragma once

#include <cstdint>

namespace fastlinear {

struct DlDevice {
  std::int32_t device_type, device_id;  // device_type 1: CPU
};

struct DlDataType {
  std::uint8_t code, bits;  // code 2: IEEE floating point
  std::uint16_t lanes;
};

struct DlTensor {
  void* data;
  DlDevice device;
  std::int32_t ndim;
  DlDataType dtype;
  std::int64_t *shape, *strides;
  std::uint64_t byte_offset;
};

struct DlExchangeApi {
  std::uint32_t major, minor;
  void *previous, *allocate, *export_managed, *import_managed;
  int (*peek)(void* tensor, DlTensor* out);  // borrows: valid while the tensor lives
};

}  // namespace fastlinear
