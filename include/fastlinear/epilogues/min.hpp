// The lesser of x and operand; NaN if either is, as torch has it.
#pragma once

#include "fastlinear/contract/epilogue.hpp"

namespace fastlinear::epilogues {

struct Min {
  static constexpr const char* name = "min";
  static constexpr std::size_t params = 0, operands = 1;
  static constexpr float defaults[kMaxParams] = {};

  template <class V>
  [[gnu::always_inline]] static V apply(V x, V operand, const float*) {
    return select_nan(operand, operand, min(operand, x));
  }
};

}  // namespace fastlinear::epilogues
