// attention.hpp's functions around two products by a micro-kernel, written once over a vector type of 16 lanes;
// included inside an ISA's target region.
//
// Lanes are keys here, as sums of products come, so a row takes two reductions across a vector. Of 128 keys that is a
// tenth of its eight vectors of e^x.
#pragma once

#include <algorithm>
#include <cstddef>

#include "fastlinear/contract/attention.hpp"
#include "fastlinear/formats/bf16.hpp"
#include "fastlinear/generic/attention.hpp"

namespace fastlinear {

namespace rounded_attention_detail {

using attention_detail::kInfinity;
using attention_detail::load_some;
using Size = std::ptrdiff_t;

inline constexpr Size kPanel = 32;  // channels

// Two elements are as wide as a float: a panel is the transpose of 32 rows of such pairs.
template <class V>
void pack_keys(const void* rows, Size stride, Size keys, Size size, void* panels) {
  static_assert(2 * V::width == kPanel);
  const auto* const pairs = static_cast<const float*>(rows);
  auto* const to = static_cast<float*>(panels);
  for (Size key = 0; key < keys; key += kPanel)
    attention_detail::turn_in<V, 2>(pairs + key * (stride / 2), stride / 2, std::min(kPanel, keys - key), size / 2,
                                    to + key * (size / 2), [](V x) { return x; });
}

// Two rows become one of pairs.
template <class V>
void pack_values(const void* rows, Size stride, Size keys, Size size, void* panels) {
  const auto* const from = static_cast<const Bf16*>(rows);
  auto* to = static_cast<Bf16*>(panels);
  const auto part = [&](Size key, Size column) {
    if (key >= keys || column >= size) return V::set(0.0f);
    return load_some<V>(from + key * stride + column, size - column);
  };
  for (Size panel = 0; panel < size; panel += kPanel)
    for (Size key = 0; key < keys; key += 2)
      for (Size column = panel; column < panel + kPanel; column += V::width, to += 2 * V::width)
        V::store_pairs(to, part(key, column), part(key + 1, column));
}

// One row. `more(i, valid)` is what a mask adds to the scores from key i on.
template <class V, class More>
void weigh_row(const WeighArgs& t, Size row, const V& lanes, const More& more) {
  constexpr Size w = V::width;
  const Size keys = std::min(t.keys, t.diagonal + row + 1);
  const float* products = t.products + row * t.columns;
  auto* const weights = static_cast<Bf16*>(t.weights) + row * t.weights_stride;
  const V scale = V::set(t.scale), unseen = V::set(-kInfinity), sink = V::set(t.sink);
  V most = sink;
  for (Size tile = 0; tile < keys; tile += t.columns, products += t.tile)
    for (Size at = 0; at < std::min(t.columns, keys - tile); at += w) {
      const Size i = tile + at;
      V x = V::load(products + at) * scale;
      x = (t.cap > 0.0f ? attention_detail::capped(x, t.cap) : x) + more(i, keys - i);
      if (keys - i < w) x = select_gt(V::set(static_cast<float>(keys - i)), lanes, x, unseen);
      V::store(t.scores + i, x);
      most = max(most, x);
    }
  const float highest = greatest(most);
  const V top = V::set(highest == -kInfinity ? 0.0f : highest);  // of a row that sees nothing all scores become 0
  V sum = select_gt(V::set(1.0f), lanes, attention_detail::exp_below(sink - top), V::set(0.0f));  // in the first lane
  for (Size i = 0; i < keys; i += w) {
    const V e = attention_detail::exp_below(V::load(t.scores + i) - top);
    sum = sum + e;
    V::store(weights + i, e);
  }
  for (Size i = (keys + w - 1) / w * w; i < t.filled; i += w) V::store(weights + i, V::set(0.0f));
  const float whole = total(sum);
  t.factors[row] = whole == 0.0f ? 0.0f : 1.0f / whole;
}

template <class V>
void weigh(const WeighArgs& given) {
  const WeighArgs t = given;
  float numbers[V::width];
  for (Size i = 0; i < V::width; ++i) numbers[i] = static_cast<float>(i);
  const V lanes = V::load(numbers);
  const auto rows = [&](const auto& more_of) {
    for (Size r = 0; r < t.rows; ++r) weigh_row<V>(t, r, lanes, more_of(r));
  };
  const auto masked = [&]<class Element>(const Element* mask, const auto& each) {
    rows([&](Size r) {
      return [&, from = mask + r * t.mask_stride](Size i, Size valid) { return each(load_some<V>(from + i, valid)); };
    });
  };
  const auto as_it_is = [](V x) { return x; };
  const auto seen = [](V x) { return select_gt(x, V::set(0.0f), V::set(0.0f), V::set(-kInfinity)); };
  if (t.mask == nullptr && t.added == nullptr)
    return rows([](Size) { return [](Size, Size) { return V::set(0.0f); }; });
  if (t.mask == nullptr)
    return rows([&](Size) { return [&](Size i, Size valid) { return load_some<V>(t.added + i, valid); }; });
  switch (t.mask_format) {
    case Format::fp32:
      return masked(static_cast<const float*>(t.mask), as_it_is);
    case Format::bf16:
      return masked(static_cast<const Bf16*>(t.mask), as_it_is);
    case Format::fp16:
      return masked(static_cast<const Fp16*>(t.mask), as_it_is);
    default:
      return masked(static_cast<const Int8*>(t.mask), seen);
  }
}

template <class V>
void scale_rows(float* tile, Size ld, Size rows, Size columns, const float* factors) {
  for (Size r = 0; r < rows; ++r) {
    const V factor = V::set(factors[r]);
    for (Size c = 0; c < columns; c += V::width) V::store(tile + r * ld + c, V::load(tile + r * ld + c) * factor);
  }
}

}  // namespace rounded_attention_detail

template <class V>
inline constexpr RoundedAttention rounded_attention{
    rounded_attention_detail::pack_keys<V>, rounded_attention_detail::pack_values<V>,
    rounded_attention_detail::weigh<V>, rounded_attention_detail::scale_rows<V>};

}  // namespace fastlinear
