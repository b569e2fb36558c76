// Functions of x and an operand: add is for a residual, a mask or a second bias, mul for a mask, a scale or what a gate
// lets through. min and max are NaN if either is, as torch has it.
#pragma once

#include "fastlinear/contract/epilogue.hpp"

namespace fastlinear::epilogues {

struct Binary {
  static constexpr std::size_t params = 0, operands = 1;
  static constexpr float defaults[kMaxParams] = {};
};

struct Add : Binary {
  static constexpr const char* name = "add";
  template <class V>
  [[gnu::always_inline]] static V apply(V x, V operand, const float*) {
    return x + operand;
  }
};

struct Sub : Binary {
  static constexpr const char* name = "sub";
  template <class V>
  [[gnu::always_inline]] static V apply(V x, V operand, const float*) {
    return x - operand;
  }
};

struct Mul : Binary {
  static constexpr const char* name = "mul";
  template <class V>
  [[gnu::always_inline]] static V apply(V x, V operand, const float*) {
    return x * operand;
  }
};

struct Div : Binary {
  static constexpr const char* name = "div";
  template <class V>
  [[gnu::always_inline]] static V apply(V x, V operand, const float*) {
    return x / operand;
  }
};

struct Min : Binary {
  static constexpr const char* name = "min";
  template <class V>
  [[gnu::always_inline]] static V apply(V x, V operand, const float*) {
    return select_nan(operand, operand, min(operand, x));
  }
};

struct Max : Binary {
  static constexpr const char* name = "max";
  template <class V>
  [[gnu::always_inline]] static V apply(V x, V operand, const float*) {
    return select_nan(operand, operand, max(operand, x));
  }
};

}  // namespace fastlinear::epilogues
