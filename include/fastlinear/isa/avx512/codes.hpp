// int4 codes on AVX-512: vpermps looks a code up in a table of one register, and sees no more of an index than its
// lower four bits, so a shift and a look-up make 16 weights.
//
//   tile    accumulators  table  weights, codes  vector operations for 16 x rows products
//   1x128   8             1      2               2 + 1; bound by the weights' bytes
//   4x64    16            1      2               2 + 4
//
// With more rows, the driver's widening, once for all row tiles, is the better bargain.
#pragma once

#include "fastlinear/generic/groups.hpp"
#include "fastlinear/generic/tile.hpp"
#include "fastlinear/isa/avx512/vec.hpp"

namespace fastlinear::avx512 {

extern const Isa kIsa;

struct Products {
  static constexpr std::ptrdiff_t bytes = 4, vectors = 1;
  static constexpr float unit = 1.0f;

  // As text, since GCC 12 writes sums elsewhere and spills the tile, as it does when it looks up more than one vector
  // at once, which "memory" forbids. The broadcast takes no port that an FMA wants.
  static __m512 multiply_add(const float* x, __m512 w, __m512 c) {
    asm volatile("vfmadd231ps %2%{1to16%}, %1, %0" : "+v"(c) : "v"(w), "m"(*x) : "memory");
    return c;
  }
  static __m512 add(const float* x, __m512 c) {
    asm("vaddps %1%{1to16%}, %0, %0" : "+v"(c) : "m"(*x));
    return c;
  }
};

struct Codes : Products {
  struct Integers {
    __m512i table;

    explicit Integers(const ScaledGroups& how) : table(byte_table(how.integers)) {}
    void unpack(const char* codes, char* low, char* high) const {
      const Nibbles bytes = look_up(table, codes);
      store(low, bytes.low);
      store(high, bytes.high);
    }
  };
  using Lanes = __m512i;
  static constexpr Layout layout = Int4::layout;
  __m512 table;

  explicit Codes(const float* numbers) : table(_mm512_loadu_ps(numbers)) {}
  static Lanes load(const char* p) { return _mm512_loadu_si512(p); }
  F32 value(Lanes lanes, std::ptrdiff_t i) const {
    const __m512i index = _mm512_maskz_srli_epi32(kAll, lanes, static_cast<unsigned>(code_shift(i)));
    return {_mm512_maskz_permutexvar_ps(kAll, index, table)};
  }
};

// Bytes as they are: each is put under the exponent of 2^23, from which 2^23 + 128 is taken away, since vcvtdq2ps and
// two shifts would all want the same port.
struct Bytes : Products {
  using Lanes = __m512i;
  static constexpr Layout layout = Int8InGroups::layout;

  explicit Bytes(const float*) {}
  static Lanes load(const char* p) {
    return _mm512_xor_si512(_mm512_loadu_si512(p), _mm512_set1_epi8(static_cast<char>(0x80)));
  }
  F32 value(Lanes lanes, std::ptrdiff_t i) const {
    const __m512i place = _mm512_add_epi32(_mm512_set4_epi32(12, 8, 4, 0), _mm512_set1_epi32(static_cast<int>(i)));
    const __m512i bits = _mm512_mask_shuffle_epi8(_mm512_set1_epi32(0x4b000000), 0x1111111111111111, lanes, place);
    return {_mm512_sub_ps(_mm512_castsi512_ps(bits), _mm512_set1_ps(8388736.0f))};
  }
};

// Two k of 32 channels, as fp16.
struct Halves : Products {
  using Lanes = __m512i;
  static constexpr Layout layout = Fp8::layout;
  static constexpr std::ptrdiff_t bytes = Fp8::kr, vectors = 2;
  static constexpr float unit = Fp8::of_half;

  explicit Halves(const float*) {}
  static Lanes load(const char* p) {
    Lanes lanes = _mm512_loadu_si512(p);
    asm("" : "+v"(lanes));  // once: GCC would load it for either k
    return lanes;
  }
  F32 value(Lanes lanes, std::ptrdiff_t i) const {
    const __m512i upper = i % 2 == 0 ? _mm512_slli_epi16(lanes, 8) : lanes;
    const __m512i halves = _mm512_and_si512(_mm512_srai_epi16(upper, 1), _mm512_set1_epi16(static_cast<short>(0xbf80)));
    return {_mm512_maskz_cvtph_ps(kAll, i < 2 ? half<0>(halves) : half<1>(halves))};
  }
};

inline constexpr Kernel kFp8Kernels[] = {
    kernels::row<groups::Tile<F32, Halves>, 4, 2>("fp8/avx512/4x64", kIsa),
    kernels::row<groups::Tile<F32, Halves>, 1, 4>("fp8/avx512/1x128", kIsa),
};

inline constexpr Kernel kInt8gKernels[] = {
    kernels::row<groups::Tile<F32, Bytes>, 4, 2>("int8g/avx512/4x64", kIsa),
    kernels::row<groups::Tile<F32, Bytes>, 1, 4>("int8g/avx512/1x128", kIsa),
};

inline constexpr Kernel kInt4Kernels[] = {
    kernels::row<groups::Tile<F32, Codes>, 4, 2>("int4/avx512/4x64", kIsa),
    kernels::row<groups::Tile<F32, Codes>, 1, 4>("int4/avx512/1x128", kIsa),
};

}  // namespace fastlinear::avx512
