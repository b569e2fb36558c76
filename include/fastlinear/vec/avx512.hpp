// Sixteen floats in a zmm register, for the epilogue. Included inside csrc/avx512.cpp's target region only.
// vec/scalar.hpp tells what each verb means.
#pragma once

#include <immintrin.h>

#include <cstddef>

namespace fastlinear::avx512 {

struct F32 {
  static constexpr std::ptrdiff_t width = 16;
  __m512 v;

  static F32 set(float x) { return {_mm512_set1_ps(x)}; }
  static F32 load(const float* p) { return {_mm512_loadu_ps(p)}; }
  static void store(float* p, F32 x) { _mm512_storeu_ps(p, x.v); }
  static void store_n(float* p, F32 x, std::ptrdiff_t n) {
    _mm512_mask_storeu_ps(p, static_cast<__mmask16>((1u << n) - 1u), x.v);
  }
};

// Where a verb names a mask of all lanes it gets the plain instruction; GCC 12 wrongly warns that the unmasked
// intrinsic reads an uninitialised register.
inline constexpr __mmask16 kAll = 0xffff;

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
inline F32 round(F32 a) { return {_mm512_maskz_roundscale_ps(kAll, a.v, _MM_FROUND_TO_NEAREST_INT)}; }
inline F32 scale(F32 x, F32 n) { return {_mm512_maskz_scalef_ps(kAll, x.v, n.v)}; }

}  // namespace fastlinear::avx512
