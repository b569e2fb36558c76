// x if x > 0, else alpha * (e^x - 1); parameter alpha. Below -30, e^x - 1 is -1.
#pragma once

#include "fastlinear/contract/epilogue.hpp"
#include "fastlinear/generic/math.hpp"

namespace fastlinear::epilogues {

struct Elu {
  static constexpr const char* name = "elu";
  static constexpr std::size_t params = 1;
  static constexpr float defaults[kMaxParams] = {1.0f};

  template <class V>
  [[gnu::always_inline]] static V apply(V x, const float* params) {
    const V zero = V::set(0.0f);
    const V below = V::set(params[0]) * expm1(max(V::set(-30.0f), min(zero, x)));
    return select_gt(x, zero, x, below);
  }
};

}  // namespace fastlinear::epilogues
