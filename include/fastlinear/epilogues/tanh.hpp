// tanh(x), which is +-1 beyond +-20.
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
    return epilogues::tanh(x);
  }
};

}  // namespace fastlinear::epilogues
