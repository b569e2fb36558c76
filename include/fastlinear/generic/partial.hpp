// The last, partial vector of a row, written once over a vector type: nothing is read or written beyond the row.
#pragma once

#include <cstddef>
#include <cstring>

namespace fastlinear {

// The first `valid` floats at p, 1 to V::width - 1 of them, and zeros.
template <class V>
[[gnu::always_inline]] inline V load_partial(const float* p, std::ptrdiff_t valid) {
  float last[V::width] = {};
  for (std::ptrdiff_t i = 0; i < valid; ++i) last[i] = p[i];
  return V::load(last);
}

// The first `valid` floats at p, or all if that is more.
template <class V>
[[gnu::always_inline]] inline V load_valid(const float* p, std::ptrdiff_t valid) {
  return valid >= V::width ? V::load(p) : load_partial<V>(p, valid);
}

// The biases of the columns [c, c + V::width), of which `valid`, or more than that, exist; 0 without a bias.
template <class V>
[[gnu::always_inline]] inline V load_bias(const float* bias, std::ptrdiff_t c, std::ptrdiff_t valid) {
  return bias == nullptr ? V::set(0.0f) : load_valid<V>(bias + c, valid);
}

// The first `valid` of the floats, or all if that is more.
template <class V>
[[gnu::always_inline]] inline void store_valid(float* out, V x, std::ptrdiff_t valid) {
  if (valid < V::width)
    V::store_n(out, x, valid);
  else
    V::store(out, x);
}

}  // namespace fastlinear
