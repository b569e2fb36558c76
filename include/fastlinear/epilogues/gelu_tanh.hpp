// 0.5 * x * (1 + tanh(u)) = x * sigmoid(2u), 2u = c0 * x + c1 * x^3, c0 = 2 sqrt(2 / pi), c1 = 0.044715 * c0.
//
// The sigmoid as in silu.hpp. 2u reaches -85 where results are still normal, and a float there is 4e-6 coarse, so x^2,
// x^3 and both terms carry their rounding errors (an FMA each), as do the constants; 2u = linear + cubic + low. The
// range reduction adds the large parts one after the other: what is left is below 16, so at most 5e-7 is rounded off.
// The clamp: above 6 the result is x, below -10.9 it is 0.
#pragma once

#include "fastlinear/contract/epilogue.hpp"
#include "fastlinear/generic/math.hpp"

namespace fastlinear::epilogues {

struct GeluTanh {
  static constexpr const char* name = "gelu_tanh";
  static constexpr std::size_t params = 0;
  static constexpr float defaults[kMaxParams] = {};

  template <class V>
  [[gnu::always_inline]] static V apply(V x, const float*) {
    const V above = max(V::set(-12.0f), x);
    const V y = min(V::set(6.0f), above);
    const V square = y * y;
    const V square_low = fma(y, y, -square);
    const V cube = y * square;
    const V cube_low = fma(y, square_low, fma(y, square, -cube));
    const V c0 = V::set(1.5957692f), c0_low = V::set(-4.534068e-8f);
    const V c1 = V::set(7.1354814e-2f), c1_low = V::set(2.3988325e-9f);
    const V linear = c0 * y;
    const V cubic = c1 * cube;
    const V linear_low = fma(c0_low, y, fma(c0, y, -linear));
    const V cubic_low = fma(c1, cube_low, fma(c1_low, cube, fma(c1, cube, -cubic)));
    const V n = round((linear + cubic) * V::set(kLog2E));
    const V r = fma(n, V::set(-kLn2High), cubic) + linear;
    const V low = fma(n, V::set(-kLn2Low), linear_low + cubic_low);
    const V p = exp_reduced(r + low);
    const V q = p / (V::set(1.0f) + scale(p, n));
    return nan_at_minus_infinity(x, scale(above * q, n));
  }
};

}  // namespace fastlinear::epilogues
