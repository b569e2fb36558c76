// Plain C++, for a CPU without AVX2 and as the driver's test double: every format in one loop. The columns of a panel
// are the inner loop, which the compiler turns into the baseline's SSE2.
#pragma once

#include "fastlinear/contract/kernel.hpp"
#include "fastlinear/formats/bf16.hpp"
#include "fastlinear/formats/fp16.hpp"
#include "fastlinear/formats/int8.hpp"

namespace fastlinear::scalar {

extern const Isa kIsa;

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

inline constexpr Kernel kFp32Kernels[] = {
    {"fp32/scalar/4x16", kIsa, Format::fp32, {Format::fp32, 16, 1}, 4, 1, tile<float, 16, 1>},
};
inline constexpr Kernel kBf16Kernels[] = {
    {"bf16/scalar/4x16", kIsa, Format::fp32, {Format::bf16, 16, Bf16::kr}, 4, 1, tile<Bf16, 16, Bf16::kr>},
};
inline constexpr Kernel kFp16Kernels[] = {
    {"fp16/scalar/4x16", kIsa, Format::fp32, {Format::fp16, 16, Fp16::kr}, 4, 1, tile<Fp16, 16, Fp16::kr>},
};
inline constexpr Kernel kW8fKernels[] = {
    {"w8f/scalar/4x16", kIsa, Format::fp32, {Format::w8f, 16, Int8::kr}, 4, 1, tile<Int8, 16, Int8::kr>},
};
inline constexpr Kernel kInt8Kernels[] = {
    {"int8/scalar/4x8",
     kIsa,
     Format::uint8,
     {Format::int8, 8, Int8::dot_kr},
     4,
     1,
     tile<std::int8_t, 8, Int8::dot_kr, std::uint8_t, std::int32_t>,
     Format::int32,
     1,
     Int8::dot_kr},
};

}  // namespace fastlinear::scalar
