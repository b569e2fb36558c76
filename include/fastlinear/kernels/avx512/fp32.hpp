// fp32 on AVX-512. Panels of 32 columns (two registers a k step), one panel or two at once.
//
//   tile    accumulators  panel  broadcast   loads per k for its FMAs    meant for
//   14x32   28            2      1  (31)     2 + 14 for 28               two 512-bit FMA ports, long rows of tiles
//   6x64    24            4      1  (29)     4 + 6  for 24               one FMA port or few rows; six rows never
//                                                                        crowd an 8-way L1 when lda is a power of two
//
// Both hide the FMA latency (4 cycles on two ports wants 8 chains) down to one row of two panels (4 chains: enough,
// since one row waits for memory anyway). K is not unrolled: the loop overhead is two scalar instructions on ports the
// FMAs do not use.
//
//   for k:  b[v] = panel[k][v];  for each row: x = broadcast A[row][k]; c[row][v] += x * b[v]
#pragma once

#include "fastlinear/kernel.hpp"

namespace fastlinear::avx512 {

inline constexpr Layout kFp32Layout{Format::fp32, 32, 1};

// R of MR rows, P of Columns / 32 panels. Row tiles are balanced, so one with less than half of the rows is the only
// one: it streams the panel, the hardware prefetches, and our own prefetches would only cost it bandwidth (7 % at R =
// 1).
template <std::ptrdiff_t R, std::ptrdiff_t MR, std::ptrdiff_t P, std::ptrdiff_t Columns>
void fp32_tile(const TileArgs& t) {
  constexpr std::ptrdiff_t V = 2 * P;
  constexpr bool prefetches = 2 * R >= MR;
  const float* a = static_cast<const float*>(t.a);
  const float* panel[P];
#pragma GCC unroll 4
  for (std::ptrdiff_t p = 0; p < P; ++p)
    panel[p] = reinterpret_cast<const float*>(static_cast<const char*>(t.panel) + p * t.panel_stride);
  float* tile = static_cast<float*>(t.tile);
  [[maybe_unused]] const char* prefetch = t.prefetch;

  __m512 c[R][V];
#pragma GCC unroll 16
  for (std::ptrdiff_t r = 0; r < R; ++r)
#pragma GCC unroll 8
    for (std::ptrdiff_t v = 0; v < V; ++v)
      c[r][v] = t.accumulate ? _mm512_load_ps(tile + r * Columns + v * 16) : _mm512_setzero_ps();

  for (std::ptrdiff_t k = 0; k < t.k; ++k) {
    __m512 b[V];
#pragma GCC unroll 8
    for (std::ptrdiff_t v = 0; v < V; ++v) b[v] = _mm512_loadu_ps(panel[v / 2] + k * 32 + v % 2 * 16);
    if constexpr (prefetches) {
      _mm_prefetch(prefetch, _MM_HINT_T1);
      _mm_prefetch(prefetch + 64, _MM_HINT_T1);
      prefetch += t.prefetch_stride;
    }
#pragma GCC unroll 16
    for (std::ptrdiff_t r = 0; r < R; ++r) {
      const __m512 x = _mm512_set1_ps(a[r * t.lda + k]);
#pragma GCC unroll 8
      for (std::ptrdiff_t v = 0; v < V; ++v) c[r][v] = _mm512_fmadd_ps(x, b[v], c[r][v]);
    }
  }

#pragma GCC unroll 16
  for (std::ptrdiff_t r = 0; r < R; ++r)
#pragma GCC unroll 8
    for (std::ptrdiff_t v = 0; v < V; ++v) _mm512_store_ps(tile + r * Columns + v * 16, c[r][v]);
}

// One instance for each number of rows and panels, so that tails run at full speed.
template <std::ptrdiff_t Panels, std::ptrdiff_t... R>
void fp32_run(const TileArgs& t) {
  using Run = void (*)(const TileArgs&);
  static constexpr Run one[] = {fp32_tile<R, sizeof...(R), 1, 32 * Panels>...};
  static constexpr Run all[] = {fp32_tile<R, sizeof...(R), Panels, 32 * Panels>...};
  (t.panels == 1 ? one : all)[t.rows - 1](t);
}

inline constexpr Kernel kFp32Kernels[] = {
    {"fp32/avx512/6x64", Isa::avx512, Format::fp32, kFp32Layout, 6, 2, fp32_run<2, 1, 2, 3, 4, 5, 6>},
    {"fp32/avx512/14x32", Isa::avx512, Format::fp32, kFp32Layout, 14, 1,
     fp32_run<1, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14>},
};

}  // namespace fastlinear::avx512
