// Sixteen floats in a zmm register, for the epilogue. Included inside csrc/avx512.cpp's target region only.
// isa/scalar/vec.hpp tells what each verb means.
#pragma once

#include <immintrin.h>

#include <cstddef>
#include <cstdint>

#include "fastlinear/formats/bf16.hpp"
#include "fastlinear/formats/fp16.hpp"
#include "fastlinear/formats/int8.hpp"
#include "fastlinear/formats/scales.hpp"

namespace fastlinear::avx512 {

// Where a verb names a mask of all lanes it gets the plain instruction; GCC 12 wrongly warns that the unmasked
// intrinsic reads an uninitialized register.
inline constexpr __mmask16 kAll = 0xffff;

struct F32 {
  static constexpr std::ptrdiff_t width = 16;
  static constexpr int rows_in_step = 4;
  __m512 v;

  static F32 set(float x) { return {_mm512_set1_ps(x)}; }
  static F32 load(const float* p) { return {_mm512_loadu_ps(p)}; }
  static void store(float* p, F32 x) { _mm512_storeu_ps(p, x.v); }
  static void store_n(float* p, F32 x, std::ptrdiff_t n) {
    _mm512_mask_storeu_ps(p, static_cast<__mmask16>((1u << n) - 1u), x.v);
  }

  static __m256i load_32_bytes(const void* p) { return _mm256_loadu_si256(static_cast<const __m256i*>(p)); }
  static void store_32_bytes(void* p, __m256i x) { _mm256_storeu_si256(static_cast<__m256i*>(p), x); }

  static F32 load(const Fp16* p) { return {_mm512_maskz_cvtph_ps(kAll, load_32_bytes(p))}; }
  static void store(Fp16* p, F32 x) { store_32_bytes(p, _mm512_maskz_cvtps_ph(kAll, x.v, _MM_FROUND_TO_NEAREST_INT)); }
  static __m512i load_words(const void* p) { return _mm512_maskz_cvtepu16_epi32(kAll, load_32_bytes(p)); }
  static F32 load(const Bf16* p) { return {_mm512_castsi512_ps(_mm512_maskz_slli_epi32(kAll, load_words(p), 16))}; }
  static void load_pairs(const Bf16* p, F32& even, F32& odd) {
    const __m512i both = _mm512_loadu_si512(p);
    even.v = _mm512_castsi512_ps(_mm512_maskz_slli_epi32(kAll, both, 16));
    odd.v = _mm512_castsi512_ps(_mm512_and_si512(both, _mm512_set1_epi32(static_cast<int>(0xffff0000u))));
  }
  // Of values that bf16 holds.
  static void store_pairs(Bf16* p, F32 even, F32 odd) {
    const __m512i low = _mm512_maskz_srli_epi32(kAll, _mm512_castps_si512(even.v), 16);
    _mm512_storeu_si512(p, _mm512_or_si512(low, _mm512_castps_si512(odd.v)));
  }
  // With the bits of the nearest bf16 in its upper half, as formats/bf16.hpp rounds; vcvtneps2bf16 would flush
  // denormals.
  static __m512i nearest_bf16(F32 x) {
    const __m512i bits = _mm512_castps_si512(x.v);
    const __m512i last = _mm512_and_si512(_mm512_maskz_srli_epi32(kAll, bits, 16), _mm512_set1_epi32(1));
    const __m512i nearest = _mm512_add_epi32(bits, _mm512_add_epi32(last, _mm512_set1_epi32(0x7fff)));
    const __m512i quiet = _mm512_or_si512(bits, _mm512_set1_epi32(0x400000));
    return _mm512_mask_blend_epi32(_mm512_cmp_ps_mask(x.v, x.v, _CMP_ORD_Q), quiet, nearest);
  }
  static void store(Bf16* p, F32 x) {
    store_32_bytes(p, _mm512_maskz_cvtepi32_epi16(kAll, _mm512_maskz_srli_epi32(kAll, nearest_bf16(x), 16)));
  }

  static F32 load(const E8m0* p) {
    const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
    const __m512i bits = _mm512_maskz_slli_epi32(kAll, _mm512_maskz_cvtepu8_epi32(kAll, bytes), 23);
    const __mmask16 odd = _mm512_cmpeq_epi32_mask(bits, _mm512_set1_epi32(255 << 23));
    const __m512i least = _mm512_maskz_max_epi32(kAll, bits, _mm512_set1_epi32(0x400000));
    return {_mm512_castsi512_ps(_mm512_mask_or_epi32(least, odd, least, _mm512_set1_epi32(0x400000)))};
  }
  static F32 load_six(const std::uint16_t* p, std::ptrdiff_t stride, std::ptrdiff_t i) {
    const auto word = [&](std::ptrdiff_t w) { return load_words(p + w * stride); };
    const auto shifted = [&](__m512i v, std::ptrdiff_t by) {
      return _mm512_maskz_srl_epi32(kAll, v, _mm_cvtsi32_si128(static_cast<int>(by)));
    };
    __m512i bits = i < 6 ? shifted(word(i / 2), i % 2 * 6) : shifted(word(i - 6), 2 * i);
    if (i >= 6) {
      const __m512i upper = i == 6 ? _mm512_maskz_slli_epi32(kAll, shifted(word(1), 12), 4)
                                   : _mm512_maskz_slli_epi32(kAll, shifted(word(2), 12), 2);
      bits = _mm512_or_si512(bits, upper);
    }
    return {_mm512_maskz_cvtepi32_ps(kAll, _mm512_and_si512(bits, _mm512_set1_epi32(63)))};
  }
  static F32 load(const Int8* p) {
    const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
    return {_mm512_maskz_cvtepi32_ps(kAll, _mm512_maskz_cvtepi8_epi32(kAll, bytes))};
  }
};

inline F32 operator+(F32 a, F32 b) { return {_mm512_add_ps(a.v, b.v)}; }
inline F32 operator-(F32 a, F32 b) { return {_mm512_sub_ps(a.v, b.v)}; }
inline F32 operator*(F32 a, F32 b) { return {_mm512_mul_ps(a.v, b.v)}; }
inline F32 operator/(F32 a, F32 b) { return {_mm512_div_ps(a.v, b.v)}; }
inline F32 operator-(F32 a) { return {-a.v}; }
inline F32 fma(F32 a, F32 b, F32 c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }
inline F32 max(F32 a, F32 b) { return {_mm512_maskz_max_ps(kAll, a.v, b.v)}; }
inline F32 min(F32 a, F32 b) { return {_mm512_maskz_min_ps(kAll, a.v, b.v)}; }
inline F32 abs(F32 a) { return {_mm512_abs_ps(a.v)}; }
inline F32 select_gt(F32 a, F32 b, F32 x, F32 y) {
  return {_mm512_mask_blend_ps(_mm512_cmp_ps_mask(a.v, b.v, _CMP_GT_OQ), y.v, x.v)};
}
inline F32 select_nan(F32 a, F32 x, F32 y) {
  return {_mm512_mask_blend_ps(_mm512_cmp_ps_mask(a.v, a.v, _CMP_UNORD_Q), y.v, x.v)};
}
inline F32 round(F32 a) { return {_mm512_maskz_roundscale_ps(kAll, a.v, _MM_FROUND_TO_NEAREST_INT)}; }
inline F32 scale(F32 x, F32 n) { return {_mm512_maskz_scalef_ps(kAll, x.v, n.v)}; }

inline F32 fused(F32 a, F32 b, F32 c) { return fma(a, b, c); }
inline F32 rounded(F32 a) { return a; }
// As formats/bf16.hpp rounds, in fp32.
inline F32 nearest_bf16(F32 x) {
  const __m512i nearest = F32::nearest_bf16(x);
  return {_mm512_castsi512_ps(_mm512_and_si512(nearest, _mm512_set1_epi32(static_cast<int>(0xffff0000u))))};
}
template <int Which>
inline __m256i half(__m512i v) {
  return _mm512_maskz_extracti64x4_epi64(0xf, v, Which);
}
inline float total(F32 a) {
  const __m512i bits = _mm512_castps_si512(a.v);
  const __m256 eight = _mm256_add_ps(_mm256_castsi256_ps(half<0>(bits)), _mm256_castsi256_ps(half<1>(bits)));
  const __m128 four = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
  const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
}
inline float least(F32 a) {
  const __m512i bits = _mm512_castps_si512(a.v);
  const __m256 eight = _mm256_min_ps(_mm256_castsi256_ps(half<0>(bits)), _mm256_castsi256_ps(half<1>(bits)));
  const __m128 four = _mm_min_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
  const __m128 two = _mm_min_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_min_ss(two, _mm_movehdup_ps(two)));
}
inline float greatest(F32 a) { return -least(-a); }
inline bool all_zero(F32 a) { return _mm512_cmp_ps_mask(a.v, _mm512_setzero_ps(), _CMP_NEQ_UQ) == 0; }

// 4 x 4 within the lanes of 128 bits, then these change places, twice: 64 shuffles.
[[gnu::always_inline]] inline void transpose(F32 (&rows)[16]) {
  __m512 a[16], b[16];
#pragma GCC unroll 8
  for (int i = 0; i < 16; i += 2) {
    a[i] = _mm512_maskz_unpacklo_ps(kAll, rows[i].v, rows[i + 1].v);
    a[i + 1] = _mm512_maskz_unpackhi_ps(kAll, rows[i].v, rows[i + 1].v);
  }
#pragma GCC unroll 8
  for (int i = 0; i < 16; i += 4) {  // b[i + j]: column j of rows i to i + 3, of each lane
    b[i] = _mm512_maskz_shuffle_ps(kAll, a[i], a[i + 2], 0x44);
    b[i + 1] = _mm512_maskz_shuffle_ps(kAll, a[i], a[i + 2], 0xee);
    b[i + 2] = _mm512_maskz_shuffle_ps(kAll, a[i + 1], a[i + 3], 0x44);
    b[i + 3] = _mm512_maskz_shuffle_ps(kAll, a[i + 1], a[i + 3], 0xee);
  }
#pragma GCC unroll 8
  for (int j = 0; j < 4; ++j) {  // lanes 0 and 2, and 1 and 3, of the upper and of the lower rows
    a[j] = _mm512_maskz_shuffle_f32x4(kAll, b[j], b[j + 4], 0x88);
    a[j + 4] = _mm512_maskz_shuffle_f32x4(kAll, b[j], b[j + 4], 0xdd);
    a[j + 8] = _mm512_maskz_shuffle_f32x4(kAll, b[j + 8], b[j + 12], 0x88);
    a[j + 12] = _mm512_maskz_shuffle_f32x4(kAll, b[j + 8], b[j + 12], 0xdd);
  }
#pragma GCC unroll 8
  for (int j = 0; j < 4; ++j) {
    rows[j].v = _mm512_maskz_shuffle_f32x4(kAll, a[j], a[j + 8], 0x88);
    rows[j + 4].v = _mm512_maskz_shuffle_f32x4(kAll, a[j + 4], a[j + 12], 0x88);
    rows[j + 8].v = _mm512_maskz_shuffle_f32x4(kAll, a[j], a[j + 8], 0xdd);
    rows[j + 12].v = _mm512_maskz_shuffle_f32x4(kAll, a[j + 4], a[j + 12], 0xdd);
  }
}

struct I32 {
  __m512i v;

  static I32 set(std::int32_t x) { return {_mm512_set1_epi32(x)}; }
  static I32 load(const void* p) { return {_mm512_loadu_si512(p)}; }
  static void store(std::uint8_t* p, I32 x) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm512_maskz_cvtepi32_epi8(kAll, x.v));
  }
  static void store(std::int8_t* p, I32 x) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm512_maskz_cvtepi32_epi8(kAll, x.v));
  }
  static void store(std::int16_t* p, I32 x) { F32::store_32_bytes(p, _mm512_maskz_cvtepi32_epi16(kAll, x.v)); }
};

inline I32 max_magnitude(I32 a, F32 x) { return {_mm512_maskz_max_epi32(kAll, a.v, _mm512_castps_si512(abs(x).v))}; }
inline std::int32_t greatest(I32 a) {
  const __m256i eight = _mm256_max_epi32(half<0>(a.v), half<1>(a.v));
  const __m128i four = _mm_max_epi32(_mm256_castsi256_si128(eight), _mm256_extracti128_si256(eight, 1));
  const __m128i two = _mm_max_epi32(four, _mm_shuffle_epi32(four, 0x4e));
  return _mm_cvtsi128_si32(_mm_max_epi32(two, _mm_shuffle_epi32(two, 0xb1)));
}
inline I32 nearest(F32 a) { return {_mm512_maskz_cvtps_epi32(kAll, a.v)}; }
inline I32 operator+(I32 a, I32 b) { return {_mm512_add_epi32(a.v, b.v)}; }
inline I32 operator-(I32 a, I32 b) { return {_mm512_sub_epi32(a.v, b.v)}; }
inline I32 operator*(I32 a, I32 b) { return {_mm512_mullo_epi32(a.v, b.v)}; }
inline F32 to_float(I32 a) { return {_mm512_maskz_cvtepi32_ps(kAll, a.v)}; }

// Bytes that codes of 4 bits stand for: those in the lower and those in the upper halves of 64 bytes.
struct Nibbles {
  __m512i low, high;
};

inline __m512i byte_table(const std::int8_t (&integers)[16]) {
  return _mm512_maskz_broadcast_i32x4(kAll, _mm_loadu_si128(reinterpret_cast<const __m128i*>(integers)));
}

// The codes in both halves of 64 bytes, which are loaded once: GCC would do it for either half.
inline Nibbles halves(const char* codes) {
  __m512i lanes = _mm512_loadu_si512(codes);
  asm("" : "+v"(lanes));
  const __m512i mask = _mm512_set1_epi8(15);
  return {_mm512_and_si512(lanes, mask), _mm512_and_si512(_mm512_srli_epi16(lanes, 4), mask)};
}

inline Nibbles look_up(__m512i table, const char* codes) {
  const Nibbles of = halves(codes);
  return {_mm512_shuffle_epi8(table, of.low), _mm512_shuffle_epi8(table, of.high)};
}

inline void store(char* p, __m512i bytes) { _mm512_storeu_si512(p, bytes); }

}  // namespace fastlinear::avx512
