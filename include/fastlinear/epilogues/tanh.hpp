// tanh(x) = (e^2x - 1) / (e^2x + 1), by expm1, which is exact to first order near 0. Beyond +-20 it is +-1.
#pragma once

#include "fastlinear/contract/epilogue.hpp"
#include "fastlinear/generic/math.hpp"

namespace fastlinear::epilogues {

struct Tanh {
  static constexpr const char* name = "tanh";
  static constexpr std::size_t params = 0;
  static constexpr float defaults[kMaxParams] = {};

  template <class V>
  [[gnu::always_inline]] static V apply(V x, const float*) {
    const V two_x = min(V::set(40.0f), max(V::set(-40.0f), x + x));
    const V y = expm1(two_x);
    return y / (y + V::set(2.0f));
  }
};

}  // namespace fastlinear::epilogues
