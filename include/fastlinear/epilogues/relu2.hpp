// max(x, 0)^2 (So et al. 2021, arXiv:2109.08668).
#pragma once

#include "fastlinear/epilogues/relu.hpp"

namespace fastlinear::epilogues {

struct Relu2 {
  static constexpr const char* name = "relu2";
  static constexpr std::size_t params = 0;
  static constexpr float defaults[kMaxParams] = {};

  template <class V>
  [[gnu::always_inline]] static V apply(V x, const float*) {
    const V y = Relu::apply<V>(x, nullptr);
    return y * y;
  }
};

}  // namespace fastlinear::epilogues
