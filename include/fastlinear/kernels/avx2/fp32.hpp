// fp32 on AVX2 + FMA. Panels of 16 columns (two registers a k step); one, two or four panels at once.
//
//   tile   accumulators  panel  broadcast  of 16   loads per k for its FMAs    meant for
//   6x16   12            2      1          15      2 + 6 for 12                M from 5 up
//   3x32   12            1      3          16      4 + 3 for 12                M = 2, 3
//   1x64   8             1      1          10      8 + 1 for 8                 M = 1: eight chains cover the latency of
//                                                                              two FMA ports
//
// Where the tile is wider than high, the rows' values wait in registers and the panel is loaded one register at a time;
// otherwise the other way round. K is not unrolled: loop control uses ports the FMAs do not.
#pragma once

#include "fastlinear/kernel.hpp"

namespace fastlinear::avx2 {

inline constexpr Layout kFp32Layout{Format::fp32, 16, 1};

// R of MR rows, P of Columns / 16 panels. Row tiles are balanced, so one with less than half of the rows is the only
// one: it streams the panel, the hardware prefetches, and our own prefetches would only cost it bandwidth.
template <std::ptrdiff_t R, std::ptrdiff_t MR, std::ptrdiff_t P, std::ptrdiff_t Columns>
void fp32_tile(const TileArgs& t) {
  constexpr std::ptrdiff_t V = 2 * P;
  constexpr bool prefetches = MR > 1 && 2 * R >= MR;
  const float* a = static_cast<const float*>(t.a);
  const float* panel[P];
#pragma GCC unroll 4
  for (std::ptrdiff_t p = 0; p < P; ++p)
    panel[p] = reinterpret_cast<const float*>(static_cast<const char*>(t.panel) + p * t.panel_stride);
  float* tile = static_cast<float*>(t.tile);
  [[maybe_unused]] const char* prefetch = t.prefetch;

  __m256 c[R][V];
#pragma GCC unroll 8
  for (std::ptrdiff_t r = 0; r < R; ++r)
#pragma GCC unroll 8
    for (std::ptrdiff_t v = 0; v < V; ++v)
      c[r][v] = t.accumulate ? _mm256_load_ps(tile + r * Columns + v * 8) : _mm256_setzero_ps();

  for (std::ptrdiff_t k = 0; k < t.k; ++k) {
    if constexpr (prefetches) {
#pragma GCC unroll 4
      for (std::ptrdiff_t p = 0; p < P; ++p) _mm_prefetch(prefetch + p * 64, _MM_HINT_T1);
      prefetch += t.prefetch_stride;
    }
    if constexpr (R < V) {
      __m256 x[R];
#pragma GCC unroll 8
      for (std::ptrdiff_t r = 0; r < R; ++r) x[r] = _mm256_broadcast_ss(a + r * t.lda + k);
#pragma GCC unroll 8
      for (std::ptrdiff_t v = 0; v < V; ++v) {
        const __m256 b = _mm256_loadu_ps(panel[v / 2] + k * 16 + v % 2 * 8);
#pragma GCC unroll 8
        for (std::ptrdiff_t r = 0; r < R; ++r) c[r][v] = _mm256_fmadd_ps(x[r], b, c[r][v]);
      }
    } else {
      __m256 b[V];
#pragma GCC unroll 8
      for (std::ptrdiff_t v = 0; v < V; ++v) b[v] = _mm256_loadu_ps(panel[v / 2] + k * 16 + v % 2 * 8);
#pragma GCC unroll 8
      for (std::ptrdiff_t r = 0; r < R; ++r) {
        const __m256 x = _mm256_broadcast_ss(a + r * t.lda + k);
#pragma GCC unroll 8
        for (std::ptrdiff_t v = 0; v < V; ++v) c[r][v] = _mm256_fmadd_ps(x, b[v], c[r][v]);
      }
    }
  }

#pragma GCC unroll 8
  for (std::ptrdiff_t r = 0; r < R; ++r)
#pragma GCC unroll 8
    for (std::ptrdiff_t v = 0; v < V; ++v) _mm256_store_ps(tile + r * Columns + v * 8, c[r][v]);
}

using Run = void (*)(const TileArgs&);

// One instance for each number of rows, so that tails run at full speed.
template <std::ptrdiff_t P, std::ptrdiff_t Columns, std::ptrdiff_t... R>
void fp32_rows(const TileArgs& t) {
  static constexpr Run rows[] = {fp32_tile<R, sizeof...(R), P, Columns>...};
  rows[t.rows - 1](t);
}

inline void fp32_6x16(const TileArgs& t) { fp32_rows<1, 16, 1, 2, 3, 4, 5, 6>(t); }

inline void fp32_3x32(const TileArgs& t) {
  static constexpr Run panels[] = {fp32_rows<1, 32, 1, 2, 3>, fp32_rows<2, 32, 1, 2, 3>};
  panels[t.panels - 1](t);
}

inline void fp32_1x64(const TileArgs& t) {
  static constexpr Run panels[] = {fp32_tile<1, 1, 1, 64>, fp32_tile<1, 1, 2, 64>, fp32_tile<1, 1, 3, 64>,
                                   fp32_tile<1, 1, 4, 64>};
  panels[t.panels - 1](t);
}

inline constexpr Kernel kFp32Kernels[] = {
    {"fp32/avx2/6x16", Isa::avx2, Format::fp32, kFp32Layout, 6, 1, fp32_6x16},
    {"fp32/avx2/3x32", Isa::avx2, Format::fp32, kFp32Layout, 3, 2, fp32_3x32},
    {"fp32/avx2/1x64", Isa::avx2, Format::fp32, kFp32Layout, 1, 4, fp32_1x64},
};

}  // namespace fastlinear::avx2
