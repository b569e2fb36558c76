// fp16 x fp16 by tdpfp16ps, of AMX-FP16: a product adds 32 k to the fp32 sums of 16 rows and 16 columns, rounding as
// bf16.hpp says. Denormals of fp16 are normal numbers of fp32 and count.
//
// Panels of fp16 hold one k after the other; the driver lays two side by side, once for all row tiles, in some 2 cycles
// a vector. A panel that every row tile had to itself would not repay that, but few rows are not for tiles anyway.
#pragma once

#include "fastlinear/formats/fp16.hpp"
#include "fastlinear/isa/amx/tiles.hpp"

namespace fastlinear::amx_fp16 {

extern const Isa kIsa;

struct HalfProducts {
  static constexpr Format rows = Format::fp16, accumulate = Format::fp32;
  static constexpr Layout layout{Format::fp16, 32, 2};
  static constexpr std::ptrdiff_t row_bytes = 2;  // of an element

  // In bytes, since GCC 12 and older assemblers do not know it: VEX with the complement of B, then C and A in ModRM.
  template <int C, int A, int B>
  [[gnu::always_inline]] static void multiply_add() {
    asm volatile(".byte 0xc4, 0xe2, %c0, 0x5c, %c1" ::"i"((~B & 15) << 3 | 3), "i"(0xc0 | C << 3 | A));
  }
};

inline constexpr Kernel kFp16Kernels[] = {
    amx::row<HalfProducts, 32, 1>("fp16/amx_fp16/32x32", kIsa),
    amx::row<HalfProducts, 16, 2>("fp16/amx_fp16/16x64", kIsa),
};

}  // namespace fastlinear::amx_fp16
