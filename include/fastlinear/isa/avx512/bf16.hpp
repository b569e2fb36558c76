// bf16 weights on AVX-512, widened in the inner loop: a line holds pairs of k for 16 channels; shifted left it is the
// floats of the even k, and loaded under a mask those of the odd. fp32.hpp's tiles and budget,
// and 1x128 for M = 1: half the bytes want twice the chains, since with the two of 14x32 the latency of the FMA allows
// 16 bytes a cycle, and L2 gives 32.
//
// Both take a vector port on Intel: 2 for 28 FMAs, 7 %. With many row tiles the driver's widening into cache may be
// the better bargain; the tuner decides.
#pragma once

#include "fastlinear/formats/bf16.hpp"
#include "fastlinear/isa/avx512/fp32.hpp"

namespace fastlinear::avx512 {

struct Bf16Weights : Fp32Weights {
  using Weight = Bf16;
  static constexpr Layout layout{Format::bf16, 32, Bf16::kr};
  static constexpr std::ptrdiff_t steps = 2;

  static Vector weights(const Bf16* p, std::ptrdiff_t step) {
    const __m512i floats = step == 0 ? _mm512_maskz_slli_epi32(0xffff, _mm512_loadu_si512(p), 16)
                                     : _mm512_maskz_loadu_epi16(0xaaaaaaaa, p);
    return _mm512_castsi512_ps(floats);
  }

  // GCC 12 writes sums over x instead of in place here and spills the tile; as text it has no choice.
  static Vector multiply_add(Vector x, Vector w, Vector c) {
    asm("vfmadd231ps %2, %1, %0" : "+v"(c) : "v"(x), "v"(w));
    return c;
  }
};

inline constexpr Kernel kBf16Kernels[] = {
    kernels::row<kernels::Tile<Bf16Weights>, 6, 2>("bf16/avx512/6x64", kIsa),
    kernels::row<kernels::Tile<Bf16Weights>, 14, 1>("bf16/avx512/14x32", kIsa),
    kernels::row<kernels::Tile<Bf16Weights>, 1, 4>("bf16/avx512/1x128", kIsa),
};

}  // namespace fastlinear::avx512
