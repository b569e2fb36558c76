// int4 codes on AVX2: vpermps looks up the lower three bits of a code in either half of the table, and the fourth,
// moved to where vblendvps looks, chooses between the two.
//
//   tile   accumulators  table  weights, codes  vector operations for 8 x rows products
//   2x32   8             2      4               5 + 2
//   1x64   8             2      4               5 + 1
#pragma once

#include "fastlinear/generic/groups.hpp"
#include "fastlinear/generic/tile.hpp"
#include "fastlinear/isa/avx2/vec.hpp"

namespace fastlinear::avx2 {

extern const Isa kIsa;

struct Products {
  static constexpr std::ptrdiff_t bytes = 4, vectors = 1;
  static constexpr float unit = 1.0f;

  // As text, since GCC 12 writes sums elsewhere, keeps what it has broadcast, and spills the tile.
  static __m256 multiply_add(const float* x, __m256 w, __m256 c) {
    __m256 all;
    asm("vbroadcastss %3, %1\n\tvfmadd231ps %2, %1, %0" : "+x"(c), "=&x"(all) : "x"(w), "m"(*x));
    return c;
  }
  static __m256 add(const float* x, __m256 c) {
    __m256 all;
    asm("vbroadcastss %2, %1\n\tvaddps %1, %0, %0" : "+x"(c), "=&x"(all) : "m"(*x));
    return c;
  }
};

struct Codes : Products {
  struct Integers {
    __m256i table;

    explicit Integers(const ScaledGroups& how) : table(byte_table(how.integers)) {}
    void unpack(const char* codes, char* low, char* high) const {
      const Nibbles bytes = look_up(table, codes);
      store(low, bytes.low);
      store(high, bytes.high);
    }
  };
  using Lanes = __m256i;
  static constexpr Layout layout = Int4::layout;
  __m256 low, high;

  explicit Codes(const float* numbers) : low(_mm256_loadu_ps(numbers)), high(_mm256_loadu_ps(numbers + 8)) {}
  static Lanes load(const char* p) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)); }
  F32 value(Lanes lanes, std::ptrdiff_t i) const {
    const __m256i index = _mm256_srli_epi32(lanes, code_shift(i));
    const __m256 upper = _mm256_castsi256_ps(_mm256_slli_epi32(lanes, 28 - code_shift(i)));
    return {_mm256_blendv_ps(_mm256_permutevar8x32_ps(low, index), _mm256_permutevar8x32_ps(high, index), upper)};
  }
};

// Bytes as they are.
struct Bytes : Products {
  using Lanes = __m256i;
  static constexpr Layout layout = Int8InGroups::layout;

  explicit Bytes(const float*) {}
  static Lanes load(const char* p) { return Codes::load(p); }
  F32 value(Lanes lanes, std::ptrdiff_t i) const {
    const __m256i upper = _mm256_slli_epi32(lanes, static_cast<int>(24 - 8 * i));
    return {_mm256_cvtepi32_ps(_mm256_srai_epi32(upper, 24))};
  }
};

// Two k of 16 channels, as fp16.
struct Halves : Products {
  using Lanes = __m256i;
  static constexpr Layout layout = Fp8::layout;
  static constexpr std::ptrdiff_t bytes = Fp8::kr, vectors = 2;
  static constexpr float unit = Fp8::of_half;

  explicit Halves(const float*) {}
  static Lanes load(const char* p) {
    Lanes lanes = Codes::load(p);
    asm("" : "+x"(lanes));  // once: GCC would load it for either k
    return lanes;
  }
  F32 value(Lanes lanes, std::ptrdiff_t i) const {
    const __m256i upper = i % 2 == 0 ? _mm256_slli_epi16(lanes, 8) : lanes;
    const __m256i halves = _mm256_and_si256(_mm256_srai_epi16(upper, 1), _mm256_set1_epi16(static_cast<short>(0xbf80)));
    return {_mm256_cvtph_ps(i < 2 ? _mm256_castsi256_si128(halves) : _mm256_extracti128_si256(halves, 1))};
  }
};

inline constexpr Kernel kFp8Kernels[] = {
    kernels::row<groups::Tile<F32, Halves>, 2, 1>("fp8/avx2/2x32", kIsa),
    kernels::row<groups::Tile<F32, Halves>, 1, 2>("fp8/avx2/1x64", kIsa),
};

inline constexpr Kernel kInt8gKernels[] = {
    kernels::row<groups::Tile<F32, Bytes>, 2, 1>("int8g/avx2/2x32", kIsa),
    kernels::row<groups::Tile<F32, Bytes>, 1, 2>("int8g/avx2/1x64", kIsa),
};

inline constexpr Kernel kInt4Kernels[] = {
    kernels::row<groups::Tile<F32, Codes>, 2, 1>("int4/avx2/2x32", kIsa),
    kernels::row<groups::Tile<F32, Codes>, 1, 2>("int4/avx2/1x64", kIsa),
};

}  // namespace fastlinear::avx2
