// x * min(max(x + 3, 0), 6) / 6. The factor is finished first, so that large x do not overflow.
#pragma once

#include "fastlinear/contract/epilogue.hpp"

namespace fastlinear::epilogues {

struct Hardswish {
  static constexpr const char* name = "hardswish";
  static constexpr std::size_t params = 0;
  static constexpr float defaults[kMaxParams] = {};

  template <class V>
  [[gnu::always_inline]] static V apply(V x, const float*) {
    const V ramp = min(V::set(6.0f), max(V::set(0.0f), x + V::set(3.0f)));
    return x * (ramp * V::set(1.0f / 6.0f));
  }
};

}  // namespace fastlinear::epilogues
