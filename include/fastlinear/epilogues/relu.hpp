// max(x, 0).
#pragma once

#include "fastlinear/contract/epilogue.hpp"

namespace fastlinear::epilogues {

struct Relu {
  static constexpr const char* name = "relu";
  static constexpr std::size_t params = 0;
  static constexpr float defaults[kMaxParams] = {};

  template <class V>
  [[gnu::always_inline]] static V apply(V x, const float*) {
    return max(V::set(0.0f), x);
  }
};

}  // namespace fastlinear::epilogues
