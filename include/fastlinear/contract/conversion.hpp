// The contract of conversions between formats, which is what the driver needs.
#pragma once

#include <cstddef>

namespace fastlinear {

// The functions of one ISA and one format; null for fp32, and where int8 weights have no use for them. `n` elements at
// any address, side by side.
struct Conversion {
  void (*widen)(const void* in, float* out, std::ptrdiff_t n);   // exact
  void (*narrow)(const float* in, void* out, std::ptrdiff_t n);  // to nearest, ties to even; NaN stays NaN
  // The first k steps of a packed panel -> the same panel in fp32, [k][nr]; or, of int8 where an ISA multiplies bf16,
  // in bf16, [(k + 1) / 2][nr][2]. Both exact.
  void (*widen_panel)(const void* panel, std::ptrdiff_t nr, std::ptrdiff_t k, void* out);
  void (*pair_panel)(const void* panel, std::ptrdiff_t nr, std::ptrdiff_t k, void* out) = nullptr;
};

}  // namespace fastlinear
