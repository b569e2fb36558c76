// fp32 on AVX2 + FMA. Panels of 16 columns (two registers a k step); one, two or four panels at once.
//
//   tile   accumulators  panel  broadcast  of 16   loads per k for its FMAs    meant for
//   6x16   12            2      1          15      2 + 6 for 12                M from 5 up
//   3x32   12            1      3          16      4 + 3 for 12                M = 2, 3
//   1x64   8             1      1          10      8 + 1 for 8                 M = 1: eight chains cover the latency of
//                                                                              two FMA ports
#pragma once

#include "fastlinear/generic/tile.hpp"

namespace fastlinear::avx2 {

extern const Isa kIsa;

struct Fp32Weights {
  using Vector = __m256;
  static constexpr std::ptrdiff_t lanes = 8, registers = 16;

  using Sum = float;
  using Row = float;
  static constexpr Format rows = Format::fp32;
  using Weight = float;
  static constexpr Layout layout{Format::fp32, 16, 1};
  static constexpr std::ptrdiff_t steps = 1;

  static Vector zero() { return _mm256_setzero_ps(); }
  static Vector load(const float* p) { return _mm256_load_ps(p); }
  static void store(float* p, Vector c) { _mm256_store_ps(p, c); }
  static Vector row(const float* a) { return _mm256_broadcast_ss(a); }
  static Vector last_row(const float* a) { return row(a); }
  static Vector weights(const float* p, std::ptrdiff_t) { return _mm256_loadu_ps(p); }
  static Vector multiply_add(Vector x, Vector w, Vector c) { return _mm256_fmadd_ps(x, w, c); }
};

inline constexpr Kernel kFp32Kernels[] = {
    kernels::row<kernels::Tile<Fp32Weights>, 6, 1>("fp32/avx2/6x16", kIsa),
    kernels::row<kernels::Tile<Fp32Weights>, 3, 2>("fp32/avx2/3x32", kIsa),
    kernels::row<kernels::Tile<Fp32Weights>, 1, 4>("fp32/avx2/1x64", kIsa),
};

}  // namespace fastlinear::avx2
