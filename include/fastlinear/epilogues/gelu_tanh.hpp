// 0.5 * x * (1 + tanh(u)) = x * sigmoid(2u), u = sqrt(2 / pi) * (x + 0.044715 * x^3).
//
// The sigmoid as in silu.hpp, but of powers of 2: 2u = log(2) * x * v with v = c0 + c1 * x^2, and x * v - n, the
// argument that is left, takes one FMA. x * v reaches -123 where results are still normal, and a float there is 8e-6
// coarse, so x^2 and v carry their rounding errors, as do the constants. c0 has 14 bits, so c0 - v is exact. The clamp:
// above 6 the result is x, below -10.9 it is 0.
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
    const V c0 = V::set(kC0), c1 = V::set(kC1);
    const V v = fma(c1, square, c0);
    const V v_low = fma(c1, square_low, fma(c1, square, c0 - v) + fma(V::set(kC1Low), square, V::set(kC0Low)));
    const V n = round(y * v);
    const V p = kExp(fma(y, v_low, fma(y, v, -n)));
    const V q = p / (V::set(kOne) + scale(p, n));
    return nan_at_minus_infinity(x, scale(above * q, n));
  }

 private:
  static constexpr ScaledExp kExp{0.6931471805599453};  // of powers of 2
  static constexpr float kOne = static_cast<float>(kExp.scale);
  static constexpr double kLinear = 2.302208198144325, kCubic = 0.1029432395800235;
  static constexpr float kC0 = 2.30224609375f, kC0Low = kLinear - kC0, kC1 = kCubic, kC1Low = kCubic - kC1;
};

}  // namespace fastlinear::epilogues
