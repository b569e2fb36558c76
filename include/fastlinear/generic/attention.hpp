// attention.hpp's function, written once over a vector type; included inside an ISA's target region.
//
// Lanes are queries while scores are made. So the softmax stays vertical: no sum and no maximum is taken across a
// vector; and keys are read row by row as they lie. What is turned over is the queries, on their way in. For the
// outputs lanes are elements of a head, so that these leave in the order in which they lie, and values are read as they
// do.
//
//   panel[d][query]    = scale * q        (Lanes = C vectors of queries)
//   scores[key][query] = sum over d of k[key][d] * panel[d], and the maximum of each query on the way
//   scores = exp(scores - maximum), their sum, with that of a sink, which is one score more
//   y[query][d]        = sum over keys of scores[key][query] * v[key][d] / sum
//
// Both products are one loop: a broadcast number times vectors. A tile of R rows and C vectors keeps R * C sums in
// registers: 14 x 2 with AVX-512 (28, 2 of the panel, 1 broadcast from memory), 6 x 2 with AVX2 (12, 2, 1 of 16). A
// step takes 2 + 14 loads for 28 products: two ports of each are enough.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstring>
#include <limits>
#include <type_traits>
#include <utility>

#include "fastlinear/contract/attention.hpp"
#include "fastlinear/formats/bf16.hpp"
#include "fastlinear/formats/fp16.hpp"
#include "fastlinear/formats/int8.hpp"
#include "fastlinear/generic/math.hpp"

namespace fastlinear {

namespace attention_detail {

using Size = std::ptrdiff_t;
using One = std::integral_constant<Size, 1>;
inline constexpr float kInfinity = std::numeric_limits<float>::infinity();

// e^x of x <= 0 or NaN. What would be no normal number is 0, so that no denormal slows the products down.
template <class V>
[[gnu::always_inline]] inline V exp_below(V x) {
  const V least = V::set(-87.0f);
  const epilogues::Reduced<V> e = epilogues::reduce(max(least, x));
  return select_gt(least, x, V::set(0.0f), scale(epilogues::exp_reduced(e.r), e.n));
}

template <class V>
[[gnu::always_inline]] inline V capped(V score, float cap) {
  return V::set(cap) * epilogues::tanh(score * V::set(1.0f / cap));
}

// The first `valid` of the elements at p, or all if that is more, and zeros.
template <class V, class Element>
[[gnu::always_inline]] inline V load_some(const Element* p, Size valid) {
  if (V::width == 1 || valid >= V::width) return V::load(p);
  Element some[V::width] = {};
  std::memcpy(some, p, static_cast<std::size_t>(valid) * sizeof(Element));
  return V::load(some);
}

template <class V, class Element>
[[gnu::always_inline]] inline void store_some(Element* p, V x, Size valid) {
  if (V::width == 1 || valid >= V::width) return V::store(p, x);
  Element some[V::width];
  V::store(some, x);
  std::memcpy(p, some, static_cast<std::size_t>(valid) * sizeof(Element));
}

// Rows, `columns` elements each, become the columns of panel[columns][C vectors]: each(number). What is no row is 0.
template <class V, Size C, class Element, class Each>
void turn_in(const Element* in, Size stride, Size rows, Size columns, float* panel, const Each& each) {
  constexpr Size w = V::width;
  for (Size c = 0; c < C; ++c)
    for (Size first = 0; first < columns; first += w) {
      V block[w];
#pragma GCC unroll 16
      for (Size i = 0; i < w; ++i) {
        const Size row = c * w + i;
        block[i] = row < rows ? each(load_some<V>(in + row * stride + first, columns - first)) : V::set(0.0f);
      }
      transpose(block);
      float* const out = panel + first * C * w + c * w;
      if (columns - first >= w) {
#pragma GCC unroll 16
        for (Size j = 0; j < w; ++j) V::store(out + j * C * w, block[j]);
      } else {
#pragma GCC unroll 16
        for (Size j = 0; j < w; ++j)
          if (j < columns - first) V::store(out + j * C * w, block[j]);
      }
    }
}

// Sums of the tile whose first row is `first`: scores, which go to out[row][C vectors], and their maxima; with what a
// mask adds to each row of them, and to each of them.
template <class V, Size C>
struct Scores {
  float* out;
  V (&maximum)[C];
  const float *added, *mask;  // of the first row of all, or null

  template <Size R>
  [[gnu::always_inline]] void operator()(Size first, const V (&sums)[R][C]) const {
    V most[C];
#pragma GCC unroll 2
    for (Size v = 0; v < C; ++v) most[v] = maximum[v];
    const auto finish = [&](const auto& score) {
#pragma GCC unroll 16
      for (Size r = 0; r < R; ++r)
#pragma GCC unroll 2
        for (Size v = 0; v < C; ++v) {
          const Size at = ((first + r) * C + v) * V::width;
          const V x = score(sums[r][v], first + r, at);
          V::store(out + at, x);
          most[v] = max(most[v], x);
        }
    };
    if (mask != nullptr)
      finish([&](V x, Size row, Size at) {
        return x + V::set(added == nullptr ? 0.0f : added[row]) + V::load(mask + at);
      });
    else if (added != nullptr)
      finish([&](V x, Size row, Size) { return x + V::set(added[row]); });
    else
      finish([](V x, Size, Size) { return x; });
#pragma GCC unroll 2
    for (Size v = 0; v < C; ++v) maximum[v] = most[v];
  }
};

// Or outputs, each row times its factor, of which the first `valid` columns exist.
template <class V, Size C, class Element>
struct Outputs {
  Element* y;
  Size stride, valid;
  const float* factor;

  template <Size R>
  [[gnu::always_inline]] void operator()(Size first, const V (&sums)[R][C]) const {
#pragma GCC unroll 16
    for (Size r = 0; r < R; ++r) {
      const V f = V::set(factor[first + r]);
#pragma GCC unroll 2
      for (Size v = 0; v < C; ++v) {
        Element* const to = y + (first + r) * stride + v * V::width;
        if (valid > v * V::width) store_some(to, sums[r][v] * f, valid - v * V::width);
      }
    }
  }
};

// The sums, R rows of C vectors, over `depth` of a[r * row + d * deep] * panel[d], whose rows lie `stride` apart.
template <class V, Size C, Size R, class Row, class Deep, class Stride, class End>
void tile(const float* a, Row row, Deep deep, Size depth, const float* panel, Stride stride, Size first,
          NextHead& ahead, const End& end) {
  V c[R][C];
#pragma GCC unroll 16
  for (Size r = 0; r < R; ++r)
#pragma GCC unroll 2
    for (Size v = 0; v < C; ++v) c[r][v] = V::set(0.0f);
  for (Size d = 0; d < depth; ++d) {
    V p[C];
#pragma GCC unroll 2
    for (Size v = 0; v < C; ++v) p[v] = V::load(panel + v * V::width);
#pragma GCC unroll 16
    for (Size r = 0; r < R; ++r) {
      const V x = V::set(a[r * row]);
#pragma GCC unroll 2
      for (Size v = 0; v < C; ++v) c[r][v] = fma(x, p[v], c[r][v]);
    }
    a += deep;
    panel += stride;
    ahead.fetch_row();
  }
  end(first, c);
}

// The same of any number of rows: balanced tiles of at most R.
template <class V, Size C, Size R, class Row, class Deep, class Stride, class End>
void product(const float* a, Row row, Deep deep, Size rows, Size depth, const float* panel, Stride stride,
             NextHead& ahead, const End& end) {
  using Tile = void (*)(const float*, Row, Deep, Size, const float*, Stride, Size, NextHead&, const End&);
  constexpr auto tiles = []<std::size_t... I>(std::index_sequence<I...>) {
    struct Table {
      Tile of[R];
    };
    return Table{{&tile<V, C, Size{I} + 1, Row, Deep, Stride, End>...}};
  }(std::make_index_sequence<static_cast<std::size_t>(R)>());
  const Size count = (rows + R - 1) / R;
  for (Size t = 0, first = 0; t < count; ++t) {
    const Size next = (t + 1) * rows / count;
    tiles.of[next - first - 1](a + first * row, row, deep, depth, panel, stride, first, ahead, end);
    first = next;
  }
}

// softmax numerators times v, for some queries: C vectors of each row at a time.
template <class V, Size C, Size R, class Element>
void output(const AttentionArgs& args, Size keys, Size rows, Size column, const float* scores, Size lanes,
            const float* factor, Element* y) {
  product<V, C, R>(scores, One(), lanes, rows, keys, args.v + column, args.v_stride, *args.ahead,
                   Outputs<V, C, Element>{y + column, args.y_stride, args.size - column, factor});
}

template <class V, Size C>
void turn_mask(const AttentionArgs& args, Size query, Size rows, Size keys, float* to) {
  const auto turn = [&]<class Element>(const Element* mask, const auto& each) {
    turn_in<V, C>(mask + query * args.mask_stride, args.mask_stride, rows, keys, to, each);
  };
  const auto as_it_is = [](V x) { return x; };
  const auto seen = [](V x) { return select_gt(x, V::set(0.0f), V::set(0.0f), V::set(-kInfinity)); };
  switch (args.mask_format) {
    case Format::fp32:
      return turn(static_cast<const float*>(args.mask), as_it_is);
    case Format::bf16:
      return turn(static_cast<const Bf16*>(args.mask), as_it_is);
    case Format::fp16:
      return turn(static_cast<const Fp16*>(args.mask), as_it_is);
    default:
      return turn(static_cast<const Int8*>(args.mask), seen);
  }
}

// Scores as they are capped, before what a mask adds to each row of them, and to each of them; and their maxima.
template <class V, Size C>
void cap_scores(float* scores, Size keys, float cap, const float* added, const float* mask, V (&maximum)[C]) {
  for (Size at = 0; at < keys * C * V::width; at += C * V::width) {
    const V more = V::set(added == nullptr ? 0.0f : added[at / (C * V::width)]);
#pragma GCC unroll 2
    for (Size c = 0; c < C; ++c) {
      float* const s = scores + at + c * V::width;
      V x = capped(V::load(s), cap) + more;
      if (mask != nullptr) x = x + V::load(mask + (s - scores));
      V::store(s, x);
      maximum[c] = max(maximum[c], x);
    }
  }
}

// Up to C vectors of queries, from `query` on.
template <class V, Size R, Size C, class Element>
void some_queries(const AttentionArgs& args, Size query) {
  constexpr Size w = V::width, lanes = C * w;
  const Size rows = std::min(lanes, args.queries - query);
  const Size first_end = query + args.diagonal;  // the last key that the first query sees
  const Size keys = std::max(Size{0}, std::min(args.keys, first_end + rows));
  float* const panel = args.scratch;
  float* const scores = panel + args.size * lanes;
  float* const mask = scores + keys * lanes;

  const V factor = V::set(args.scale), sink = V::set(args.sink);
  V maximum[C], sum[C], last[C];
#pragma GCC unroll 2
  for (Size c = 0; c < C; ++c) maximum[c] = sink;
  turn_in<V, C>(static_cast<const Element*>(args.q) + query * args.q_stride, args.q_stride, rows, args.size, panel,
                [&](V x) { return x * factor; });
  if (args.mask != nullptr && !(args.turned && args.queries <= lanes)) turn_mask<V, C>(args, query, rows, keys, mask);
  const float* const more = args.mask == nullptr ? nullptr : mask;
  const bool caps = args.cap > 0.0f;
  product<V, C, R>(args.k, args.k_stride, One(), keys, args.size, panel, std::integral_constant<Size, lanes>(),
                   *args.ahead, Scores<V, C>{scores, maximum, caps ? nullptr : args.added, caps ? nullptr : more});
  if (caps) {
#pragma GCC unroll 2
    for (Size c = 0; c < C; ++c) maximum[c] = sink;
    cap_scores<V, C>(scores, keys, args.cap, args.added, more, maximum);
  }
  if (keys > first_end + 1) {  // some keys are seen by some of the queries
    float lane[lanes];
    for (Size i = 0; i < lanes; ++i) lane[i] = static_cast<float>(first_end + i);
#pragma GCC unroll 2
    for (Size c = 0; c < C; ++c) maximum[c] = sink, last[c] = V::load(lane + c * w);
    for (Size key = 0; key < keys; ++key) {
      const V at = V::set(static_cast<float>(key));
#pragma GCC unroll 2
      for (Size c = 0; c < C; ++c) {
        float* const s = scores + key * lanes + c * w;
        const V x = select_gt(at, last[c], V::set(-kInfinity), V::load(s));
        V::store(s, x);
        maximum[c] = max(maximum[c], x);
      }
    }
  }
#pragma GCC unroll 2
  for (Size c = 0; c < C; ++c) {  // a query that sees nothing: all its scores become 0
    maximum[c] = select_gt(maximum[c], V::set(-kInfinity), maximum[c], V::set(0.0f));
    sum[c] = exp_below(sink - maximum[c]);
  }
  for (Size key = 0; key < keys; ++key)
#pragma GCC unroll 2
    for (Size c = 0; c < C; ++c) {
      float* const s = scores + key * lanes + c * w;
      const V e = exp_below(V::load(s) - maximum[c]);
      sum[c] = sum[c] + e;
      V::store(s, e);
    }
  float inverses[lanes];
#pragma GCC unroll 2
  for (Size c = 0; c < C; ++c) {
    const V inverse = V::set(1.0f) / sum[c];
    V::store(inverses + c * w, select_gt(inverse, V::set(std::numeric_limits<float>::max()), V::set(0.0f), inverse));
  }
  auto* const y = static_cast<Element*>(args.y) + query * args.y_stride;
  Size column = 0;
  for (; args.size - column > w; column += 2 * w) output<V, 2, R>(args, keys, rows, column, scores, lanes, inverses, y);
  if (column < args.size) output<V, 1, R>(args, keys, rows, column, scores, lanes, inverses, y);
}

}  // namespace attention_detail

// R: rows of a tile.
template <class V, std::ptrdiff_t R, class Element>
void attention(const AttentionArgs& given) {
  using namespace attention_detail;
  static_assert(2 * V::width <= kAttentionLanes);
  const AttentionArgs args = given;
  Size query = 0;
  while (args.queries - query > V::width) {
    some_queries<V, R, 2, Element>(args, query);
    query += 2 * V::width;
  }
  if (query < args.queries) some_queries<V, R, 1, Element>(args, query);
}

// In the order of enum Format: fp32, bf16, fp16.
template <class V, std::ptrdiff_t R>
inline constexpr Attention attentions[] = {attention<V, R, float>, attention<V, R, Bf16>, attention<V, R, Fp16>};

}  // namespace fastlinear
