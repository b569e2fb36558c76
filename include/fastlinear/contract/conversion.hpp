// The contract of conversions between formats, which is what the driver needs.
#pragma once

#include <cstddef>

#include "fastlinear/contract/format.hpp"

namespace fastlinear {

// The first k steps of a packed panel, whose block of the first one begins at `panel` -> the same in a floating format:
// [k][nr] in fp32, [(k + 1) / 2][nr][2] in bf16 and fp16. Exact, but for what scales inside the panel make of codes.
using ConvertPanel = void (*)(const void* panel, const Layout& layout, std::ptrdiff_t k, void* out);

// The functions of one ISA and one format; null where there is nothing to do (fp32) or no use for it. `n` elements at
// any address, side by side.
struct Conversion {
  void (*widen)(const void* in, float* out, std::ptrdiff_t n);   // exact
  void (*narrow)(const float* in, void* out, std::ptrdiff_t n);  // to nearest, ties to even; NaN stays NaN
  ConvertPanel panel_to[3];                                      // fp32, bf16, fp16
  // `narrow` of `rows` rows, ld_in and ld_out elements apart.
  void (*narrow_rows)(const float* in, std::ptrdiff_t ld_in, void* out, std::ptrdiff_t ld_out, std::ptrdiff_t rows,
                      std::ptrdiff_t n);
};

}  // namespace fastlinear
