// Rows of activations -> what a kernel reads. For fp32 on fp32 that is the rows themselves, read in place, unless
// their stride would make them fight for the same cache sets.
#pragma once

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <new>
#include <numeric>

#include "fastlinear/kernel.hpp"

namespace fastlinear {

// Memory that one thread keeps from call to call. 64-byte aligned; only ever grows.
class Scratch {
 public:
  Scratch() = default;
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  ~Scratch() { std::free(data_); }

  float* floats(std::ptrdiff_t count) {
    const std::size_t bytes = (static_cast<std::size_t>(count) * sizeof(float) + 63) / 64 * 64;
    if (bytes > capacity_) {
      std::free(data_);
      capacity_ = 0;
      data_ = std::aligned_alloc(64, bytes);
      if (data_ == nullptr) throw std::bad_alloc();
      capacity_ = bytes;
    }
    return static_cast<float*>(data_);
  }

 private:
  void* data_ = nullptr;
  std::size_t capacity_ = 0;
};

struct Rows {
  const float* data;
  std::ptrdiff_t stride;  // elements
};

// A kernel walks mr rows side by side, one line of each in L1 at a time. An L1 way holds 4096 bytes, so rows whose
// stride shares a large power of two with 4096 land in few sets; past 6 lines a set (8 ways, two left for the panel)
// the rows evict one another and every k step goes to L2.
inline bool rows_collide(std::ptrdiff_t stride, std::ptrdiff_t mr) {
  constexpr std::ptrdiff_t kWay = 4096, kLine = 64, kWays = 6;
  const std::ptrdiff_t sets = kWay / std::max(kLine, std::gcd(stride * std::ptrdiff_t{sizeof(float)}, kWay));
  return (mr + sets - 1) / sets > kWays;
}

// Copies the rows one line further apart if they collide; at 1 to 3 % of the time of the product it repays itself
// from 14 rows on.
inline Rows prepare_rows(const Rows& x, std::ptrdiff_t rows, std::ptrdiff_t k, std::ptrdiff_t mr, Scratch& scratch) {
  if (rows < 2 || !rows_collide(x.stride, std::min(rows, mr))) return x;
  const std::ptrdiff_t stride = (k + 15) / 16 * 16 + 16;
  float* copy = scratch.floats(rows * stride);
  for (std::ptrdiff_t r = 0; r < rows; ++r)
    std::memcpy(copy + r * stride, x.data + r * x.stride, static_cast<std::size_t>(k) * sizeof(float));
  return {copy, stride};
}

}  // namespace fastlinear
