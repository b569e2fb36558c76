// min(max(x, 0), 6).
#pragma once

#include "fastlinear/contract/epilogue.hpp"

namespace fastlinear::epilogues {

struct Relu6 {
  static constexpr const char* name = "relu6";
  static constexpr std::size_t params = 0;
  static constexpr float defaults[kMaxParams] = {};

  template <class V>
  [[gnu::always_inline]] static V apply(V x, const float*) {
    return min(V::set(6.0f), max(V::set(0.0f), x));
  }
};

}  // namespace fastlinear::epilogues
