// csrc/avx512_fp16.cpp for CPUs without AVX512-FP16: the kernels themselves, with the fp16 arithmetic that they use
// in double. The functions below stand in the kernels' own namespace, where unqualified names are looked up first, so
// that the kernels call them instead of the intrinsics of the same names.
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <iterator>
#include <utility>

#include "fastlinear/contract/isa.hpp"
#include "fastlinear/contract/kernel.hpp"
#include "fastlinear/host/target.hpp"

FL_TARGET_BEGIN("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")

namespace fastlinear::avx512_fp16 {

[[gnu::always_inline]] inline __m512h _mm512_set1_ph(_Float16 x) {
  return __builtin_bit_cast(__m512h, _mm512_set1_epi16(__builtin_bit_cast(short, x)));
}

[[gnu::always_inline]] inline __m512h _mm512_setzero_ph() {
  return __builtin_bit_cast(__m512h, _mm512_setzero_si512());
}

[[gnu::always_inline]] inline __m512h _mm512_loadu_ph(const void* p) {
  return __builtin_bit_cast(__m512h, _mm512_loadu_si512(p));
}

// Masks of all lanes, for GCC 12's sake: see isa/avx512/vec.hpp.
inline __m512d widen(__m128i x) { return _mm512_maskz_cvtps_pd(0xff, _mm256_cvtph_ps(x)); }

// To float, cut off and made odd where that lost something; then to nearest, which sees what was lost: rounded once.
inline __m128i narrow(__m512d x) {
  const __m256 cut = _mm512_maskz_cvt_roundpd_ps(0xff, x, _MM_FROUND_TO_ZERO | _MM_FROUND_NO_EXC);
  const __mmask8 lossy = _mm512_cmp_pd_mask(_mm512_maskz_cvtps_pd(0xff, cut), x, _CMP_NEQ_OQ);
  const __m256i bits = _mm256_castps_si256(cut);
  const __m256i odd = _mm256_mask_or_epi32(bits, lossy, bits, _mm256_set1_epi32(1));
  return _mm256_cvtps_ph(_mm256_castsi256_ps(odd), _MM_FROUND_TO_NEAREST_INT);
}

// a * b + c, rounded once: in double it is exact, or the smaller addend, 42 bits below the larger, is too small to
// bring an fp16 number (or a product's 22 bits) near to where its rounding changes. No inlining: it would be in each
// kernel hundreds of times.
[[gnu::noinline]] inline __m512h _mm512_fmadd_ph(const __m512h& a, const __m512h& b, const __m512h& c) {
  __m128i x[4], y[4], z[4];
  std::memcpy(x, &a, sizeof x);
  std::memcpy(y, &b, sizeof y);
  std::memcpy(z, &c, sizeof z);
  for (std::size_t i = 0; i < 4; ++i) z[i] = narrow(_mm512_fmadd_pd(widen(x[i]), widen(y[i]), widen(z[i])));
  return __builtin_bit_cast(__m512h, z);
}

}  // namespace fastlinear::avx512_fp16

#include "fastlinear/isa/avx512_fp16/fp16.hpp"

namespace fastlinear {

extern const IsaTable kAvx512Fp16Table;
const IsaTable kAvx512Fp16Table{Isa::avx512_fp16, {{}, {}, avx512_fp16::kFp16Kernels}};

}  // namespace fastlinear

FL_TARGET_END
