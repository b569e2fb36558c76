// Plain C++, for a CPU without AVX2 and as the driver's test double: every format in one loop. The columns of a panel
// are the inner loop, which the compiler turns into the baseline's SSE2.
#pragma once

#include "fastlinear/kernel.hpp"

namespace fastlinear::scalar {

inline float to_float(float x) { return x; }

template <class Weight, std::ptrdiff_t Columns, std::ptrdiff_t KR>
void tile(const TileArgs& t) {
  const float* a = static_cast<const float*>(t.a);
  const Weight* panel = static_cast<const Weight*>(t.panel);
  float* tile = static_cast<float*>(t.tile);
  for (std::ptrdiff_t r = 0; r < t.rows; ++r) {
    float c[Columns];
    for (std::ptrdiff_t j = 0; j < Columns; ++j) c[j] = t.accumulate ? tile[r * Columns + j] : 0.0f;
    for (std::ptrdiff_t k = 0; k < t.k; ++k) {
      const float x = a[r * t.lda + k];
      const Weight* w = panel + k / KR * (KR * Columns) + k % KR;
      for (std::ptrdiff_t j = 0; j < Columns; ++j) c[j] += x * to_float(w[j * KR]);
    }
    for (std::ptrdiff_t j = 0; j < Columns; ++j) tile[r * Columns + j] = c[j];
  }
}

}  // namespace fastlinear::scalar
