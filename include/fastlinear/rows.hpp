// Rows of activations -> what a kernel reads: the rows themselves, read in place, unless their stride would make them
// fight for the same cache sets; or widened to fp32, once a row block and thread, not once a panel.
#pragma once

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <new>
#include <numeric>

#include "fastlinear/conversion.hpp"
#include "fastlinear/kernel.hpp"

namespace fastlinear {

// Memory that one thread keeps from call to call. 64-byte aligned; only ever grows.
class Scratch {
 public:
  Scratch() = default;
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  ~Scratch() { std::free(data_); }

  float* floats(std::ptrdiff_t count) { return static_cast<float*>(bytes(count * std::ptrdiff_t{sizeof(float)})); }

  void* bytes(std::ptrdiff_t count) {
    const std::size_t bytes = (static_cast<std::size_t>(count) + 63) / 64 * 64;
    if (bytes > capacity_) {
      std::free(data_);
      capacity_ = 0;
      data_ = std::aligned_alloc(64, bytes);
      if (data_ == nullptr) throw std::bad_alloc();
      capacity_ = bytes;
    }
    return data_;
  }

 private:
  void* data_ = nullptr;
  std::size_t capacity_ = 0;
};

struct Rows {
  const char* data;
  std::ptrdiff_t stride;  // elements
  Format format;

  const char* at(std::ptrdiff_t row, std::ptrdiff_t k) const {
    return data + (row * stride + k) * element_bytes(format);
  }
};

// A kernel walks mr rows side by side, one line of each in L1 at a time. An L1 way holds 4096 bytes, so rows whose
// stride (in bytes) shares a large power of two with 4096 land in few sets; past 6 lines a set (8 ways, two left for
// the panel) the rows evict one another and every k step goes to L2.
inline bool rows_collide(std::ptrdiff_t stride, std::ptrdiff_t mr) {
  constexpr std::ptrdiff_t kWay = 4096, kLine = 64, kWays = 6;
  const std::ptrdiff_t sets = kWay / std::max(kLine, std::gcd(stride, kWay));
  return (mr + sets - 1) / sets > kWays;
}

// Elements from one copied row to the next: whole lines, one apart, that do not collide.
inline std::ptrdiff_t scratch_stride(std::ptrdiff_t k, const Kernel& kernel) {
  const std::ptrdiff_t element = element_bytes(kernel.rows), line = 64 / element;
  const std::ptrdiff_t stride = (k + line - 1) / line * line + line;
  return rows_collide(stride * element, kernel.mr) ? stride + line : stride;
}

// The first `rows` rows of x in the form that the kernel reads. Widens them if that is another format, or copies them
// one line further apart if they collide; at 1 to 3 % of the time of the product a copy repays itself from 14 rows on.
inline Rows prepare_rows(const Rows& x, std::ptrdiff_t rows, std::ptrdiff_t k, const Kernel& kernel,
                         const Conversion& conversion, Scratch& scratch) {
  const std::ptrdiff_t element = element_bytes(kernel.rows);
  if (x.format == kernel.rows && (rows < 2 || !rows_collide(x.stride * element, std::min(rows, kernel.mr)))) return x;
  const std::ptrdiff_t stride = scratch_stride(k, kernel);
  char* copy = static_cast<char*>(scratch.bytes(rows * stride * element));
  for (std::ptrdiff_t r = 0; r < rows; ++r) {
    char* to = copy + r * stride * element;
    if (x.format == kernel.rows)
      std::memcpy(to, x.at(r, 0), static_cast<std::size_t>(k * element));
    else
      conversion.widen(x.at(r, 0), reinterpret_cast<float*>(to), k);
  }
  return {copy, stride, kernel.rows};
}

}  // namespace fastlinear
