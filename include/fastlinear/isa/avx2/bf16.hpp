// bf16 weights on AVX2, widened in the inner loop by a shift (even k) and a mask (odd k), as on AVX-512. fp32.hpp's
// tiles and budget, but for the mask's register, which 3x32 does not have.
#pragma once

#include "fastlinear/formats/bf16.hpp"
#include "fastlinear/isa/avx2/fp32.hpp"

namespace fastlinear::avx2 {

struct Bf16Weights : Fp32Weights {
  using Weight = Bf16;
  static constexpr Layout layout{Format::bf16, 16, Bf16::kr};
  static constexpr std::ptrdiff_t steps = 2;

  static Vector weights(const Bf16* p, std::ptrdiff_t step) {
    const __m256i pairs = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
    const __m256i upper = _mm256_set1_epi32(static_cast<int>(0xffff0000u));
    return _mm256_castsi256_ps(step == 0 ? _mm256_slli_epi32(pairs, 16) : _mm256_and_si256(pairs, upper));
  }

  // GCC 12 writes sums over x instead of in place here and spills the tile; as text it has no choice.
  static Vector multiply_add(Vector x, Vector w, Vector c) {
    asm("vfmadd231ps %2, %1, %0" : "+x"(c) : "x"(x), "x"(w));
    return c;
  }
};

inline constexpr Kernel kBf16Kernels[] = {
    kernels::row<kernels::Tile<Bf16Weights>, 6, 1>("bf16/avx2/6x16", kIsa),
    kernels::row<kernels::Tile<Bf16Weights>, 2, 2>("bf16/avx2/2x32", kIsa),
    kernels::row<kernels::Tile<Bf16Weights>, 1, 4>("bf16/avx2/1x64", kIsa),
};

}  // namespace fastlinear::avx2
