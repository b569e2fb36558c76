// int8 weights for fp32 rows on AVX2, widened in the inner loop by vpmovsxbd and vcvtdq2ps. fp32.hpp's tiles and
// budget.
#pragma once

#include "fastlinear/formats/int8.hpp"
#include "fastlinear/isa/avx2/fp32.hpp"

namespace fastlinear::avx2 {

struct Int8Weights : Fp32Weights {
  using Weight = Int8;
  static constexpr Layout layout{Format::w8f, 16, Int8::kr};

  static Vector weights(const Int8* p, std::ptrdiff_t) { return F32::load(p).v; }
};

inline constexpr Kernel kW8fKernels[] = {
    kernels::row<kernels::Tile<Int8Weights>, 6, 1>("w8f/avx2/6x16", kIsa),
    kernels::row<kernels::Tile<Int8Weights>, 3, 2>("w8f/avx2/3x32", kIsa),
    kernels::row<kernels::Tile<Int8Weights>, 1, 4>("w8f/avx2/1x64", kIsa),
};

}  // namespace fastlinear::avx2
