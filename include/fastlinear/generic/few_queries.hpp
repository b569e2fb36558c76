// attention.hpp's function for few queries over many keys, as in decoding, written once over a vector type; included
// inside an ISA's target region.
//
// Lanes are keys in the softmax and elements of a head in both products, so that k and v are read as they lie, in their
// own format, and no lane is idle however few the queries are.
//
//   scores[query][key]: of V::width keys at a time, a sum in a register for each, turned over and added up at the end.
//     With AVX-512 and heads of 64: 64 FMAs with an operand in memory, 64 shuffles and 15 additions for 16 keys.
//   y[R queries][C vectors] += scores[query][key] * v[key]: 4 x 4 sums, 4 of v and one broadcast are 21 registers; with
//     AVX2's 16, 4 x 2, 2 and 1.
#pragma once

#include <algorithm>
#include <cstddef>
#include <limits>
#include <utility>

#include "fastlinear/contract/attention.hpp"
#include "fastlinear/generic/attention.hpp"

namespace fastlinear {

namespace few_queries_detail {

using attention_detail::capped;
using attention_detail::exp_below;
using attention_detail::kInfinity;
using attention_detail::load_some;
using attention_detail::Size;
using attention_detail::store_some;

// The dot products of a query, zeros behind it, and the `valid` keys from k on, as lanes.
template <class V, class Element>
[[gnu::always_inline]] inline V dots(const float* query, const Element* k, Size stride, Size valid, Size size) {
  constexpr Size w = V::width;
  const Element* rows[w];
  V sums[w];
#pragma GCC unroll 16
  for (Size i = 0; i < w; ++i) rows[i] = k + std::min(i, valid - 1) * stride, sums[i] = V::set(0.0f);
  Size d = 0;
  for (; d + w <= size; d += w) {
    const V x = V::load(query + d);
#pragma GCC unroll 16
    for (Size i = 0; i < w; ++i) sums[i] = fma(x, V::load(rows[i] + d), sums[i]);
  }
  if (d < size) {
    const V x = V::load(query + d);
#pragma GCC unroll 16
    for (Size i = 0; i < w; ++i) sums[i] = fma(x, load_some<V>(rows[i] + d, size - d), sums[i]);
  }
  transpose(sums);
#pragma GCC unroll 4
  for (Size step = w / 2; step > 0; step /= 2)
#pragma GCC unroll 8
    for (Size i = 0; i < step; ++i) sums[i] = sums[i] + sums[i + step];
  return sums[0];
}

// Scores of a row become e^(score - maximum); 1 over their sum, or 0 for a query that sees nothing.
template <class V>
float softmax(const FewQueriesArgs& args, Size row, float* scores) {
  constexpr Size w = V::width;
  const Size keys = args.keys;
  const V sink = V::set(args.sinks == nullptr ? kNoSink : args.sinks[row]);
  V highest = sink;
  for (Size key = 0; key < keys; key += w) {
    V s = V::load(scores + key);
    if (args.cap > 0.0f) s = capped(s, args.cap);
    if (args.added != nullptr) s = s + load_some<V>(args.added + key, keys - key);
    if (keys - key < w) {  // the lanes behind the last key
      float last[w];
      V::store(last, s);
      for (Size i = keys - key; i < w; ++i) last[i] = -kInfinity;
      s = V::load(last);
    }
    V::store(scores + key, s);
    highest = max(highest, s);
  }
  float lanes[w], maximum = -kInfinity;
  V::store(lanes, highest);
  for (Size i = 0; i < w; ++i) maximum = lanes[i] > maximum ? lanes[i] : maximum;
  const V base = V::set(maximum > -kInfinity ? maximum : 0.0f);
  V sum = V::set(0.0f);
  for (Size key = 0; key < keys; key += w) {
    const V e = exp_below(V::load(scores + key) - base);
    V::store(scores + key, e);
    sum = sum + e;
  }
  V::store(lanes, exp_below(sink - base));
  const float inverse = 1.0f / (total(sum) + lanes[0]);
  return inverse > std::numeric_limits<float>::max() ? 0.0f : inverse;
}

// R rows of `y` from column `first` on: C vectors, of the last of which `valid` columns exist.
template <class V, Size R, Size C, class Element>
void columns(const FewQueriesArgs& args, const float* scores, Size padded, const float* factors, Size first) {
  constexpr Size w = V::width;
  const Element* v = static_cast<const Element*>(args.v) + first;
  const Size valid = args.size - first - (C - 1) * w;
  V c[R][C];
#pragma GCC unroll 4
  for (Size r = 0; r < R; ++r)
#pragma GCC unroll 4
    for (Size i = 0; i < C; ++i) c[r][i] = V::set(0.0f);
  for (Size key = 0; key < args.keys; ++key) {
    V x[C];
#pragma GCC unroll 4
    for (Size i = 0; i < C - 1; ++i) x[i] = V::load(v + i * w);
    x[C - 1] = load_some<V>(v + (C - 1) * w, valid);
#pragma GCC unroll 4
    for (Size r = 0; r < R; ++r) {
      const V p = V::set(scores[r * padded + key]);
#pragma GCC unroll 4
      for (Size i = 0; i < C; ++i) c[r][i] = fma(p, x[i], c[r][i]);
    }
    v += args.v_stride;
  }
#pragma GCC unroll 4
  for (Size r = 0; r < R; ++r) {
    Element* const y = static_cast<Element*>(args.y) + r * args.y_stride + first;
#pragma GCC unroll 4
    for (Size i = 0; i < C; ++i) store_some(y + i * w, c[r][i] * V::set(factors[r]), i < C - 1 ? w : valid);
  }
}

inline constexpr Size kRows = 4;

// The function for each number of rows up to kRows.
template <class V, Size C, class Element>
struct Columns {
  using Function = void (*)(const FewQueriesArgs&, const float*, Size, const float*, Size);
  static constexpr Function of[kRows] = {columns<V, 1, C, Element>, columns<V, 2, C, Element>,
                                         columns<V, 3, C, Element>, columns<V, 4, C, Element>};
};

template <class V, class Element>
void run(const FewQueriesArgs& given) {
  constexpr Size w = V::width, C = w >= kLanes ? 4 : 2;
  const FewQueriesArgs args = given;
  const auto whole = [](Size n) { return (n + w - 1) / w * w; };
  const Size wide = whole(args.size), padded = whole(args.keys);
  float* const queries = args.scratch;
  float* const scores = queries + args.queries * wide;
  const auto* const q = static_cast<const Element*>(args.q);
  const auto* const k = static_cast<const Element*>(args.k);

  const V scale = V::set(args.scale);
  for (Size r = 0; r < args.queries; ++r)
    for (Size d = 0; d < args.size; d += w)
      V::store(queries + r * wide + d, load_some<V>(q + r * args.q_stride + d, args.size - d) * scale);
  for (Size key = 0; key < args.keys; key += w)
    for (Size r = 0; r < args.queries; ++r)
      V::store(scores + r * padded + key, dots<V>(queries + r * wide, k + key * args.k_stride, args.k_stride,
                                                  std::min(w, args.keys - key), args.size));

  for (Size row = 0; row < args.queries; row += kRows) {
    const Size rows = std::min(kRows, args.queries - row);
    float factors[kRows] = {};
    for (Size r = 0; r < rows; ++r) factors[r] = softmax<V>(args, row + r, scores + (row + r) * padded);
    FewQueriesArgs part = args;
    part.y = static_cast<Element*>(args.y) + row * args.y_stride;
    for (Size first = 0; first < args.size;) {
      const bool many = args.size - first > (C - 1) * w;
      (many ? Columns<V, C, Element>::of : Columns<V, 1, Element>::of)[rows - 1](part, scores + row * padded, padded,
                                                                                 factors, first);
      first += many ? C * w : w;
    }
  }
}

}  // namespace few_queries_detail

// In the order of enum Format: fp32, bf16, fp16.
template <class V>
inline constexpr FewQueries few_queries[] = {few_queries_detail::run<V, float>, few_queries_detail::run<V, Bf16>,
                                             few_queries_detail::run<V, Fp16>};

}  // namespace fastlinear
