// N vectors as one, for functions whose steps wait for one another: what one vector waits for is time for the others.
// A core looks some hundred operations ahead, which is but a few vectors of an activation; of four in step it gets
// 15 to 50 % more done (Zen 5). It knows the verbs of V that functions of numbers are written in (isa/scalar/vec.hpp).
#pragma once

#include <cstddef>

namespace fastlinear {

template <class V, int N>
struct Several {
  V of[N];

  template <class F>
  [[gnu::always_inline]] static Several each(F f) {
    Several y;
#pragma GCC unroll 8
    for (int i = 0; i < N; ++i) y.of[i] = f(i);
    return y;
  }
  [[gnu::always_inline]] static Several set(float x) {
    return each([&](int) { return V::set(x); });
  }
};

template <class V, int N>
[[gnu::always_inline]] inline Several<V, N> operator+(Several<V, N> a, Several<V, N> b) {
  return Several<V, N>::each([&](int i) { return a.of[i] + b.of[i]; });
}
template <class V, int N>
[[gnu::always_inline]] inline Several<V, N> operator-(Several<V, N> a, Several<V, N> b) {
  return Several<V, N>::each([&](int i) { return a.of[i] - b.of[i]; });
}
template <class V, int N>
[[gnu::always_inline]] inline Several<V, N> operator*(Several<V, N> a, Several<V, N> b) {
  return Several<V, N>::each([&](int i) { return a.of[i] * b.of[i]; });
}
template <class V, int N>
[[gnu::always_inline]] inline Several<V, N> operator/(Several<V, N> a, Several<V, N> b) {
  return Several<V, N>::each([&](int i) { return a.of[i] / b.of[i]; });
}
template <class V, int N>
[[gnu::always_inline]] inline Several<V, N> operator-(Several<V, N> a) {
  return Several<V, N>::each([&](int i) { return -a.of[i]; });
}
template <class V, int N>
[[gnu::always_inline]] inline Several<V, N> fma(Several<V, N> a, Several<V, N> b, Several<V, N> c) {
  return Several<V, N>::each([&](int i) { return fma(a.of[i], b.of[i], c.of[i]); });
}
template <class V, int N>
[[gnu::always_inline]] inline Several<V, N> max(Several<V, N> a, Several<V, N> b) {
  return Several<V, N>::each([&](int i) { return max(a.of[i], b.of[i]); });
}
template <class V, int N>
[[gnu::always_inline]] inline Several<V, N> min(Several<V, N> a, Several<V, N> b) {
  return Several<V, N>::each([&](int i) { return min(a.of[i], b.of[i]); });
}
template <class V, int N>
[[gnu::always_inline]] inline Several<V, N> abs(Several<V, N> a) {
  return Several<V, N>::each([&](int i) { return abs(a.of[i]); });
}
template <class V, int N>
[[gnu::always_inline]] inline Several<V, N> round(Several<V, N> a) {
  return Several<V, N>::each([&](int i) { return round(a.of[i]); });
}
template <class V, int N>
[[gnu::always_inline]] inline Several<V, N> scale(Several<V, N> a, Several<V, N> n) {
  return Several<V, N>::each([&](int i) { return scale(a.of[i], n.of[i]); });
}
template <class V, int N>
[[gnu::always_inline]] inline Several<V, N> select_gt(Several<V, N> a, Several<V, N> b, Several<V, N> x,
                                                      Several<V, N> y) {
  return Several<V, N>::each([&](int i) { return select_gt(a.of[i], b.of[i], x.of[i], y.of[i]); });
}
template <class V, int N>
[[gnu::always_inline]] inline Several<V, N> select_nan(Several<V, N> a, Several<V, N> x, Several<V, N> y) {
  return Several<V, N>::each([&](int i) { return select_nan(a.of[i], x.of[i], y.of[i]); });
}

}  // namespace fastlinear
