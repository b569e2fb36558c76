// x: for the bias alone, or a plain store.
#pragma once

#include "fastlinear/contract/epilogue.hpp"

namespace fastlinear::epilogues {

struct Identity {
  static constexpr const char* name = "identity";
  static constexpr std::size_t params = 0;
  static constexpr float defaults[kMaxParams] = {};

  template <class V>
  [[gnu::always_inline]] static V apply(V x, const float*) {
    return x;
  }
};

}  // namespace fastlinear::epilogues
