// x * Phi(x), Phi the normal distribution: 0.5 * x * erfc(-x / sqrt(2)).
//
// By symmetry gelu(x) = max(x, 0) - T(|x|) with T(a) = a * Phi(-a) = a * g(a) * e^(-a^2/2), which never cancels by more
// than a factor of 2. g(a) = Phi(-a) * e^(a^2/2), Mills' ratio up to a constant, falls from 1/2 like 1/a, so a
// rational function of degrees 4/5 covers [0, 14.6] with relative error 6e-9 (3.5e-8 once its coefficients are floats)
// and positive coefficients only; found by Lawson's iteration on the linearised problem, 40-digit arithmetic. a^2 is
// split into its float and the rest by an FMA: the rest alone moves e^(-a^2/2) by 4e-6. Beyond 14.6 T is 0.
// x - min(x, 0) is max(x, 0), and NaN at -inf as torch has it.
#pragma once

#include "fastlinear/contract/epilogue.hpp"
#include "fastlinear/generic/math.hpp"

namespace fastlinear::epilogues {

struct Gelu {
  static constexpr const char* name = "gelu";
  static constexpr std::size_t params = 0;
  static constexpr float defaults[kMaxParams] = {};

  template <class V>
  [[gnu::always_inline]] static V apply(V x, const float*) {
    const V a = min(V::set(14.6f), abs(x));
    const V minus_half = V::set(-0.5f);
    const V square = a * a;
    const V square_low = fma(a, a, -square);
    const Reduced<V> e = reduce(square * minus_half);
    const V p = exp_reduced(fma(square_low, minus_half, e.r));
    V num = fma(a, V::set(4.123837e-3f), V::set(4.0683843e-2f));
    num = fma(num, a, V::set(0.18338512f));
    num = fma(num, a, V::set(0.43849713f));
    num = fma(num, a, V::set(0.5f));
    V den = fma(a, V::set(1.0336809e-2f), V::set(0.10198565f));
    den = fma(den, a, V::set(0.46986663f));
    den = fma(den, a, V::set(1.2031257f));
    den = fma(den, a, V::set(1.6748793f));
    den = fma(den, a, V::set(1.0f));
    const V tail = scale(a * num * p / den, e.n);
    return x - min(V::set(0.0f), x) - tail;
  }
};

}  // namespace fastlinear::epilogues
