// The mathematics the activations share: exp and expm1 over a vector type V (isa/<isa>/vec.hpp).
//
// A result must be right to 4 ulp or 1e-6 over all floats, so e^x is kept in two parts, p * 2^n, as long as possible:
// the functions finish their arithmetic on p, which is near 1, and scale last. That way a result in the denormal range
// is rounded once. Callers clamp x to [-143, 40] or less, where n is within the reach of V's scale.
//
// What bounds an activation is its products: on Zen 5 two a cycle and as many sums, minima and roundings beside them, a
// division taking the place of two products, and scale that of two sums. Hence each turns what products it can to sums.
#pragma once

#include <array>
#include <cstddef>

namespace fastlinear::epilogues {

inline constexpr float kLog2E = 1.44269504f, kLn2 = 0.693147181f;
// log(2) in two parts; the first, Cody and Waite's, has 9 bits, so its product with an integral n is exact.
inline constexpr float kLn2High = 355.0f / 512.0f, kLn2Low = -2.12194440e-4f;

// x = n * log(2) + r, n integral and |r| <= log(2) / 2.
template <class V>
struct Reduced {
  V r, n;
};

template <class V>
[[gnu::always_inline]] inline Reduced<V> reduce(V x) {
  const V n = round(x * V::set(kLog2E));
  return {fma(n, V::set(-kLn2Low), fma(n, V::set(-kLn2High), x)), n};
}

// The same where e^x may be off by 2e-9 n: so much is log(2) as a float, and the FMA rounds r alone.
template <class V>
[[gnu::always_inline]] inline Reduced<V> reduce_once(V x) {
  const V n = round(x * V::set(kLog2E));
  return {fma(n, V::set(-kLn2), x), n};
}

// The coefficients of factor * P(unit * x), for those of P(x).
template <std::size_t N>
constexpr std::array<float, N> scaled(const double (&terms)[N], double factor, double unit) {
  std::array<float, N> of{};
  for (std::size_t i = 0; i < N; ++i, factor *= unit) of[i] = static_cast<float>(terms[i] * factor);
  return of;
}

// e^(unit * r) times `scale`, on |unit * r| <= log(2) / 2: of degree 5, minimax in its relative error, 7.5e-8, found by
// Lawson's iteratively reweighted least squares. The scale is what makes the leading coefficient 1, and so the first
// step an addition; a quotient by a sum of such powers, and of `scale` for each 1, does not have it.
struct ScaledExp {
  static constexpr double kTerms[] = {1.0000000717416737,  0.9999996916150921,   0.49998893951043609,
                                      0.16667575463826984, 0.041915483653142511, 0.008297641287077882};
  double scale;
  std::array<float, 6> terms;

  constexpr explicit ScaledExp(double unit)
      : scale(1 / (kTerms[5] * unit * unit * unit * unit * unit)), terms(scaled(kTerms, scale, unit)) {}

  template <class V>
  [[gnu::always_inline]] V operator()(V r) const {
    V p = r + V::set(terms[4]);
    for (int i = 3; i >= 0; --i) p = fma(p, r, V::set(terms[static_cast<std::size_t>(i)]));
    return p;
  }
};

// e^r in units of kOne, which is 1 to e^x by reduce_once: its scale and 5e-8 of that, since log(2) as a float makes e^x
// too large where it is small, by 2.5e-7 when e^x leaves the normal range, where 4 ulp are but 4.8e-7.
inline constexpr ScaledExp kExp{1};
inline constexpr float kOne = static_cast<float>(kExp.scale * (1 + 5e-8));

// (e^r - 1 - r) / r^2 on |r| <= log(2) / 2, of degree 4: minimax in the relative error of e^r, 3.1e-9, found by
// Lawson's iteratively reweighted least squares in 40-digit arithmetic.
template <class V>
[[gnu::always_inline]] inline V exp_tail(V r) {
  V q = fma(r, V::set(1.3814598e-3f), V::set(8.368717e-3f));
  q = fma(q, r, V::set(4.166839e-2f));
  q = fma(q, r, V::set(0.16666521f));
  return fma(q, r, V::set(0.49999994f));
}

// e^r on |r| <= log(2) / 2.
template <class V>
[[gnu::always_inline]] inline V exp_reduced(V r) {
  const V one = V::set(1.0f);
  return fma(fma(exp_tail(r), r, one), r, one);
}

// e^x - 1 = 2^n (e^r - 1) + (2^n - 1), which loses nothing near 0 because n is 0 there. Callers clamp x to +-40.
template <class V>
[[gnu::always_inline]] inline V expm1(V x) {
  const Reduced<V> e = reduce_once(x);
  const V two_n = scale(V::set(1.0f), e.n);
  return fma(fma(exp_tail(e.r) * e.r, e.r, e.r), two_n, two_n - V::set(1.0f));
}

// tanh(x) = (e^2x - 1) / (e^2x + 1), by expm1, which is exact to first order near 0.
template <class V>
[[gnu::always_inline]] inline V tanh(V x) {
  const V y = expm1(min(V::set(40.0f), max(V::set(-40.0f), x + x)));
  return y / (y + V::set(2.0f));
}

// y, but NaN where x is -inf: torch computes silu, gelu_tanh and mish as x * f(x), which is -inf * 0 there.
template <class V>
[[gnu::always_inline]] inline V nan_at_minus_infinity(V x, V y) {
  return fma(min(V::set(0.0f), x), V::set(0.0f), y);
}

}  // namespace fastlinear::epilogues
