// fp16 weights on AVX2, widened in the inner loop by F16C's vcvtph2ps. fp32.hpp's tiles and budget.
#pragma once

#include "fastlinear/formats/fp16.hpp"
#include "fastlinear/isa/avx2/fp32.hpp"

namespace fastlinear::avx2 {

struct Fp16Weights : Fp32Weights {
  using Weight = Fp16;
  static constexpr Layout layout{Format::fp16, 16, Fp16::kr};

  static Vector weights(const Fp16* p, std::ptrdiff_t) {
    return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  }
};

inline constexpr Kernel kFp16Kernels[] = {
    kernels::row<kernels::Tile<Fp16Weights>, 6, 1>("fp16/avx2/6x16", kIsa),
    kernels::row<kernels::Tile<Fp16Weights>, 3, 2>("fp16/avx2/3x32", kIsa),
    kernels::row<kernels::Tile<Fp16Weights>, 1, 4>("fp16/avx2/1x64", kIsa),
};

}  // namespace fastlinear::avx2
