// x - operand.
#pragma once

#include "fastlinear/contract/epilogue.hpp"

namespace fastlinear::epilogues {

struct Sub {
  static constexpr const char* name = "sub";
  static constexpr std::size_t params = 0, operands = 1;
  static constexpr float defaults[kMaxParams] = {};

  template <class V>
  [[gnu::always_inline]] static V apply(V x, V operand, const float*) {
    return x - operand;
  }
};

}  // namespace fastlinear::epilogues
