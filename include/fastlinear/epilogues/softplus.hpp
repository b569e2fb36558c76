// log(1 + e^y) / beta with y = beta * x, or x where y > threshold; parameters beta, threshold.
//
// log(1 + e^y) = max(y, 0) + log(1 + t) with t = e^-|y| in (0, 1], and log(1 + t) = t * L(t), where L is a polynomial
// of degree 8 (minimax, relative error 3e-8, by Lawson's iteration in 40-digit arithmetic). t = p * 2^n is scaled last.
// |y| <= 126 is all that matters to t, and the bound on x keeps beta * x finite. The product's rounding error, up to
// 4e-6 of t, is recovered by an FMA and added to the exponent.
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
    const Reduced<V> e = reduce(y);
    const V p = exp_reduced(e.r + y_low);
    const V t = scale(p, e.n);
    V l = fma(t, V::set(5.232688e-3f), V::set(-2.9505214e-2f));
    l = fma(l, t, V::set(7.822591e-2f));
    l = fma(l, t, V::set(-0.13663243f));
    l = fma(l, t, V::set(0.19106005f));
    l = fma(l, t, V::set(-0.24842982f));
    l = fma(l, t, V::set(0.33319098f));
    l = fma(l, t, V::set(-0.49999493f));
    l = fma(l, t, V::set(0.99999994f));
    const V smooth = scale(p * l * (V::set(1.0f) / beta), e.n) + select_gt(x * beta, zero, x, zero);
    return select_gt(fma(x, beta, -V::set(params[1])), zero, x, smooth);
  }
};

}  // namespace fastlinear::epilogues
