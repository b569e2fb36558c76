// bf16 x bf16 by vdpbf16ps, which adds two products a lane to an fp32 sum. Rows of A are read as bf16, two k at once
// as one 32-bit broadcast; panels as isa/avx512/bf16.hpp reads them.
//
//   tile    accumulators  panel  broadcast   loads per two k for its 2 x FMAs
//   14x32   28            2      1  (31)     2 + 14 for 28
//   6x64    24            4      1  (29)     4 + 6  for 24
//   1x128   8             1      1  (10)     8 + 1  for 8, for M = 1: chains enough for its latency
//
// The instruction rounds each product and sum to nearest even and flushes denormals, of operands and of results,
// whatever MXCSR says. It runs at the rate of an FMA on Zen 4 (twice the products), at a quarter of it on Sapphire
// Rapids: the tuner decides.
#pragma once

#include "fastlinear/formats/bf16.hpp"
#include "fastlinear/generic/tile.hpp"

namespace fastlinear::avx512_bf16 {

extern const Isa kIsa;

struct Pairs {
  using Vector = __m512;
  static constexpr std::ptrdiff_t lanes = 16, registers = 32;

  using Sum = float;
  using Row = Bf16;
  static constexpr Format rows = Format::bf16;
  using Weight = Bf16;
  static constexpr Layout layout{Format::bf16, 32, Bf16::kr};
  static constexpr std::ptrdiff_t steps = 1;

  static Vector zero() { return _mm512_setzero_ps(); }
  static Vector load(const float* p) { return _mm512_load_ps(p); }
  static void store(float* p, Vector c) { _mm512_store_ps(p, c); }
  static Vector row(const Bf16* a) {
    int pair;
    __builtin_memcpy(&pair, a, sizeof pair);
    return _mm512_castsi512_ps(_mm512_set1_epi32(pair));
  }
  static Vector last_row(const Bf16* a) { return _mm512_castsi512_ps(_mm512_set1_epi32(a->bits)); }
  static Vector weights(const Bf16* p, std::ptrdiff_t) { return _mm512_loadu_ps(p); }
  static Vector multiply_add(Vector x, Vector w, Vector c) {
#if defined(__clang__) && __clang_major__ == 16
    asm("" : "+v"(x));  // folding a broadcast pair into the operand's type, this compiler never comes to an end
#endif
    return _mm512_dpbf16_ps(c, __builtin_bit_cast(__m512bh, x), __builtin_bit_cast(__m512bh, w));
  }
};

inline constexpr Kernel kBf16Kernels[] = {
    kernels::row<kernels::Tile<Pairs>, 6, 2>("bf16/avx512_bf16/6x64", kIsa),
    kernels::row<kernels::Tile<Pairs>, 14, 1>("bf16/avx512_bf16/14x32", kIsa),
    kernels::row<kernels::Tile<Pairs>, 1, 4>("bf16/avx512_bf16/1x128", kIsa),
};

}  // namespace fastlinear::avx512_bf16
