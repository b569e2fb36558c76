// x * sigmoid(1.702 x), the gelu of CLIP, the product taken before the scale by 2^n (see sigmoid.hpp).
//
// The argument is reduced in units of x: x = n * log(2) / 1.702 + r, that quotient in two parts, as n reaches -157 and
// a float alone would cost 1.2e-6. The clamp: above 15 the result is x, below -63.6 it is 0.
#pragma once

#include "fastlinear/contract/epilogue.hpp"
#include "fastlinear/generic/math.hpp"

namespace fastlinear::epilogues {

struct QuickGelu {
  static constexpr const char* name = "quick_gelu";
  static constexpr std::size_t params = 0;
  static constexpr float defaults[kMaxParams] = {};

  template <class V>
  [[gnu::always_inline]] static V apply(V x, const float*) {
    const V above = max(V::set(-70.0f), x);
    const V y = min(V::set(15.0f), above);
    const V n = round(y * V::set(kLog2));
    const V p = kExp(fma(n, V::set(-kLnLow), fma(n, V::set(-kLn), y)));
    const V q = p / (V::set(kOne) + scale(p, n));
    return nan_at_minus_infinity(x, scale(above * q, n));
  }

 private:
  static constexpr ScaledExp kExp{1.702};
  static constexpr float kOne = static_cast<float>(kExp.scale);
  static constexpr float kLog2 = 1.702 * 1.4426950408889634, kLn = 0.6931471805599453 / 1.702,
                         kLnLow = 0.6931471805599453 / 1.702 - static_cast<double>(kLn);
};

}  // namespace fastlinear::epilogues
