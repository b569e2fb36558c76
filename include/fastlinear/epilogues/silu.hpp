// x * sigmoid(x), the product taken before the scale by 2^n (see sigmoid.hpp).
//
// The clamp: above 25 the result is x, below -109 it is 0.
#pragma once

#include "fastlinear/contract/epilogue.hpp"
#include "fastlinear/generic/math.hpp"

namespace fastlinear::epilogues {

struct Silu {
  static constexpr const char* name = "silu";
  static constexpr std::size_t params = 0;
  static constexpr float defaults[kMaxParams] = {};

  template <class V>
  [[gnu::always_inline]] static V apply(V x, const float*) {
    const V above = max(V::set(-126.0f), x);
    const Reduced<V> e = reduce_once(min(V::set(25.0f), above));
    const V p = kExp(e.r);
    const V q = p / (V::set(kOne) + scale(p, e.n));
    return nan_at_minus_infinity(x, scale(above * q, e.n));
  }
};

}  // namespace fastlinear::epilogues
