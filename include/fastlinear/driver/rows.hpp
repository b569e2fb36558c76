// Rows of activations -> what a kernel reads: the rows themselves, read in place, unless their stride would make them
// fight for the same cache sets, or the kernel takes more than there are; or widened to fp32, once a row block and
// thread, not once a panel.
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
  bool filled = false;  // zeros follow where the kernel takes more rows, or more of each row, than there are

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

// Elements from one copied row to the next: whole lines, one apart, that do not collide. No k_step is longer than a
// line.
inline std::ptrdiff_t scratch_stride(std::ptrdiff_t k, const Kernel& kernel) {
  const std::ptrdiff_t element = element_bytes(kernel.rows), line = 64 / element;
  const std::ptrdiff_t stride = (k + line - 1) / line * line + line;
  return rows_collide(stride * element, kernel.mr) ? stride + line : stride;
}

// The first `rows` rows of x in the form that the kernel reads. Widens them if that is another format; fills them up to
// the kernel's steps if these are more; or copies them one line further apart if they collide: at 1 to 3 % of the time
// of the product a copy repays itself from 14 rows on. A kernel of whole lines of K uses each of them up at once.
inline Rows prepare_rows(const Rows& x, std::ptrdiff_t rows, std::ptrdiff_t k, const Kernel& kernel,
                         const Conversion& conversion, Scratch& scratch) {
  const std::ptrdiff_t element = element_bytes(kernel.rows);
  const bool whole = x.filled || (rows % kernel.row_step == 0 && k % kernel.k_step == 0);
  const bool collide = kernel.k_step == 1 && rows > 1 && rows_collide(x.stride * element, std::min(rows, kernel.mr));
  if (x.format == kernel.rows && whole && !collide) return x;
  const std::ptrdiff_t stride = scratch_stride(k, kernel), filled_rows = round_up(rows, kernel.row_step);
  const auto row_bytes = static_cast<std::size_t>(k * element);
  const auto more = static_cast<std::size_t>(round_up(k, kernel.k_step) * element) - row_bytes;
  char* copy = static_cast<char*>(scratch.bytes(filled_rows * stride * element));
  for (std::ptrdiff_t r = 0; r < filled_rows; ++r) {
    char* to = copy + r * stride * element;
    if (r >= rows)
      std::memset(to, 0, row_bytes);
    else if (x.format == kernel.rows)
      std::memcpy(to, x.at(r, 0), row_bytes);
    else
      conversion.widen(x.at(r, 0), reinterpret_cast<float*>(to), k);
    std::memset(to + row_bytes, 0, more);
  }
  return {copy, stride, kernel.rows, true};
}

}  // namespace fastlinear
