// x * tanh(log(1 + e^x)) = x * m / (m + 2) with m = w * (w + 2), w = e^x = p * 2^n. No logarithm is left.
//
// One factor of 2^n is kept back and applied last. The clamp: above 20 the result is x, below -109 it is 0.
#pragma once

#include "fastlinear/contract/epilogue.hpp"
#include "fastlinear/generic/math.hpp"

namespace fastlinear::epilogues {

struct Mish {
  static constexpr const char* name = "mish";
  static constexpr std::size_t params = 0;
  static constexpr float defaults[kMaxParams] = {};

  template <class V>
  [[gnu::always_inline]] static V apply(V x, const float*) {
    const V above = max(V::set(-126.0f), x);
    const Reduced<V> e = reduce(min(V::set(20.0f), above));
    const V two = V::set(2.0f);
    const V p = exp_reduced(e.r);
    const V w = scale(p, e.n);
    const V q = p * (w + two) / fma(w, w + two, two);
    return nan_at_minus_infinity(x, scale(above * q, e.n));
  }
};

}  // namespace fastlinear::epilogues
