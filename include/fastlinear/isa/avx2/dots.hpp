// Weights in groups as integers on AVX2: vpmaddubsw multiplies their magnitudes by rows that have taken their signs.
// Two products of at most 128 * 127 are an int16, whatever the table, and sums of pairs go on in int32. Where the
// numbers of a table follow one another, several rows are multiplied otherwise: words.hpp, turns.hpp.
//
//   tile         accumulators  weights, signs, table, mask, ones  of 16  vector operations for 32 x rows products
//   int4  2x32   8             7                                  15     2.5 + 2 x 5
//   int4  1x64   8             7                                  15     2.5 + 5
//   int8g 3x32   12            4, row among them                  16     1 + 3 x 4
//   int8g 1x64   8             4                                  12     1 + 4
#pragma once

#include "fastlinear/formats/int4.hpp"
#include "fastlinear/formats/int8.hpp"
#include "fastlinear/generic/dots.hpp"
#include "fastlinear/generic/tile.hpp"
#include "fastlinear/isa/avx2/turns.hpp"
#include "fastlinear/isa/avx2/vec.hpp"
#include "fastlinear/isa/avx2/words.hpp"

namespace fastlinear::avx2 {

extern const Isa kIsa;

struct SignedDots {
  using Sum = __m256i;
  static constexpr std::ptrdiff_t registers = 0;

  static __m256i load(const char* p) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)); }
  static Sum start(std::int32_t) { return _mm256_setzero_si256(); }
  static const std::int8_t* row(const std::int8_t* a) { return a; }
  static I32 sums(Sum c) { return {c}; }
};

// Of codes that are weights: magnitudes, and four products of up to 15 * 127 an int16.
struct HalfDots : SignedDots {
  static constexpr Layout layout = Int4::layout;
  using Weights = Nibbles;

  static Weights halves(const char* p) { return avx2::halves(p); }
  static Sum add(Sum c, const Weights& w, const std::int8_t* a) {
    __m256i x, y;
    asm("vpbroadcastd %5, %1\n\tvpbroadcastd %6, %2\n\tvpmaddubsw %1, %3, %1\n\tvpmaddubsw %2, %4, %2\n\t"
        "vpaddw %2, %1, %1\n\tvpmaddwd %7, %1, %1\n\tvpaddd %1, %0, %0"
        : "+&x"(c), "=&x"(x), "=&x"(y)
        : "x"(w.low), "x"(w.high), "m"(*reinterpret_cast<const char (*)[4]>(a)),
          "m"(*reinterpret_cast<const char (*)[4]>(a + 4)), "x"(_mm256_set1_epi16(1)));
    return c;
  }
};

struct CodeDots : SignedDots {
  static constexpr Layout layout = Int4::layout;
  using Even = dots::EvenDots<HalfDots, I32>;
  using Weights = Nibbles;
  __m256i table;

  explicit CodeDots(const ScaledGroups& how) : table(byte_table(how.integers)) {}
  Weights weights(const char* p) const { return look_up(table, p); }
  // Sums of both halves in int16 would overflow: of magnitudes up to 128 they are up to 4 * 128 * 127.
  static Sum add(Sum c, const Weights& w, const std::int8_t* a) {
    __m256i x, magnitudes;
    asm("vpbroadcastd %5, %1\n\tvpabsb %3, %2\n\tvpsignb %3, %1, %1\n\tvpmaddubsw %1, %2, %1\n\t"
        "vpmaddwd %7, %1, %1\n\tvpaddd %1, %0, %0\n\t"
        "vpbroadcastd %6, %1\n\tvpabsb %4, %2\n\tvpsignb %4, %1, %1\n\tvpmaddubsw %1, %2, %1\n\t"
        "vpmaddwd %7, %1, %1\n\tvpaddd %1, %0, %0"
        : "+&x"(c), "=&x"(x), "=&x"(magnitudes)
        : "x"(w.low), "x"(w.high), "m"(*reinterpret_cast<const char (*)[4]>(a)),
          "m"(*reinterpret_cast<const char (*)[4]>(a + 4)), "x"(_mm256_set1_epi16(1)));
    return c;
  }
};

struct ByteDots : SignedDots {
  static constexpr Layout layout = Int8InGroups::layout;
  struct Weights {
    __m256i signs, magnitudes;  // once for all rows
  };

  explicit ByteDots(const ScaledGroups&) {}
  static Weights weights(const char* p) { return {load(p), _mm256_abs_epi8(load(p))}; }
  static Sum add(Sum c, const Weights& w, const std::int8_t* a) {
    __m256i x;
    asm("vpbroadcastd %4, %1\n\tvpsignb %2, %1, %1\n\tvpmaddubsw %1, %3, %1\n\tvpmaddwd %5, %1, %1\n\t"
        "vpaddd %1, %0, %0"
        : "+&x"(c), "=&x"(x)
        : "x"(w.signs), "x"(w.magnitudes), "m"(*reinterpret_cast<const char (*)[4]>(a)), "x"(_mm256_set1_epi16(1)));
    return c;
  }
};

using CodeTile = dots::Tile<F32, CodeDots>;
using ByteTile = dots::Tile<F32, ByteDots>;
inline constexpr Kernel kDotKernels[] = {
    kernels::row<words::Tile<CodeTile>, 4, 1>("int4/avx2/dot4x32", kIsa),
    turns::row<words::Tile<CodeTile>>("int4/avx2/dot64x32", kIsa),
    kernels::row<CodeTile, 1, 2>("int4/avx2/dot1x64", kIsa),
    kernels::row<ByteTile, 3, 1>("int8g/avx2/dot3x32", kIsa),
    kernels::row<ByteTile, 1, 2>("int8g/avx2/dot1x64", kIsa),
};

}  // namespace fastlinear::avx2
