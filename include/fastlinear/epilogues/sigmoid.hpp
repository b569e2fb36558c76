// 1 / (1 + e^-x) = w / (1 + w) with w = e^x = p * 2^n, all of it in units of kOne.
//
// The clamp: above 25 the result is 1, below -104 it is 0.
#pragma once

#include "fastlinear/contract/epilogue.hpp"
#include "fastlinear/generic/math.hpp"

namespace fastlinear::epilogues {

struct Sigmoid {
  static constexpr const char* name = "sigmoid";
  static constexpr std::size_t params = 0;
  static constexpr float defaults[kMaxParams] = {};

  template <class V>
  [[gnu::always_inline]] static V apply(V x, const float*) {
    const Reduced<V> e = reduce_once(min(V::set(25.0f), max(V::set(-126.0f), x)));
    const V p = kExp(e.r);
    return scale(p / (V::set(kOne) + scale(p, e.n)), e.n);
  }
};

}  // namespace fastlinear::epilogues
