// int8 x int8 by tdpbusd: a product adds 64 k, of u8 rows and s8 weights, to the int32 sums of 16 rows and 16 columns,
// exactly.
#pragma once

#include "fastlinear/formats/int8.hpp"
#include "fastlinear/isa/amx/tiles.hpp"

namespace fastlinear::amx {

struct ByteProducts {
  static constexpr Format rows = Format::uint8, accumulate = Format::int32;
  static constexpr Layout layout{Format::int8, 32, Int8::dot_kr};
  static constexpr std::ptrdiff_t row_bytes = 1;  // of an element

  template <int C, int A, int B>
  [[gnu::always_inline]] static void multiply_add() {
    asm volatile("tdpbusd %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(C), "i"(A), "i"(B));
  }
};

inline constexpr Kernel kInt8Kernels[] = {
    row<ByteProducts, 32, 1>("int8/amx/32x32", kIsa),
    row<ByteProducts, 16, 2>("int8/amx/16x64", kIsa),
};

}  // namespace fastlinear::amx
