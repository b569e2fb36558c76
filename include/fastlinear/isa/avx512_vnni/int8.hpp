// int8 x int8 by vpdpbusd, which adds four products of u8 rows and s8 weights a lane to an int32 sum, exactly.
//
//   tile    accumulators  panel  broadcast   loads per four k for its dot products
//   14x32   28            2      1  (31)     2 + 14 for 28
//   6x64    24            4      1  (29)     4 + 6  for 24
//   1x128   8             1      1  (10)     8 + 1  for 8, for M = 1: chains enough for its latency
#pragma once

#include "fastlinear/formats/int8.hpp"
#include "fastlinear/generic/tile.hpp"

namespace fastlinear::avx512_vnni {

extern const Isa kIsa;

struct Quads {
  using Vector = __m512i;
  static constexpr std::ptrdiff_t lanes = 16, registers = 32;

  using Sum = std::int32_t;
  using Row = std::uint8_t;
  static constexpr Format rows = Format::uint8;
  using Weight = std::int8_t;
  static constexpr Layout layout{Format::int8, 32, Int8::dot_kr};
  static constexpr std::ptrdiff_t steps = 1;

  static Vector zero() { return _mm512_setzero_si512(); }
  static Vector load(const Sum* p) { return _mm512_load_si512(p); }
  static void store(Sum* p, Vector c) { _mm512_store_si512(p, c); }
  static Vector row(const Row* a) {
    int quad;
    __builtin_memcpy(&quad, a, sizeof quad);
    return _mm512_set1_epi32(quad);
  }
  static Vector last_row(const Row* a) { return row(a); }
  static Vector weights(const Weight* p, std::ptrdiff_t) { return _mm512_loadu_si512(p); }
  // GCC 12 copies sums to and fro, or spills them, around the intrinsic; as text it has no choice.
  static Vector multiply_add(Vector x, Vector w, Vector c) {
    asm("vpdpbusd %2, %1, %0" : "+v"(c) : "v"(x), "v"(w));
    return c;
  }
};

inline constexpr Kernel kInt8Kernels[] = {
    kernels::row<kernels::Tile<Quads>, 6, 2>("int8/avx512_vnni/6x64", kIsa),
    kernels::row<kernels::Tile<Quads>, 14, 1>("int8/avx512_vnni/14x32", kIsa),
    kernels::row<kernels::Tile<Quads>, 1, 4>("int8/avx512_vnni/1x128", kIsa),
};

}  // namespace fastlinear::avx512_vnni
