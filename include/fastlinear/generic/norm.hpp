// norm.hpp's function, written once over a vector type; included inside an ISA's target region.
//
// A row of 384 floats is 24 zmm: each pass is bound by loads (two a cycle), so sums go to four registers, since an
// addition has to wait four cycles for the last one.
#pragma once

#include <cstddef>

#include "fastlinear/contract/norm.hpp"
#include "fastlinear/generic/partial.hpp"

namespace fastlinear {

namespace norm_detail {

// f(i, valid) is a vector, of which the first `valid` lanes count (all, if that is more); the sum of all that count.
template <class V, class F>
[[gnu::always_inline]] inline float sum_over(std::ptrdiff_t n, const F& f) {
  constexpr std::ptrdiff_t w = V::width;
  V a = V::set(0.0f), b = a, c = a, d = a;
  std::ptrdiff_t i = 0;
  for (; i + 4 * w <= n; i += 4 * w) {
    a = a + f(i, w);
    b = b + f(i + w, w);
    c = c + f(i + 2 * w, w);
    d = d + f(i + 3 * w, w);
  }
  for (; i + w <= n; i += w) a = a + f(i, w);
  float rest = 0.0f;
  if (i < n) {
    float last[w];
    V::store(last, f(i, n - i));
    for (std::ptrdiff_t j = 0; j < n - i; ++j) rest += last[j];
  }
  return total((a + b) + (c + d)) + rest;
}

// The numbers that the norm is of: x, or x + residual, which is stored on the way.
template <class V>
struct Numbers {
  const NormArgs& args;

  [[gnu::always_inline]] V operator()(std::ptrdiff_t i, std::ptrdiff_t valid) const {
    const V x = load_valid<V>(args.x + i, valid);
    if (args.residual == nullptr) return x;
    const V sum = x + load_valid<V>(args.residual + i, valid);
    store_valid(args.sum + i, sum, valid);
    return sum;
  }
};

template <class V>
struct Squares {
  Numbers<V> numbers;
  [[gnu::always_inline]] V operator()(std::ptrdiff_t i, std::ptrdiff_t valid) const {
    const V x = numbers(i, valid);
    return x * x;
  }
};

template <class V>
struct Deviations {
  const float* x;
  V mean;
  [[gnu::always_inline]] V operator()(std::ptrdiff_t i, std::ptrdiff_t valid) const {
    const V d = load_valid<V>(x + i, valid) - mean;
    return d * d;
  }
};

template <class V>
struct Finish {
  const NormArgs& args;
  const float* x;
  V mean, scale, offset;
  [[gnu::always_inline]] void operator()(std::ptrdiff_t i, std::ptrdiff_t valid) const {
    V y = (load_valid<V>(x + i, valid) - mean) * scale;
    if (args.weight != nullptr) y = y * (load_valid<V>(args.weight + i, valid) + offset);
    if (args.bias != nullptr) y = y + load_valid<V>(args.bias + i, valid);
    store_valid(args.y + i, y, valid);
  }
};

}  // namespace norm_detail

template <class V>
void norm(const NormArgs& given) {
  using namespace norm_detail;
  const NormArgs args = given;  // a copy, which the row cannot alias
  const auto n = static_cast<float>(args.n);
  const float* const x = args.residual == nullptr ? args.x : args.sum;
  const Numbers<V> numbers{args};
  float mean = 0.0f, squares;
  if (args.centered) {
    mean = sum_over<V>(args.n, numbers) / n;
    squares = sum_over<V>(args.n, Deviations<V>{x, V::set(mean)});
  } else {
    squares = sum_over<V>(args.n, Squares<V>{numbers});
  }
  const auto scale = static_cast<float>(1.0 / __builtin_sqrt(double{squares / n} + double{args.eps}));
  const Finish<V> finish{args, x, V::set(mean), V::set(scale), V::set(args.offset)};
  std::ptrdiff_t i = 0;
  for (; i + V::width <= args.n; i += V::width) finish(i, V::width);
  if (i < args.n) finish(i, args.n - i);
}

}  // namespace fastlinear
