// x if x > 0, else slope * x; parameter slope.
#pragma once

#include "fastlinear/contract/epilogue.hpp"

namespace fastlinear::epilogues {

struct LeakyRelu {
  static constexpr const char* name = "leaky_relu";
  static constexpr std::size_t params = 1;
  static constexpr float defaults[kMaxParams] = {0.01f};

  template <class V>
  [[gnu::always_inline]] static V apply(V x, const float* params) {
    return select_gt(x, V::set(0.0f), x, x * V::set(params[0]));
  }
};

}  // namespace fastlinear::epilogues
