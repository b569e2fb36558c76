// log(1 + e^y) / beta with y = beta * x, or x where y > threshold; parameters beta, threshold.
//
// log(1 + e^y) = max(y, 0) + log(1 + t) with t = e^-|y| in (0, 1], and log(1 + t) = t * L(t), where L is a polynomial
// of degree 7 (minimax, relative error 2e-7, by Lawson's iteration). t = p * 2^n is scaled last, and in units of
// kOne. |y| <= 126 is all that matters to t, and the bound on x keeps beta * x finite. The product's
// rounding error, up to 4e-6 of t, is recovered by an FMA and added to the exponent.
#pragma once

#include "fastlinear/contract/epilogue.hpp"
#include "fastlinear/generic/math.hpp"

namespace fastlinear::epilogues {

struct Softplus {
  static constexpr const char* name = "softplus";
  static constexpr std::size_t params = 2;
  static constexpr float defaults[kMaxParams] = {1.0f, 20.0f};

  template <class V>
  [[gnu::always_inline]] static V apply(V x, const float* params) {
    const V zero = V::set(0.0f);
    const V beta = V::set(params[0]);
    const V neg_beta = -abs(beta);
    const V bound = V::set(126.0f) / abs(beta);
    const V a = min(bound, abs(x));
    const V y = a * neg_beta;
    const V y_low = fma(a, neg_beta, -y);
    const Reduced<V> e = reduce_once(y);
    const V p = kExp(e.r + y_low);
    const V t = scale(p, e.n);
    V l = V::set(kLog[7]);
    for (std::size_t i = 7; i-- > 0;) l = fma(l, t, V::set(kLog[i]));
    const V smooth = scale(p * l * (V::set(1.0f) / beta), e.n) + select_gt(x * beta, zero, x, zero);
    return select_gt(fma(x, beta, -V::set(params[1])), zero, x, smooth);
  }

 private:
  static constexpr auto kLog =
      scaled({0.9999998057097388, -0.49997405536035344, 0.33275481086659653, -0.24495468162678039, 0.17745252301970663,
              -0.10768182683908092, 0.044089689001113, -0.008539218883104563},
             1.0 / kOne, 1.0 / kOne);
};

}  // namespace fastlinear::epilogues
