// quantization.hpp's functions, written once over a vector type F and its integers I; included inside an ISA's target
// region.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>

#include "fastlinear/quantization.hpp"

namespace fastlinear {

// The next F::width of x, of which `valid` (or more than that) exist; 0 for the others.
template <class F>
[[gnu::always_inline]] inline F load_valid(const float* x, std::ptrdiff_t valid) {
  if (F::width == 1 || valid >= F::width) return F::load(x);
  float last[F::width] = {};
  std::memcpy(last, x, static_cast<std::size_t>(valid) * sizeof(float));
  return F::load(last);
}

// All lanes of what only gathered x * 0 are 0, unless an x was not finite.
template <class F>
[[gnu::always_inline]] inline bool all_zero(F gathered) {
  float lanes[F::width];
  F::store(lanes, gathered);
  bool zero = true;
  for (std::ptrdiff_t i = 0; i < F::width; ++i) zero = zero && lanes[i] == 0.0f;
  return zero;
}

template <class F>
Extremes extremes(const float* x, std::ptrdiff_t n) {
  F least = F::set(0.0f), greatest = least, odd = least;
  for (std::ptrdiff_t i = 0; i < n; i += F::width) {
    const F v = load_valid<F>(x + i, n - i);
    least = min(v, least);
    greatest = max(v, greatest);
    odd = fma(v, F::set(0.0f), odd);
  }
  float low[F::width], high[F::width];
  F::store(low, least);
  F::store(high, greatest);
  Extremes e{0.0f, 0.0f, all_zero(odd)};
  for (std::ptrdiff_t i = 0; i < F::width; ++i) {
    e.least = low[i] < e.least ? low[i] : e.least;
    e.greatest = high[i] > e.greatest ? high[i] : e.greatest;
  }
  return e;
}

// max and min give their second operand for a NaN, so the first two pass it on to `odd`, and the third ends it.
template <class F, class Integer>
bool quantize(const float* x, std::ptrdiff_t n, const Affine& affine, void* out) {
  const F inverse = F::set(affine.inverse), low = F::set(affine.low), high = F::set(affine.high);
  const F zero = F::set(affine.zero);
  F odd = F::set(0.0f);
  auto* to = static_cast<Integer*>(out);
  for (std::ptrdiff_t i = 0; i < n; i += F::width) {
    F v = min(high, max(low, rounded(load_valid<F>(x + i, n - i) * inverse)));
    odd = fma(v, F::set(0.0f), odd);
    v = round(max(v, low)) + zero;
    if (i + F::width <= n) {
      F::store(to + i, v);
    } else {
      Integer last[F::width];
      F::store(last, v);
      std::memcpy(to + i, last, static_cast<std::size_t>(n - i) * sizeof(Integer));
    }
  }
  return all_zero(odd);
}

template <class F, class I>
void dequantize(const DequantizeArgs& args) {
  const DequantizeArgs t = args;  // a copy, which the tile cannot alias
  for (std::ptrdiff_t c = 0; c < t.cols; c += F::width) {
    const F scale = F::load(t.scales + c);
    const I sums = I::load(t.sums + c);
    for (std::ptrdiff_t r = 0; r < t.rows; ++r) {
      const RowScale row = t.row_scales[r];
      float* const y = t.tile + r * t.ld + c;
      I sum = I::load(y) - I::set(row.zero) * sums;
      if (t.zeros != nullptr) sum = sum - I::set(row.sum) * I::load(t.zeros + c);
      F::store(y, rounded(to_float(sum) * scale) * F::set(row.scale));
    }
  }
}

template <class F>
void scale_columns(const DequantizeArgs& args) {
  const DequantizeArgs t = args;
  for (std::ptrdiff_t c = 0; c < t.cols; c += F::width) {
    const F scale = F::load(t.scales + c);
    for (std::ptrdiff_t r = 0; r < t.rows; ++r) {
      float* const y = t.tile + r * t.ld + c;
      F::store(y, F::load(y) * scale);
    }
  }
}

template <class F, class I>
inline constexpr Quantization quantization{extremes<F>, quantize<F, std::uint8_t>, quantize<F, std::int16_t>,
                                           dequantize<F, I>, scale_columns<F>};

}  // namespace fastlinear
