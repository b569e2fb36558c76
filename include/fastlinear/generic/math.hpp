// The mathematics the activations share: exp and expm1 over a vector type V (isa/<isa>/vec.hpp).
//
// A result must be right to 4 ulp or 1e-6 over all floats, so e^x is kept in two parts, p * 2^n, as long as possible:
// the functions finish their arithmetic on p, which is near 1, and scale last. That way a result in the denormal range
// is rounded once. Callers clamp x to [-143, 40] or less, where n is within the reach of V's scale.
#pragma once

namespace fastlinear::epilogues {

inline constexpr float kLog2E = 1.44269504f;
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
  const Reduced<V> e = reduce(x);
  const V two_n = scale(V::set(1.0f), e.n);
  return fma(fma(exp_tail(e.r) * e.r, e.r, e.r), two_n, two_n - V::set(1.0f));
}

// y, but NaN where x is -inf: torch computes silu, gelu_tanh and mish as x * f(x), which is -inf * 0 there.
template <class V>
[[gnu::always_inline]] inline V nan_at_minus_infinity(V x, V y) {
  return fma(min(V::set(0.0f), x), V::set(0.0f), y);
}

}  // namespace fastlinear::epilogues
