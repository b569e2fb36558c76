// fp32 in plain C++, for a CPU without AVX2 and as the driver's test double. The columns of a panel are one inner loop,
// which the compiler turns into the baseline's SSE2.
#pragma once

#include "fastlinear/kernel.hpp"

namespace fastlinear::scalar {

inline constexpr Layout kFp32Layout{Format::fp32, 16, 1};

inline void fp32_4x16(const TileArgs& t) {
  constexpr std::ptrdiff_t Columns = 16;
  const float* a = static_cast<const float*>(t.a);
  const float* panel = static_cast<const float*>(t.panel);
  float* tile = static_cast<float*>(t.tile);
  for (std::ptrdiff_t r = 0; r < t.rows; ++r) {
    float c[Columns];
    for (std::ptrdiff_t j = 0; j < Columns; ++j) c[j] = t.accumulate ? tile[r * Columns + j] : 0.0f;
    for (std::ptrdiff_t k = 0; k < t.k; ++k) {
      const float x = a[r * t.lda + k];
      for (std::ptrdiff_t j = 0; j < Columns; ++j) c[j] += x * panel[k * Columns + j];
    }
    for (std::ptrdiff_t j = 0; j < Columns; ++j) tile[r * Columns + j] = c[j];
  }
}

inline constexpr Kernel kFp32Kernels[] = {
    {"fp32/scalar/4x16", Isa::scalar, Format::fp32, kFp32Layout, 4, 1, fp32_4x16},
};

}  // namespace fastlinear::scalar
