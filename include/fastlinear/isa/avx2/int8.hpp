// int8 x int8 on AVX2. vpmaddubsw, which multiplies u8 by s8, saturates where two products exceed 16 bits; so rows are
// int16, weights are widened to it, and vpmaddwd adds two exact products a lane. Panels hold four k of a channel side
// by side, so a lane gathers every other pair, and two neighbors are one sum in the end.
//
//   tile   accumulators  weights  row  product  of 16   vector operations per four k, for 16 products each
//   6x8    12            2        1    1        16      2 widenings, 12 multiplications and 12 additions for 12
//   1x32   8             1        1    1        11      8, 8 and 8 for 8
//
// That is 2.2 operations for 16 products, where fp32 has one FMA for 8.
#pragma once

#include "fastlinear/formats/int8.hpp"
#include "fastlinear/generic/tile.hpp"

namespace fastlinear::avx2 {

extern const Isa kIsa;

struct Int8Pairs {
  using Vector = __m256i;
  static constexpr std::ptrdiff_t lanes = 4, registers = 16;

  using Sum = std::int32_t;
  using Row = std::int16_t;
  static constexpr Format rows = Format::int16;
  using Weight = std::int8_t;
  static constexpr Layout layout{Format::int8, 8, Int8::dot_kr};
  static constexpr std::ptrdiff_t steps = 1;

  static Vector zero() { return _mm256_setzero_si256(); }
  static Vector load(const Sum* p) {
    return _mm256_cvtepu32_epi64(_mm_load_si128(reinterpret_cast<const __m128i*>(p)));
  }
  static void store(Sum* p, Vector c) {
    const __m256i sums = _mm256_add_epi32(c, _mm256_srli_epi64(c, 32));
    const __m256i front = _mm256_permutevar8x32_epi32(sums, _mm256_setr_epi32(0, 2, 4, 6, 0, 2, 4, 6));
    _mm_store_si128(reinterpret_cast<__m128i*>(p), _mm256_castsi256_si128(front));
  }
  static Vector row(const Row* a) {
    long long quad;
    __builtin_memcpy(&quad, a, sizeof quad);
    return _mm256_set1_epi64x(quad);
  }
  static Vector last_row(const Row* a) { return row(a); }
  static Vector weights(const Weight* p, std::ptrdiff_t) {
    return _mm256_cvtepi8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  }
  // GCC 12 copies sums to and fro, or spills them, around the intrinsic; as text it has no choice.
  static Vector multiply_add(Vector x, Vector w, Vector c) {
    Vector product;
    asm("vpmaddwd %3, %2, %1\n\tvpaddd %1, %0, %0" : "+x"(c), "=&x"(product) : "x"(x), "x"(w));
    return c;
  }
};

inline constexpr Kernel kInt8Kernels[] = {
    kernels::row<kernels::Tile<Int8Pairs>, 6, 1>("int8/avx2/6x8", kIsa),
    kernels::row<kernels::Tile<Int8Pairs>, 1, 4>("int8/avx2/1x32", kIsa),
};

}  // namespace fastlinear::avx2
