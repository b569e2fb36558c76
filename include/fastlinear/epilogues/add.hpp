// x + operand: a residual, a mask, a second bias.
#pragma once

#include "fastlinear/contract/epilogue.hpp"

namespace fastlinear::epilogues {

struct Add {
  static constexpr const char* name = "add";
  static constexpr std::size_t params = 0, operands = 1;
  static constexpr float defaults[kMaxParams] = {};

  template <class V>
  [[gnu::always_inline]] static V apply(V x, V operand, const float*) {
    return x + operand;
  }
};

}  // namespace fastlinear::epilogues
