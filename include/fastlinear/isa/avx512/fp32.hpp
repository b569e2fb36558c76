// fp32 on AVX-512. Panels of 32 columns (two registers a k step), one panel or two at once.
//
//   tile    accumulators  panel  broadcast   loads per k for its FMAs    meant for
//   14x32   28            2      1  (31)     2 + 14 for 28               two 512-bit FMA ports, long rows of tiles
//   6x64    24            4      1  (29)     4 + 6  for 24               one FMA port or few rows; six rows never
//                                                                        crowd an 8-way L1 when lda is a power of two
//
// Both hide the FMA latency (4 cycles on two ports wants 8 chains) down to one row of two panels (4 chains: enough,
// since one row waits for memory anyway).
#pragma once

#include "fastlinear/generic/tile.hpp"

namespace fastlinear::avx512 {

extern const Isa kIsa;

struct Fp32Weights {
  using Vector = __m512;
  static constexpr std::ptrdiff_t lanes = 16, registers = 32;

  using Sum = float;
  using Row = float;
  static constexpr Format rows = Format::fp32;
  using Weight = float;
  static constexpr Layout layout{Format::fp32, 32, 1};
  static constexpr std::ptrdiff_t steps = 1;

  static Vector zero() { return _mm512_setzero_ps(); }
  static Vector load(const float* p) { return _mm512_load_ps(p); }
  static void store(float* p, Vector c) { _mm512_store_ps(p, c); }
  static Vector row(const float* a) { return _mm512_set1_ps(*a); }
  static Vector last_row(const float* a) { return row(a); }
  static Vector weights(const float* p, std::ptrdiff_t) { return _mm512_loadu_ps(p); }
  static Vector multiply_add(Vector x, Vector w, Vector c) { return _mm512_fmadd_ps(x, w, c); }
};

inline constexpr Kernel kFp32Kernels[] = {
    kernels::row<kernels::Tile<Fp32Weights>, 6, 2>("fp32/avx512/6x64", kIsa),
    kernels::row<kernels::Tile<Fp32Weights>, 14, 1>("fp32/avx512/14x32", kIsa),
};

}  // namespace fastlinear::avx512
