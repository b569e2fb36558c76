// quantization.hpp's functions, written once over a vector type F and its integers I; included inside an ISA's target
// region.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <limits>

#include "fastlinear/contract/quantization.hpp"
#include "fastlinear/generic/coding.hpp"
#include "fastlinear/generic/partial.hpp"

namespace fastlinear {

template <class F>
struct ExtremesSoFar {
  F least, greatest, odd;

  // An implicit constructor is compiled for the baseline: where nothing is inlined it calls F::set by another ABI.
  ExtremesSoFar() : least(F::set(0.0f)), greatest(least), odd(least) {}

  // x * 0 is NaN where x is not finite.
  [[gnu::always_inline]] void add(F x) {
    least = min(x, least);
    greatest = max(x, greatest);
    odd = fma(x, F::set(0.0f), odd);
  }
};

// The bits of a magnitude grow with it, and those of infinity and NaN are the largest.
template <class F, class I>
Extremes magnitude(const float* x, std::ptrdiff_t n) {
  I bits = I::set(0);
  std::ptrdiff_t i = 0;
  for (; i + F::width <= n; i += F::width) bits = max_magnitude(bits, F::load(x + i));
  if (i < n) bits = max_magnitude(bits, load_partial<F>(x + i, n - i));
  const auto most = __builtin_bit_cast(float, greatest(bits));
  return {-most, most, most - most == 0.0f};
}

// Two vectors at once, since an FMA has to wait for the last one.
template <class F>
Extremes extremes(const float* x, std::ptrdiff_t n) {
  ExtremesSoFar<F> a, b;
  std::ptrdiff_t i = 0;
  for (; i + 2 * F::width <= n; i += 2 * F::width) {
    a.add(F::load(x + i));
    b.add(F::load(x + i + F::width));
  }
  if (i + F::width <= n) {
    a.add(F::load(x + i));
    i += F::width;
  }
  if (i < n) b.add(load_partial<F>(x + i, n - i));
  return {least(min(a.least, b.least)), greatest(max(a.greatest, b.greatest)), all_zero(a.odd + b.odd)};
}

// max and min give their second operand for a NaN, so the first two pass it on to `odd`, and the third ends it.
template <class F, class I, bool Finite>
struct Quantizing {
  F inverse, low, high;
  I zero;
  F odd = F::set(0.0f);

  explicit Quantizing(const Affine& a)
      : inverse(F::set(a.inverse)), low(F::set(a.low)), high(F::set(a.high)), zero(I::set(a.zero)) {}

  [[gnu::always_inline]] I operator()(F x) {
    const F v = min(high, max(low, rounded(x * inverse)));
    if constexpr (Finite) return nearest(v) + zero;
    odd = fma(v, F::set(0.0f), odd);
    return nearest(max(v, low)) + zero;
  }
};

template <class F, class I, class Integer, bool Finite>
bool quantize(const float* x, std::ptrdiff_t n, const Affine& affine, void* out) {
  Quantizing<F, I, Finite> quantizing(affine);
  auto* to = static_cast<Integer*>(out);
  std::ptrdiff_t i = 0;
  for (; i + F::width <= n; i += F::width) I::store(to + i, quantizing(F::load(x + i)));
  if (i < n) {
    Integer integers[F::width];
    I::store(integers, quantizing(load_partial<F>(x + i, n - i)));
    std::memcpy(to + i, integers, static_cast<std::size_t>(n - i) * sizeof(Integer));
  }
  return all_zero(quantizing.odd);
}

// Divided, not multiplied by what 1 / scale is rounded to: a weight's integers are made once, and nearest.
template <class F, class I>
float quantize_channel(const float* w, std::ptrdiff_t n, std::int8_t* out) {
  const Extremes e = magnitude<F, I>(w, n);
  if (!e.finite) return __builtin_nanf("");
  const float scale = e.greatest / 127.0f;
  if (scale < std::numeric_limits<float>::min()) {
    std::memset(out, 0, static_cast<std::size_t>(n));
    return 0.0f;
  }
  const F divisor = F::set(scale), most = F::set(127.0f), least = F::set(-127.0f);
  const auto integers = [&](F x) { return nearest(min(most, max(least, rounded(x / divisor)))); };
  std::ptrdiff_t i = 0;
  for (; i + F::width <= n; i += F::width) I::store(out + i, integers(F::load(w + i)));
  if (i < n) {
    std::int8_t last[F::width];
    I::store(last, integers(load_partial<F>(w + i, n - i)));
    std::memcpy(out + i, last, static_cast<std::size_t>(n - i));
  }
  return scale;
}

template <bool Adds, class F>
[[gnu::always_inline]] inline F with_added(const DequantizeArgs& t, std::ptrdiff_t row, std::ptrdiff_t column, F y) {
  if constexpr (Adds)
    return rounded(y) + load_valid<F>(t.added + row * t.ld_added + column, t.cols - column);
  else
    return y;
}

template <class F, class I, bool Adds>
void dequantize_tile(const DequantizeArgs& args) {
  const DequantizeArgs t = args;  // a copy, which the tile cannot alias
  const F floor = F::set(t.floor);
  for (std::ptrdiff_t c = 0; c < t.cols; c += F::width) {
    const F scale = F::load(t.scales + c), bias = load_bias<F>(t.bias, c, t.cols - c);
    const I sums = I::load(t.sums + c);
    std::int32_t zero = t.row_scales[0].zero;  // in general that of all rows
    I shift = I::set(zero) * sums;
    for (std::ptrdiff_t r = 0; r < t.rows; ++r) {
      const RowScale row = t.row_scales[r];
      if (row.zero != zero) shift = I::set(zero = row.zero) * sums;
      I sum = I::load(static_cast<const std::int32_t*>(t.in) + r * t.ld_in + c) - shift;
      if (t.zeros != nullptr) sum = sum - I::set(row.sum) * I::load(t.zeros + c);
      const F y = rounded(rounded(to_float(sum) * scale) * F::set(row.scale)) + bias;
      store_valid(t.out + r * t.ld_out + c, with_added<Adds>(t, r, c, max(floor, y)), t.cols - c);
    }
  }
}

template <class F, class I>
void dequantize(const DequantizeArgs& args) {
  if (args.added == nullptr) return dequantize_tile<F, I, false>(args);
  dequantize_tile<F, I, true>(args);
}

template <class F, bool Adds>
void scale_tile(const DequantizeArgs& args) {
  const DequantizeArgs t = args;
  const F floor = F::set(t.floor);
  for (std::ptrdiff_t c = 0; c < t.cols; c += F::width) {
    const F scale = F::load(t.scales + c), bias = load_bias<F>(t.bias, c, t.cols - c);
    for (std::ptrdiff_t r = 0; r < t.rows; ++r) {
      const F y = rounded(F::load(static_cast<const float*>(t.in) + r * t.ld_in + c) * scale) + bias;
      store_valid(t.out + r * t.ld_out + c, with_added<Adds>(t, r, c, max(floor, y)), t.cols - c);
    }
  }
}

template <class F>
void scale_columns(const DequantizeArgs& args) {
  if (args.added == nullptr) return scale_tile<F, false>(args);
  scale_tile<F, true>(args);
}

// Of a group whose scale is none, NaN or infinite, all is NaN, and of too small a one all is 0.
template <class F, class I>
void quantize_groups(const GroupedRow& args) {
  const GroupedRow t = args;
  const F low = F::set(-127.0f), high = F::set(127.0f);
  for (std::ptrdiff_t begin = 0, g = 0; begin < t.n; begin += t.size, ++g) {
    const std::ptrdiff_t n = t.n - begin < t.size ? t.n - begin : t.size;
    const float* const x = t.x + begin;
    std::int8_t* const out = t.out + begin;
    float scale = t.scale;
    if (!(scale >= 0.0f) && scale == scale) {
      const Extremes most = magnitude<F, I>(x, n);
      scale = most.finite ? most.greatest / 127.0f : __builtin_nanf("");
    }
    if (scale < std::numeric_limits<float>::min()) scale = 0.0f;
    const F inverse = F::set(scale > 0.0f ? 1.0f / scale : 0.0f);
    F sum = F::set(0.0f);
    const auto integers = [&](F v) {
      v = round(min(high, max(low, rounded(v * inverse))));
      v = select_nan(v, F::set(0.0f), v);
      sum = sum + v;
      return nearest(v);
    };
    std::ptrdiff_t i = 0;
    for (; i + F::width <= n; i += F::width) I::store(out + i, integers(F::load(x + i)));
    if (i < n) {
      std::int8_t last[F::width];
      I::store(last, integers(load_partial<F>(x + i, n - i)));
      std::memcpy(out + i, last, static_cast<std::size_t>(n - i));
    }
    const float whole = total(sum);
    t.scales[g] = scale * t.unit;
    t.starts[g] = -128 * static_cast<std::int32_t>(whole);
    t.totals[g] = scale * whole;
  }
}

template <class F, class I>
inline constexpr Quantization quantization{
    extremes<F>,
    magnitude<F, I>,
    {{Format::uint8, false, quantize<F, I, std::uint8_t, false>, quantize<F, I, std::uint8_t, true>},
     {Format::int16, true, quantize<F, I, std::int16_t, false>, quantize<F, I, std::int16_t, true>},
     {Format::int8, true, nullptr, nullptr}},
    quantize_groups<F, I>,
    quantize_channel<F, I>,
    coding::code_row<F, I>,
    dequantize<F, I>,
    scale_columns<F>,
};

}  // namespace fastlinear
