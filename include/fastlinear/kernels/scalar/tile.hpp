// Plain C++, for a CPU without AVX2 and as the driver's test double: every format in one loop. The columns of a panel
// are the inner loop, which the compiler turns into the baseline's SSE2.
#pragma once

#include "fastlinear/formats/bf16.hpp"
#include "fastlinear/formats/fp16.hpp"
#include "fastlinear/formats/int8.hpp"
#include "fastlinear/kernel.hpp"

namespace fastlinear::scalar {

inline float number(float x) { return x; }
inline float number(Bf16 x) { return to_float(x); }
inline float number(Fp16 x) { return to_float(x); }
inline float number(Int8 x) { return to_float(x); }
inline std::int32_t number(std::int8_t x) { return x; }

template <class Weight, std::ptrdiff_t Columns, std::ptrdiff_t KR, class Row = float, class Sum = float>
void tile(const TileArgs& t) {
  const Row* a = static_cast<const Row*>(t.a);
  const Weight* panel = static_cast<const Weight*>(t.panel);
  Sum* tile = static_cast<Sum*>(t.tile);
  for (std::ptrdiff_t r = 0; r < t.rows; ++r) {
    Sum c[Columns];
    for (std::ptrdiff_t j = 0; j < Columns; ++j) c[j] = t.accumulate ? tile[r * Columns + j] : Sum{};
    for (std::ptrdiff_t k = 0; k < t.k; ++k) {
      const Sum x = a[r * t.lda + k];
      const Weight* w = panel + k / KR * (KR * Columns) + k % KR;
      for (std::ptrdiff_t j = 0; j < Columns; ++j) c[j] += x * number(w[j * KR]);
    }
    for (std::ptrdiff_t j = 0; j < Columns; ++j) tile[r * Columns + j] = c[j];
  }
}

}  // namespace fastlinear::scalar
