// int8 x int8 on AVX-512 without VNNI: as on AVX2 (isa/avx2/int8.hpp), by vpmaddwd on int16.
//
//   tile   accumulators  weights  row  product  of 32   vector operations per four k, for 32 products each
//   6x32   24            4        1    1        30      4 widenings, 24 multiplications and 24 additions for 24
//   1x64   8             8        1    1        18      8, 8 and 8 for 8
#pragma once

#include "fastlinear/formats/int8.hpp"
#include "fastlinear/generic/tile.hpp"

namespace fastlinear::avx512 {

extern const Isa kIsa;

struct Int8Pairs {
  using Vector = __m512i;
  static constexpr std::ptrdiff_t lanes = 8, registers = 32;

  using Sum = std::int32_t;
  using Row = std::int16_t;
  static constexpr Format rows = Format::int16;
  using Weight = std::int8_t;
  static constexpr Layout layout{Format::int8, 32, Int8::dot_kr};
  static constexpr std::ptrdiff_t steps = 1;

  static Vector zero() { return _mm512_setzero_si512(); }
  static Vector load(const Sum* p) {
    return _mm512_maskz_cvtepu32_epi64(0xff, _mm256_load_si256(reinterpret_cast<const __m256i*>(p)));
  }
  static void store(Sum* p, Vector c) {
    const __m512i sums = _mm512_add_epi32(c, _mm512_maskz_srli_epi64(0xff, c, 32));
    _mm256_store_si256(reinterpret_cast<__m256i*>(p), _mm512_maskz_cvtepi64_epi32(0xff, sums));
  }
  static Vector row(const Row* a) {
    long long quad;
    __builtin_memcpy(&quad, a, sizeof quad);
    return _mm512_set1_epi64(quad);
  }
  static Vector last_row(const Row* a) { return row(a); }
  static Vector weights(const Weight* p, std::ptrdiff_t) {
    return _mm512_cvtepi8_epi16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
  }
  // GCC 12 copies sums to and fro, or spills them, around the intrinsic; as text it has no choice.
  static Vector multiply_add(Vector x, Vector w, Vector c) {
    Vector product;
    asm("vpmaddwd %3, %2, %1\n\tvpaddd %1, %0, %0" : "+v"(c), "=&v"(product) : "v"(x), "v"(w));
    return c;
  }
};

inline constexpr Kernel kInt8Kernels[] = {
    kernels::row<kernels::Tile<Int8Pairs>, 6, 1>("int8/avx512/6x32", kIsa),
    kernels::row<kernels::Tile<Int8Pairs>, 1, 2>("int8/avx512/1x64", kIsa),
};

}  // namespace fastlinear::avx512
