// Weights in groups as integers, by vpdpbusd: they come 128 higher, as its unsigned operand, and rows of int8 as the
// other.
//
//   tile    accumulators  codes, weights  table, mask, row  of 32  vector operations for 64 x rows products
//   12x32   24            4               3                 31     2.5 + 12
//   4x64    16            8               3                 27     2.5 + 4
//   1x128   8             16              3                 27     1.5 + 1; 2.5 + 1 of an uneven table
//   1x64    4             8               3                 15     the same; half as many streams, and farther ahead
//   stream  4             4               3                 11     the same of one panel after the other
#pragma once

#include "fastlinear/formats/int4.hpp"
#include "fastlinear/formats/int8.hpp"
#include "fastlinear/generic/dots.hpp"
#include "fastlinear/generic/tile.hpp"
#include "fastlinear/isa/avx512/vec.hpp"

namespace fastlinear::avx512_vnni {

extern const Isa kIsa;

struct BiasedDots {
  using Sum = __m512i;
  static constexpr std::ptrdiff_t registers = 32;

  static __m512i load(const char* p) { return _mm512_loadu_si512(p); }
  static Sum start(const std::int32_t& biased) {
    Sum c;
    asm volatile("vpbroadcastd %1, %0" : "=v"(c) : "m"(biased));
    return c;
  }
  static __m512i four(const std::int8_t* a) {
    __m512i x;
    asm("vpbroadcastd %1, %0" : "=v"(x) : "m"(*reinterpret_cast<const char (*)[4]>(a)));
    return x;
  }
  static __m512i biased(__m512i bytes) { return _mm512_xor_si512(bytes, _mm512_set1_epi8(static_cast<char>(0x80))); }
  static avx512::I32 sums(Sum c) { return {c}; }
};

struct HalfDots : BiasedDots {
  static constexpr Layout layout = Int4::layout;
  using Weights = avx512::Nibbles;
  using Row = Weights;

  static Weights halves(const char* p) { return avx512::halves(p); }
  static Row row(const std::int8_t* a) { return {four(a), four(a + 4)}; }
  static Sum add(Sum c, const Weights& w, const Row& x) {
    asm("vpdpbusd %3, %1, %0\n\tvpdpbusd %4, %2, %0" : "+v"(c) : "v"(w.low), "v"(w.high), "v"(x.low), "v"(x.high));
    return c;
  }
};

struct CodeDots : HalfDots {
  using Even = dots::EvenDots<HalfDots, avx512::I32>;
  __m512i table;

  explicit CodeDots(const ScaledGroups& how) : table(biased(avx512::byte_table(how.integers))) {}
  Weights weights(const char* p) const { return avx512::look_up(table, p); }
};

struct ByteDots : BiasedDots {
  static constexpr Layout layout = Int8InGroups::layout;
  using Weights = __m512i;

  explicit ByteDots(const ScaledGroups&) {}
  static Weights weights(const char* p) { return biased(load(p)); }
  static __m512i row(const std::int8_t* a) { return four(a); }
  static Sum add(Sum c, Weights w, __m512i x) {
    asm("vpdpbusd %2, %1, %0" : "+v"(c) : "v"(w), "v"(x));
    return c;
  }
};

using CodeTile = dots::Tile<avx512::F32, CodeDots>;
using CodeStream = dots::Stream<avx512::F32, CodeDots>;
using ByteTile = dots::Tile<avx512::F32, ByteDots>;
using ByteStream = dots::Stream<avx512::F32, ByteDots>;
inline constexpr Kernel kDotKernels[] = {
    kernels::row<CodeTile, 12, 1>("int4/avx512_vnni/12x32", kIsa),
    kernels::row<CodeTile, 4, 2>("int4/avx512_vnni/4x64", kIsa),
    kernels::row<CodeTile, 1, 4>("int4/avx512_vnni/1x128", kIsa),
    kernels::row<CodeTile, 1, 2>("int4/avx512_vnni/1x64", kIsa),
    kernels::row<CodeStream, 1, 4>("int4/avx512_vnni/stream1x128", kIsa),
    kernels::row<ByteTile, 12, 1>("int8g/avx512_vnni/12x32", kIsa),
    kernels::row<ByteTile, 1, 4>("int8g/avx512_vnni/1x128", kIsa),
    kernels::row<ByteStream, 1, 4>("int8g/avx512_vnni/stream1x128", kIsa),
};

}  // namespace fastlinear::avx512_vnni
