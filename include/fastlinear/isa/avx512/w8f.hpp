// int8 weights for fp32 rows on AVX-512, widened in the inner loop by vpmovsxbd and vcvtdq2ps. fp32.hpp's tiles and
// budget, and bf16.hpp's 1x128.
//
// Widening is two instructions of shuffle and FMA ports a vector: with many row tiles the driver's widening into cache
// is the better bargain.
#pragma once

#include "fastlinear/formats/int8.hpp"
#include "fastlinear/isa/avx512/fp32.hpp"

namespace fastlinear::avx512 {

struct Int8Weights : Fp32Weights {
  using Weight = Int8;
  static constexpr Layout layout{Format::w8f, 32, Int8::kr};

  static Vector weights(const Int8* p, std::ptrdiff_t) { return F32::load(p).v; }
};

inline constexpr Kernel kW8fKernels[] = {
    kernels::row<kernels::Tile<Int8Weights>, 6, 2>("w8f/avx512/6x64", kIsa),
    kernels::row<kernels::Tile<Int8Weights>, 14, 1>("w8f/avx512/14x32", kIsa),
    kernels::row<kernels::Tile<Int8Weights>, 1, 4>("w8f/avx512/1x128", kIsa),
};

}  // namespace fastlinear::avx512
