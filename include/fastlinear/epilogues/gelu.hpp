// x * Phi(x), Phi the normal distribution: 0.5 * x * erfc(-x / sqrt(2)).
//
// By symmetry gelu(x) = max(x, 0) - T(|x|) with T(a) = a * Phi(-a) = a * g(a) * e^(-a^2/2), which never cancels by more
// than a factor of 2. g(a) = Phi(-a) * e^(a^2/2), Mills' ratio up to a constant, falls from 1/2 like 1/a, so a
// rational function of degrees 3/5 covers [0, 14.6] with relative error 1.4e-7, its coefficients being floats already:
// found by Lawson's iteration on the linearised problem, g in 40 digits, and a search among the floats nearby. Only its
// last coefficient has the other sign, and that counts for nothing in the rounding. The first one of the numerator is
// 1; what that and ScaledExp leave out is in the denominator, and so is what a^2 = r + n * 2 log(2) is off by, log(2)
// being a float. a^2 is split into its float and the rest by an FMA: the rest alone moves e^(-a^2/2) by 4e-6. Beyond
// 14.6 T is 0.
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
    const V square = a * a;
    const V square_low = fma(a, a, -square);
    const V n = round(square * V::set(-0.5f * kLog2E));
    const V p = kExp(fma(n, V::set(2 * kLn2), square) + square_low);
    V num = a + V::set(kNum[2]);
    num = fma(num, a, V::set(kNum[1]));
    num = fma(num, a, V::set(kNum[0]));
    V den = fma(a, V::set(kDen[5]), V::set(kDen[4]));
    den = fma(den, a, V::set(kDen[3]));
    den = fma(den, a, V::set(kDen[2]));
    den = fma(den, a, V::set(kDen[1]));
    den = fma(den, a, V::set(kDen[0]));
    const V tail = scale(a * num * p / den, n);
    return x - min(V::set(0.0f), x) - tail;
  }

 private:
  static constexpr ScaledExp kExp{-0.5};
  static constexpr float kNum[] = {34.888844f, 23.696285f, 7.4986796f};
  static constexpr float kDen[] = {-269098.9f, -397478.3f, -240445.95f, -72336.6f, -9674.511f, 0.16328783f};
};

}  // namespace fastlinear::epilogues
