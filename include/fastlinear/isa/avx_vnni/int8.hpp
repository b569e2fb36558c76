// int8 x int8 by the vpdpbusd of 256 bits; see isa/avx512_vnni/int8.hpp.
//
//   tile   accumulators  panel  broadcast  of 16   loads per four k for its dot products
//   6x16   12            2      1          15      2 + 6 for 12
//   3x32   12            1      3          16      4 + 3 for 12
//   1x64   8             1      1          10      8 + 1 for 8
#pragma once

#include "fastlinear/formats/int8.hpp"
#include "fastlinear/generic/tile.hpp"

namespace fastlinear::avx_vnni {

extern const Isa kIsa;

struct Quads {
  using Vector = __m256i;
  static constexpr std::ptrdiff_t lanes = 8, registers = 16;

  using Sum = std::int32_t;
  using Row = std::uint8_t;
  static constexpr Format rows = Format::uint8;
  using Weight = std::int8_t;
  static constexpr Layout layout{Format::int8, 8, Int8::dot_kr};
  static constexpr std::ptrdiff_t steps = 1;

  static Vector zero() { return _mm256_setzero_si256(); }
  static Vector load(const Sum* p) { return _mm256_load_si256(reinterpret_cast<const __m256i*>(p)); }
  static void store(Sum* p, Vector c) { _mm256_store_si256(reinterpret_cast<__m256i*>(p), c); }
  static Vector row(const Row* a) {
    int quad;
    __builtin_memcpy(&quad, a, sizeof quad);
    return _mm256_set1_epi32(quad);
  }
  static Vector last_row(const Row* a) { return row(a); }
  static Vector weights(const Weight* p, std::ptrdiff_t) {
    return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  }
  // GCC 12 copies sums to and fro, or spills them, around the intrinsic; as text it has no choice.
  static Vector multiply_add(Vector x, Vector w, Vector c) {
    asm("%{vex%} vpdpbusd %2, %1, %0" : "+x"(c) : "x"(x), "x"(w));
    return c;
  }
};

inline constexpr Kernel kInt8Kernels[] = {
    kernels::row<kernels::Tile<Quads>, 6, 2>("int8/avx_vnni/6x16", kIsa),
    kernels::row<kernels::Tile<Quads>, 3, 4>("int8/avx_vnni/3x32", kIsa),
    kernels::row<kernels::Tile<Quads>, 1, 8>("int8/avx_vnni/1x64", kIsa),
};

}  // namespace fastlinear::avx_vnni
