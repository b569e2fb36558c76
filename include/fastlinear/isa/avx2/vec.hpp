// Eight floats in a ymm register, for the epilogue. Included inside csrc/avx2.cpp's target region only.
// isa/scalar/vec.hpp tells what each verb means.
#pragma once

#include <immintrin.h>

#include <cstddef>
#include <cstdint>

#include "fastlinear/formats/bf16.hpp"
#include "fastlinear/formats/fp16.hpp"
#include "fastlinear/formats/int8.hpp"
#include "fastlinear/formats/scales.hpp"

namespace fastlinear::avx2 {

struct F32 {
  static constexpr std::ptrdiff_t width = 8;
  static constexpr int rows_in_step = 3;  // four want more than the 16 registers, and tiles have 6 rows or 3
  __m256 v;

  static F32 set(float x) { return {_mm256_set1_ps(x)}; }
  static F32 load(const float* p) { return {_mm256_loadu_ps(p)}; }
  static void store(float* p, F32 x) { _mm256_storeu_ps(p, x.v); }
  static void store_n(float* p, F32 x, std::ptrdiff_t n) {
    const __m256i lane = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
    _mm256_maskstore_ps(p, _mm256_cmpgt_epi32(_mm256_set1_epi32(static_cast<int>(n)), lane), x.v);
  }

  static __m128i load_16_bytes(const void* p) { return _mm_loadu_si128(static_cast<const __m128i*>(p)); }

  static F32 load(const Fp16* p) { return {_mm256_cvtph_ps(load_16_bytes(p))}; }
  static void store(Fp16* p, F32 x) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph(x.v, _MM_FROUND_TO_NEAREST_INT));
  }
  static F32 load(const Bf16* p) {
    return {_mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(load_16_bytes(p)), 16))};
  }
  static void load_pairs(const Bf16* p, F32& even, F32& odd) {
    const __m256i both = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
    even.v = _mm256_castsi256_ps(_mm256_slli_epi32(both, 16));
    odd.v = _mm256_castsi256_ps(_mm256_and_si256(both, _mm256_set1_epi32(static_cast<int>(0xffff0000u))));
  }
  // As formats/bf16.hpp rounds.
  static void store(Bf16* p, F32 x) {
    const __m256i bits = _mm256_castps_si256(x.v);
    const __m256i last = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    const __m256i nearest = _mm256_add_epi32(bits, _mm256_add_epi32(last, _mm256_set1_epi32(0x7fff)));
    const __m256i quiet = _mm256_or_si256(bits, _mm256_set1_epi32(0x400000));
    const __m256i number = _mm256_castps_si256(_mm256_cmp_ps(x.v, x.v, _CMP_ORD_Q));
    const __m256i upper = _mm256_srli_epi32(_mm256_blendv_epi8(quiet, nearest, number), 16);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p),
                     _mm_packus_epi32(_mm256_castsi256_si128(upper), _mm256_extracti128_si256(upper, 1)));
  }

  static F32 load(const E8m0* p) {
    const __m128i bytes = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(p));
    const __m256i bits = _mm256_slli_epi32(_mm256_cvtepu8_epi32(bytes), 23), quiet = _mm256_set1_epi32(0x400000);
    const __m256i odd = _mm256_and_si256(_mm256_cmpeq_epi32(bits, _mm256_set1_epi32(255 << 23)), quiet);
    return {_mm256_castsi256_ps(_mm256_or_si256(_mm256_max_epi32(bits, quiet), odd))};
  }
  static F32 load_six(const std::uint16_t* p, std::ptrdiff_t stride, std::ptrdiff_t i) {
    const auto word = [&](std::ptrdiff_t w) { return _mm256_cvtepu16_epi32(load_16_bytes(p + w * stride)); };
    const auto shifted = [&](__m256i v, std::ptrdiff_t by) {
      return _mm256_srl_epi32(v, _mm_cvtsi32_si128(static_cast<int>(by)));
    };
    __m256i bits = i < 6 ? shifted(word(i / 2), i % 2 * 6) : shifted(word(i - 6), 2 * i);
    if (i >= 6) {
      const __m256i upper =
          i == 6 ? _mm256_slli_epi32(shifted(word(1), 12), 4) : _mm256_slli_epi32(shifted(word(2), 12), 2);
      bits = _mm256_or_si256(bits, upper);
    }
    return {_mm256_cvtepi32_ps(_mm256_and_si256(bits, _mm256_set1_epi32(63)))};
  }
  static F32 load(const Int8* p) {
    return {_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p))))};
  }
};

inline F32 operator+(F32 a, F32 b) { return {_mm256_add_ps(a.v, b.v)}; }
inline F32 operator-(F32 a, F32 b) { return {_mm256_sub_ps(a.v, b.v)}; }
inline F32 operator*(F32 a, F32 b) { return {_mm256_mul_ps(a.v, b.v)}; }
inline F32 operator/(F32 a, F32 b) { return {_mm256_div_ps(a.v, b.v)}; }
inline F32 operator-(F32 a) { return {-a.v}; }
inline F32 fma(F32 a, F32 b, F32 c) { return {_mm256_fmadd_ps(a.v, b.v, c.v)}; }
inline F32 max(F32 a, F32 b) { return {_mm256_max_ps(a.v, b.v)}; }
inline F32 min(F32 a, F32 b) { return {_mm256_min_ps(a.v, b.v)}; }
inline F32 abs(F32 a) { return {_mm256_andnot_ps(_mm256_set1_ps(-0.0f), a.v)}; }
inline F32 select_gt(F32 a, F32 b, F32 x, F32 y) {
  return {_mm256_blendv_ps(y.v, x.v, _mm256_cmp_ps(a.v, b.v, _CMP_GT_OQ))};
}
inline F32 select_nan(F32 a, F32 x, F32 y) {
  return {_mm256_blendv_ps(y.v, x.v, _mm256_cmp_ps(a.v, a.v, _CMP_UNORD_Q))};
}
inline F32 round(F32 a) { return {_mm256_round_ps(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)}; }

inline F32 power_of_two(__m256i n) {
  return {_mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(n, _mm256_set1_epi32(127)), 23))};
}

// 2^n itself need not be a float, so it is applied as two factors of about 2^(n/2), built in the exponent field.
// Only the second product can leave the normal range, hence the single rounding.
inline F32 scale(F32 x, F32 n) {
  const __m256i whole = _mm256_cvtps_epi32(n.v);
  const __m256i half = _mm256_srai_epi32(whole, 1);
  return x * power_of_two(half) * power_of_two(_mm256_sub_epi32(whole, half));
}

inline F32 fused(F32 a, F32 b, F32 c) { return fma(a, b, c); }
inline F32 rounded(F32 a) { return a; }

inline float total(F32 a) {
  const __m128 four = _mm_add_ps(_mm256_castps256_ps128(a.v), _mm256_extractf128_ps(a.v, 1));
  const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
}
inline float least(F32 a) {
  const __m128 four = _mm_min_ps(_mm256_castps256_ps128(a.v), _mm256_extractf128_ps(a.v, 1));
  const __m128 two = _mm_min_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_min_ss(two, _mm_movehdup_ps(two)));
}
inline float greatest(F32 a) { return -least(-a); }
inline bool all_zero(F32 a) { return _mm256_movemask_ps(_mm256_cmp_ps(a.v, _mm256_setzero_ps(), _CMP_NEQ_UQ)) == 0; }

// 2 x 2 within lanes, 4 x 4 within lanes, then lanes change places: 24 shuffles.
[[gnu::always_inline]] inline void transpose(F32 (&rows)[8]) {
  __m256 pairs[8], fours[8];
#pragma GCC unroll 4
  for (int i = 0; i < 8; i += 2) {
    pairs[i] = _mm256_unpacklo_ps(rows[i].v, rows[i + 1].v);
    pairs[i + 1] = _mm256_unpackhi_ps(rows[i].v, rows[i + 1].v);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 8; i += 4) {
    fours[i] = _mm256_shuffle_ps(pairs[i], pairs[i + 2], 0x44);
    fours[i + 1] = _mm256_shuffle_ps(pairs[i], pairs[i + 2], 0xee);
    fours[i + 2] = _mm256_shuffle_ps(pairs[i + 1], pairs[i + 3], 0x44);
    fours[i + 3] = _mm256_shuffle_ps(pairs[i + 1], pairs[i + 3], 0xee);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    rows[i].v = _mm256_permute2f128_ps(fours[i], fours[i + 4], 0x20);
    rows[i + 4].v = _mm256_permute2f128_ps(fours[i], fours[i + 4], 0x31);
  }
}

struct I32 {
  __m256i v;

  static I32 set(std::int32_t x) { return {_mm256_set1_epi32(x)}; }
  static I32 load(const void* p) { return {_mm256_loadu_si256(static_cast<const __m256i*>(p))}; }
  static __m128i words(I32 x) { return _mm_packs_epi32(_mm256_castsi256_si128(x.v), _mm256_extracti128_si256(x.v, 1)); }
  static void store(std::uint8_t* p, I32 x) {
    _mm_storel_epi64(reinterpret_cast<__m128i*>(p), _mm_packus_epi16(words(x), words(x)));
  }
  static void store(std::int8_t* p, I32 x) {
    _mm_storel_epi64(reinterpret_cast<__m128i*>(p), _mm_packs_epi16(words(x), words(x)));
  }
  static void store(std::int16_t* p, I32 x) { _mm_storeu_si128(reinterpret_cast<__m128i*>(p), words(x)); }
};

inline I32 max_magnitude(I32 a, F32 x) { return {_mm256_max_epi32(a.v, _mm256_castps_si256(abs(x).v))}; }
inline std::int32_t greatest(I32 a) {
  const __m128i four = _mm_max_epi32(_mm256_castsi256_si128(a.v), _mm256_extracti128_si256(a.v, 1));
  const __m128i two = _mm_max_epi32(four, _mm_shuffle_epi32(four, 0x4e));
  return _mm_cvtsi128_si32(_mm_max_epi32(two, _mm_shuffle_epi32(two, 0xb1)));
}
inline I32 nearest(F32 a) { return {_mm256_cvtps_epi32(a.v)}; }
inline I32 operator+(I32 a, I32 b) { return {_mm256_add_epi32(a.v, b.v)}; }
inline I32 operator-(I32 a, I32 b) { return {_mm256_sub_epi32(a.v, b.v)}; }
inline I32 operator*(I32 a, I32 b) { return {_mm256_mullo_epi32(a.v, b.v)}; }
inline F32 to_float(I32 a) { return {_mm256_cvtepi32_ps(a.v)}; }

// Bytes that codes of 4 bits stand for: those in the lower and those in the upper halves of 32 bytes.
struct Nibbles {
  __m256i low, high;
};

inline __m256i byte_table(const std::int8_t (&integers)[16]) {
  return _mm256_broadcastsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i*>(integers)));
}

// The codes in both halves of 32 bytes.
inline Nibbles halves(const char* codes) {
  const __m256i lanes = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(codes)), mask = _mm256_set1_epi8(15);
  return {_mm256_and_si256(lanes, mask), _mm256_and_si256(_mm256_srli_epi16(lanes, 4), mask)};
}

inline Nibbles look_up(__m256i table, const char* codes) {
  const Nibbles of = halves(codes);
  return {_mm256_shuffle_epi8(table, of.low), _mm256_shuffle_epi8(table, of.high)};
}

inline void store(char* p, __m256i bytes) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), bytes); }

}  // namespace fastlinear::avx2
