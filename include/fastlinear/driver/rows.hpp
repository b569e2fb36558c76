// Rows of activations -> what a kernel reads: the rows themselves, read in place, unless their stride would make them
// fight for the same cache sets; or widened to fp32, once a row block and thread, not once a panel.
#pragma once

#include <algorithm>
#include <cstring>
#include <numeric>

#include "fastlinear/contract/conversion.hpp"
#include "fastlinear/contract/kernel.hpp"
#include "fastlinear/host/memory.hpp"

namespace fastlinear {

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
