// fp16 weights on AVX-512, widened in the inner loop by vcvtph2ps. fp32.hpp's tiles and budget, and bf16.hpp's
// 1x128.
//
// The conversion takes an FMA port and a shuffle port on Intel: 2 for 28 FMAs, up to 13 %; see bf16.hpp.
#pragma once

#include "fastlinear/formats/fp16.hpp"
#include "fastlinear/isa/avx512/fp32.hpp"

namespace fastlinear::avx512 {

struct Fp16Weights : Fp32Weights {
  using Weight = Fp16;
  static constexpr Layout layout{Format::fp16, 32, Fp16::kr};

  static Vector weights(const Fp16* p, std::ptrdiff_t) {
    return _mm512_maskz_cvtph_ps(0xffff, _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
  }
};

inline constexpr Kernel kFp16Kernels[] = {
    kernels::row<kernels::Tile<Fp16Weights>, 6, 2>("fp16/avx512/6x64", kIsa),
    kernels::row<kernels::Tile<Fp16Weights>, 14, 1>("fp16/avx512/14x32", kIsa),
    kernels::row<kernels::Tile<Fp16Weights>, 1, 4>("fp16/avx512/1x128", kIsa),
};

}  // namespace fastlinear::avx512
