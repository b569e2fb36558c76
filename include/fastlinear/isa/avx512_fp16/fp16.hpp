// fp16 x fp16 with fp16 sums, twice as many in a register as floats: fast and coarse, so only for those who ask for it
// (accumulate="fp16"). The sums of 64 products are added to the fp32 tile, which waits in L1.
//
//   tile    accumulators  panels  broadcast   loads per k for its FMAs
//   12x64   24            2       1  (27)     2 + 12 for 24
//
// 64 products bound the error by 64 * 2^-11 of sum |x w|; they overflow if it exceeds 65504 (rows of 64 products of
// numbers below 31 never do). A promotion costs 2 conversions, additions and stores a register: a tenth of its 64 FMAs.
#pragma once

#include "fastlinear/formats/fp16.hpp"
#include "fastlinear/generic/tile.hpp"

namespace fastlinear::avx512_fp16 {

extern const Isa kIsa;

// sums[0..32) = c, or += c
[[gnu::always_inline]] inline void promote(float* sums, __m512h c, bool add) {
  const auto bits = __builtin_bit_cast(__m512i, c);
  const __m512 half[2] = {_mm512_maskz_cvtph_ps(0xffff, _mm512_maskz_extracti64x4_epi64(0xff, bits, 0)),
                          _mm512_maskz_cvtph_ps(0xffff, _mm512_maskz_extracti64x4_epi64(0xff, bits, 1))};
  for (std::ptrdiff_t i = 0; i < 2; ++i)
    _mm512_store_ps(sums + 16 * i, add ? _mm512_add_ps(_mm512_load_ps(sums + 16 * i), half[i]) : half[i]);
}

struct Halves {
  static constexpr Format rows = Format::fp16, accumulate = Format::fp16;
  static constexpr Layout layout{Format::fp16, 32, Fp16::kr};
  static constexpr std::ptrdiff_t k_step = 1, promote_after = 64;

  template <std::ptrdiff_t R, std::ptrdiff_t MR, std::ptrdiff_t P, std::ptrdiff_t Columns>
  static void run(const TileArgs& t) {
    constexpr bool prefetches = 2 * R >= MR;
    const auto* a = static_cast<const _Float16*>(t.a);
    float* sums = static_cast<float*>(t.tile);
    [[maybe_unused]] const char* prefetch = t.prefetch;
    t.lines.fetch();
    bool add = t.accumulate;
    std::ptrdiff_t k = 0;
    do {  // once at least: without a k the sums are zeros
      const std::ptrdiff_t end = t.k - k < promote_after ? t.k : k + promote_after;
      __m512h c[R][P];
#pragma GCC unroll 16
      for (std::ptrdiff_t r = 0; r < R; ++r)
#pragma GCC unroll 2
        for (std::ptrdiff_t p = 0; p < P; ++p) c[r][p] = _mm512_setzero_ph();
      for (; k < end; ++k) {
        __m512h w[P];
#pragma GCC unroll 2
        for (std::ptrdiff_t p = 0; p < P; ++p)
          w[p] = _mm512_loadu_ph(static_cast<const char*>(t.panel) + p * t.panel_stride + k * 64);
        if constexpr (prefetches) {
          _mm_prefetch(prefetch, _MM_HINT_T1);
          if constexpr (P > 1) _mm_prefetch(prefetch + 64, _MM_HINT_T1);
          prefetch += t.prefetch_stride;
        }
#pragma GCC unroll 16
        for (std::ptrdiff_t r = 0; r < R; ++r) {
          const __m512h x = _mm512_set1_ph(a[r * t.lda + k]);
#pragma GCC unroll 2
          for (std::ptrdiff_t p = 0; p < P; ++p) c[r][p] = _mm512_fmadd_ph(x, w[p], c[r][p]);
        }
      }
#pragma GCC unroll 16
      for (std::ptrdiff_t r = 0; r < R; ++r)
#pragma GCC unroll 2
        for (std::ptrdiff_t p = 0; p < P; ++p) promote(sums + r * Columns + p * 32, c[r][p], add);
      add = true;
    } while (k < t.k);
  }
};

inline constexpr Kernel kFp16Kernels[] = {
    kernels::row<Halves, 12, 2>("fp16/avx512_fp16/12x64", kIsa),
};

}  // namespace fastlinear::avx512_fp16
