// x * sigmoid(1.702 x), the gelu of CLIP, the product taken before the scale by 2^n (see sigmoid.hpp).
//
// 1.702 x reaches -108 where results are not yet 0, and a float there is 8e-6 coarse, so that product carries its
// rounding error, and that of the constant. The clamp: above 15 the result is x, below -63.6 it is 0.
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
    const V c = V::set(1.702f), c_low = V::set(kLow);
    const V t = c * y;
    const V t_low = fma(c_low, y, fma(c, y, -t));
    const Reduced<V> e = reduce(t);
    const V p = exp_reduced(e.r + t_low);
    const V q = p / (V::set(1.0f) + scale(p, e.n));
    return nan_at_minus_infinity(x, scale(above * q, e.n));
  }

 private:
  static constexpr float kLow = static_cast<float>(1.702 - static_cast<double>(1.702f));
};

}  // namespace fastlinear::epilogues
