// min(max(x, low), high); parameters low, high.
#pragma once

#include "fastlinear/contract/epilogue.hpp"

namespace fastlinear::epilogues {

struct Hardtanh {
  static constexpr const char* name = "hardtanh";
  static constexpr std::size_t params = 2;
  static constexpr float defaults[kMaxParams] = {-1.0f, 1.0f};

  template <class V>
  [[gnu::always_inline]] static V apply(V x, const float* params) {
    return min(V::set(params[1]), max(V::set(params[0]), x));
  }
};

}  // namespace fastlinear::epilogues
