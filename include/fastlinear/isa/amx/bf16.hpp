// bf16 x bf16 by tdpbf16ps: a product adds 32 k to the sums of 16 rows and 16 columns.
//
// It keeps two sums a column, of even and of odd k, from zero on, adds them and then the tile: each rounded to nearest
// even, denormals flushed, of operands and of results, whatever MXCSR says.
#pragma once

#include "fastlinear/formats/bf16.hpp"
#include "fastlinear/isa/amx/tiles.hpp"

namespace fastlinear::amx {

struct Bf16Products {
  static constexpr Format rows = Format::bf16, accumulate = Format::fp32;
  static constexpr Layout layout{Format::bf16, 32, Bf16::kr};
  static constexpr std::ptrdiff_t row_bytes = 2;  // of an element

  template <int C, int A, int B>
  [[gnu::always_inline]] static void multiply_add() {
    asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(C), "i"(A), "i"(B));
  }
};

inline constexpr Kernel kBf16Kernels[] = {
    row<Bf16Products, 32, 1>("bf16/amx/32x32", kIsa),
    row<Bf16Products, 16, 2>("bf16/amx/16x64", kIsa),
};

}  // namespace fastlinear::amx
