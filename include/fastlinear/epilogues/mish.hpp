// x * tanh(log(1 + e^x)) = x * m / (m + 2) with m = w * (w + 2), w = e^x = p * 2^n. No logarithm is left. All is in
// units of kOne, a product of two in those of its square.
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
    const Reduced<V> e = reduce_once(min(V::set(20.0f), above));
    const V p = kExp(e.r);
    const V w = scale(p, e.n);
    const V w_two = w + V::set(2 * kOne);
    const V q = p * w_two / fma(w, w_two, V::set(2 * kOne * kOne));
    return nan_at_minus_infinity(x, scale(above * q, e.n));
  }
};

}  // namespace fastlinear::epilogues
