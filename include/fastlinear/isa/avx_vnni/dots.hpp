// Weights in groups as integers, by the vpdpbusd of 256 bits; see isa/avx512_vnni/dots.hpp.
//
//   tile   accumulators  codes, table, rows  of 16
//   3x32   12            4                   16: the mask of codes stays in memory
//   1x64   8             4                   12
#pragma once

#include "fastlinear/formats/int4.hpp"
#include "fastlinear/formats/int8.hpp"
#include "fastlinear/generic/dots.hpp"
#include "fastlinear/generic/tile.hpp"
#include "fastlinear/isa/avx2/vec.hpp"

namespace fastlinear::avx_vnni {

extern const Isa kIsa;

struct BiasedDots {
  using Sum = __m256i;
  static constexpr std::ptrdiff_t registers = 0;

  static __m256i load(const char* p) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)); }
  static Sum start(std::int32_t biased) { return _mm256_set1_epi32(biased); }
  static const std::int8_t* row(const std::int8_t* a) { return a; }
  static __m256i biased(__m256i bytes) { return _mm256_xor_si256(bytes, _mm256_set1_epi8(static_cast<char>(0x80))); }
  static avx2::I32 sums(Sum c) { return {c}; }
};

// The lower code of each byte, in memory: as text, since GCC keeps it in a register that a sum would have to leave.
alignas(32) constexpr std::int32_t kLowCodes[8] = {0x0f0f0f0f, 0x0f0f0f0f, 0x0f0f0f0f, 0x0f0f0f0f,
                                                   0x0f0f0f0f, 0x0f0f0f0f, 0x0f0f0f0f, 0x0f0f0f0f};

struct HalfDots : BiasedDots {
  static constexpr Layout layout = Int4::layout;
  using Weights = avx2::Nibbles;

  static Weights halves(const char* p) {
    const __m256i codes = load(p), upper = _mm256_srli_epi16(codes, 4);
    __m256i low, high;
    asm("vpand %1, %2, %0" : "=x"(low) : "m"(kLowCodes), "x"(codes));
    asm("vpand %1, %2, %0" : "=x"(high) : "m"(kLowCodes), "x"(upper));
    return {low, high};
  }
  static Sum add(Sum c, const Weights& w, const std::int8_t* a) {
    __m256i x;
    asm("vpbroadcastd %4, %1\n\t%{vex%} vpdpbusd %1, %2, %0\n\t"
        "vpbroadcastd %5, %1\n\t%{vex%} vpdpbusd %1, %3, %0"
        : "+&x"(c), "=&x"(x)
        : "x"(w.low), "x"(w.high), "m"(*reinterpret_cast<const char (*)[4]>(a)),
          "m"(*reinterpret_cast<const char (*)[4]>(a + 4)));
    return c;
  }
};

struct CodeDots : HalfDots {
  using Even = dots::EvenDots<HalfDots, avx2::I32>;
  __m256i table;

  explicit CodeDots(const ScaledGroups& how) : table(biased(avx2::byte_table(how.integers))) {}
  Weights weights(const char* p) const {
    const Weights codes = halves(p);
    return {_mm256_shuffle_epi8(table, codes.low), _mm256_shuffle_epi8(table, codes.high)};
  }
};

struct ByteDots : BiasedDots {
  static constexpr Layout layout = Int8InGroups::layout;
  using Weights = __m256i;

  explicit ByteDots(const ScaledGroups&) {}
  static Weights weights(const char* p) { return biased(load(p)); }
  static Sum add(Sum c, Weights w, const std::int8_t* a) {
    __m256i x;
    asm("vpbroadcastd %3, %1\n\t%{vex%} vpdpbusd %1, %2, %0"
        : "+x"(c), "=&x"(x)
        : "x"(w), "m"(*reinterpret_cast<const char (*)[4]>(a)));
    return c;
  }
};

using CodeTile = dots::Tile<avx2::F32, CodeDots>;
using ByteTile = dots::Tile<avx2::F32, ByteDots>;
inline constexpr Kernel kDotKernels[] = {
    kernels::row<CodeTile, 3, 1>("int4/avx_vnni/3x32", kIsa),
    kernels::row<CodeTile, 1, 2>("int4/avx_vnni/1x64", kIsa),
    kernels::row<ByteTile, 3, 1>("int8g/avx_vnni/3x32", kIsa),
    kernels::row<ByteTile, 1, 2>("int8g/avx_vnni/1x64", kIsa),
};

}  // namespace fastlinear::avx_vnni
