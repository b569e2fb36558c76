// Integer products of weights that are scaled in groups of K, written once over a vector type V and its integers I.
//
// Rows are int8, with a scale for each group. A group's products are summed in int32, exactly, and then
//
//   y = fma(float(sum) * scale of W, scale of x, y)    and, with offsets,    y = fma(total of x, offset, y)
//
// in fp32, group by group: bits are the same on every ISA. Sums of y are in the tile, in L1: for a group of 32 k that
// is a conversion, a multiplication, an FMA, a load and a store for 8 dot products of four k.
//
// Op, for each ISA one struct a format (isa/<isa>/dots.hpp), is what codes mean as integers:
//   Sum               V::width int32 sums
//   layout            of the panels; kr k of a channel share 32 bits
//   weights(p)        those of V::width channels and kr k, whose codes begin at p
//   row(a)            kr integers of a row
//   start(n)          sums before the first product; n is -128 times the sum of the row's integers, for weights
//                     that lie 128 higher. As text, too, from memory: GCC 12 copies what two of the sums begin with
//   add(c, w, x)      c + the products of weights and a row, as text: GCC 12 spills sums that it sees change twice
//   sums(c)           as I
//   registers         how many there are, where they may hold the weights of all channels of a tile; else 0
//   Even, of int4     another Op, for tables whose numbers follow one another: codes are weights then, a constant too
//                     high, and nothing is looked up, which is what few rows take most of their time for
//
// Included inside an ISA's target region.
#pragma once

#include <algorithm>
#include <cstring>
#include <type_traits>

#include "fastlinear/contract/kernel.hpp"
#include "fastlinear/formats/scales.hpp"
#include "fastlinear/generic/ahead.hpp"

namespace fastlinear::dots {

// kr k of R rows, those from `a` on, and of the panels' channels.
template <class V, class Op, std::ptrdiff_t R, std::ptrdiff_t Count, std::ptrdiff_t P>
[[gnu::always_inline]] inline void add(typename Op::Sum (&c)[R][Count], const Op& op, const char* const (&panels)[P],
                                       const std::int8_t* a, std::ptrdiff_t lda) {
  constexpr std::ptrdiff_t per_panel = Count / P;
  const auto weights = [&](std::ptrdiff_t v) {
    return op.weights(panels[v / per_panel] + v % per_panel * V::width * 4);
  };
  if constexpr (Op::registers > 0) {  // what a row has is fetched once for all channels
    typename Op::Weights w[Count];
#pragma GCC unroll 8
    for (std::ptrdiff_t v = 0; v < Count; ++v) w[v] = weights(v);
#pragma GCC unroll 16
    for (std::ptrdiff_t r = 0; r < R; ++r) {
      const auto x = Op::row(a + r * lda);
#pragma GCC unroll 8
      for (std::ptrdiff_t v = 0; v < Count; ++v) c[r][v] = Op::add(c[r][v], w[v], x);
    }
  } else {
#pragma GCC unroll 8
    for (std::ptrdiff_t v = 0; v < Count; ++v) {
      const typename Op::Weights w = weights(v);
#pragma GCC unroll 16
      for (std::ptrdiff_t r = 0; r < R; ++r) c[r][v] = Op::add(c[r][v], w, Op::row(a + r * lda));
    }
  }
}

template <class T>
[[gnu::always_inline]] inline const T& of_row(const T* first, std::ptrdiff_t row_bytes, std::ptrdiff_t r,
                                              std::ptrdiff_t g) {
  return reinterpret_cast<const T*>(reinterpret_cast<const char*>(first) + r * row_bytes)[g];
}

// R rows of P panels; Columns: of a full tile.
template <class V, class Op, std::ptrdiff_t R, std::ptrdiff_t P, std::ptrdiff_t Columns, bool Offsets>
void multiply(const TileArgs& t) {
  constexpr std::ptrdiff_t nr = Op::layout.nr, kr = Op::layout.kr, per_panel = nr / V::width, Count = P * per_panel;
  const ScaledGroups how = *t.groups;
  const RowGroups x = t.row_groups;
  const std::ptrdiff_t lda = t.lda;
  const Op op(how);
  const auto* a = static_cast<const std::int8_t*>(t.a);
  auto* const sums = static_cast<float*>(t.tile);
  const char* panels[P];
#pragma GCC unroll 8
  for (std::ptrdiff_t p = 0; p < P; ++p) panels[p] = static_cast<const char*>(t.panel) + p * t.panel_stride;

  // The only tile of its panels streams them; others bring some of the next ones. One loop does both, without a branch,
  // for which GCC 12 would keep a second copy of the sums.
  const bool streams = t.prefetch_stride == 0;
  const char* prefetch = streams ? panels[0] + (R > 1 ? codes_ahead(P) : 0) : t.prefetch;
  const std::ptrdiff_t step = streams ? nr * 4 : t.prefetch_stride, between = streams ? t.panel_stride : nr * 4;
  const std::ptrdiff_t bytes = ceil_div(t.k, kr) * nr * 4, next = nr * (how.format == Format::fp32 ? 4 : 2);
  Ahead codes(streams ? codes_ahead(P) : 0, bytes, streams ? P * t.panel_stride : bytes);
  Ahead groups(kGroupsAhead * next, ceil_div(t.k, how.size) * next, P * how.panel_stride);

  t.lines.fetch();
  if (!t.accumulate)
    for (std::ptrdiff_t r = 0; r < R; ++r) std::fill_n(sums + r * Columns, P * nr, 0.0f);
  const char *scales = how.scales, *offsets = how.offsets;
  for (std::ptrdiff_t k = 0, group = 0; k < t.k; ++group) {
    const std::ptrdiff_t end = std::min(t.k, k + how.size);
    const std::ptrdiff_t of_scales = R == 1 ? groups.step(next) : kGroupsAhead * next;
#pragma GCC unroll 8
    for (std::ptrdiff_t p = 0; p < P; ++p) __builtin_prefetch(scales + p * how.panel_stride + of_scales);
    typename Op::Sum c[R][Count];
#pragma GCC unroll 16
    for (std::ptrdiff_t r = 0; r < R; ++r)
#pragma GCC unroll 8
      for (std::ptrdiff_t v = 0; v < Count; ++v) c[r][v] = op.start(of_row(x.starts, lda, r, group));
    for (; k < end; k += kr) {
      add<V, Op, R, Count, P>(c, op, panels, a + k, lda);
      const std::ptrdiff_t ahead = R == 1 ? codes.step(step) : 0;
#pragma GCC unroll 8
      for (std::ptrdiff_t p = 0; p < P; ++p) {
        __builtin_prefetch(prefetch + p * between + ahead, 0, 2);
        __builtin_prefetch(prefetch + p * between + ahead + 64, 0, 2);
        panels[p] += nr * 4;
      }
      prefetch += step;
    }
#pragma GCC unroll 8
    for (std::ptrdiff_t v = 0; v < Count; ++v) {
      const std::ptrdiff_t panel = v / per_panel * how.panel_stride, at = v % per_panel * V::width;
      const V scale = load_scales<V>(how.format, scales + panel, at);
      V offset = V::set(0.0f);
      if constexpr (Offsets) offset = load_scales<V>(how.format, offsets + panel, at);
#pragma GCC unroll 16
      for (std::ptrdiff_t r = 0; r < R; ++r) {
        float* const to = sums + r * Columns + v * V::width;
        const V product = rounded(to_float(Op::sums(c[r][v])) * scale);
        V sum = fused(product, V::set(of_row(x.scales, lda, r, group)), V::load(to));
        if constexpr (Offsets) sum = fused(V::set(of_row(x.totals, lda, r, group)), offset, sum);
        V::store(to, sum);
      }
    }
    asm volatile("" ::: "memory");  // the tile stays where it is: GCC 12 would keep a second one on the stack
    scales += next;
    if constexpr (Offsets) offsets += next;
  }
}

// A single row, whose panels follow one another as they lie in memory: one stream, which is what memory gives fastest.
// Scale: of the weights' groups, known here since a group may be four steps. Sums stay in registers from group to
// group.
template <class V, class Op, class Scale, bool Offsets>
void stream(const TileArgs& t) {
  constexpr std::ptrdiff_t nr = Op::layout.nr, kr = Op::layout.kr, Count = nr / V::width;
  constexpr std::ptrdiff_t next = nr * std::ptrdiff_t{sizeof(Scale)};
  static constexpr std::int32_t kZero = 0;
  const ScaledGroups how = *t.groups;
  const RowGroups x = t.row_groups;
  const Op op(how);
  const auto* const a = static_cast<const std::int8_t*>(t.a);
  const std::ptrdiff_t bytes = ceil_div(t.k, kr) * nr * 4, scales_bytes = ceil_div(t.k, how.size) * next;

  t.lines.fetch();
  for (std::ptrdiff_t p = 0; p < t.panels; ++p) {
    const char* panel = static_cast<const char*>(t.panel) + p * t.panel_stride;
    const char* scales = how.scales + p * how.panel_stride;
    const char* offsets = Offsets ? how.offsets + p * how.panel_stride : nullptr;
    auto* const sums = static_cast<float*>(t.tile) + p * nr;
    Ahead codes(kStreamAhead, bytes, t.panel_stride), groups(kStreamGroupsAhead * next, scales_bytes, how.panel_stride);
    V y[Count];
#pragma GCC unroll 8
    for (std::ptrdiff_t v = 0; v < Count; ++v) y[v] = t.accumulate ? V::load(sums + v * V::width) : V::set(0.0f);
    for (std::ptrdiff_t k = 0, group = 0; k < t.k; ++group) {
      const std::ptrdiff_t end = std::min(t.k, k + how.size), of_scales = groups.step(next);
      __builtin_prefetch(scales + of_scales);
      if constexpr (Offsets) __builtin_prefetch(offsets + of_scales);
      typename Op::Sum c[2][1][Count];  // of even and of odd steps: sums wait half as long for one another
#pragma GCC unroll 8
      for (std::ptrdiff_t v = 0; v < Count; ++v) {
        c[0][0][v] = op.start(x.starts[group]);
        c[1][0][v] = op.start(kZero);
      }
      const auto step = [&](typename Op::Sum(&to)[1][Count]) {
        const std::ptrdiff_t ahead = codes.step(nr * 4);
        __builtin_prefetch(panel + ahead);
        __builtin_prefetch(panel + ahead + 64);
        const char* const panels[] = {panel};
        add<V, Op, 1, Count, 1>(to, op, panels, a + k, 0);
        panel += nr * 4;
        k += kr;
      };
      while (k + kr < end) {
        step(c[0]);
        step(c[1]);
      }
      if (k < end) step(c[0]);
#pragma GCC unroll 8
      for (std::ptrdiff_t v = 0; v < Count; ++v) {
        const auto number = [v](const char* from) {
          return V::load(reinterpret_cast<const Scale*>(from) + v * V::width);
        };
        const V product = rounded(to_float(Op::sums(c[0][0][v]) + Op::sums(c[1][0][v])) * number(scales));
        y[v] = fused(product, V::set(x.scales[group]), y[v]);
        if constexpr (Offsets) y[v] = fused(V::set(x.totals[group]), number(offsets), y[v]);
      }
      scales += next;
      if constexpr (Offsets) offsets += next;
    }
#pragma GCC unroll 8
    for (std::ptrdiff_t v = 0; v < Count; ++v) V::store(sums + v * V::width, y[v]);
  }
}

// More rows share what was looked up.
inline constexpr std::ptrdiff_t kFewRows = 4;

// Whether each number of a table is one more than the last. Inline, as Ahead is.
[[gnu::always_inline]] inline bool is_even(const std::int8_t (&integers)[16]) {
  std::int8_t next[16];
  for (int i = 0; i < 16; ++i) next[i] = static_cast<std::int8_t>(integers[0] + i);
  return std::memcmp(integers, next, sizeof next) == 0;
}

// The Even of what an Op of int4 begins as: `Half` has its layout and its add, and halves(p), the codes there.
template <class Half, class I>
struct EvenDots : Half {
  std::int32_t first;

  explicit EvenDots(const ScaledGroups& how) : first(how.integers[0]) {}
  static typename Half::Weights weights(const char* p) { return Half::halves(p); }
  // Codes lie -first higher than the numbers of the table.
  typename Half::Sum start(std::int32_t biased) const { return I::set((biased >> 7) * -first).v; }
};

// What kernels::row makes a kernel of. Streams: of one row, whose panels follow one another.
template <class V, class Op, bool Streams = false>
struct Tile {
  static constexpr Format rows = Format::int8, accumulate = Format::fp32;
  static constexpr Layout layout = Op::layout;
  static constexpr std::ptrdiff_t k_step = Op::layout.kr;
  template <std::ptrdiff_t R, std::ptrdiff_t MR, std::ptrdiff_t P, std::ptrdiff_t Columns>
  static void run(const TileArgs& t) {
    static_assert(R == 1 || !Streams);
    if constexpr (R <= kFewRows && requires { typename Op::Even; })
      if (is_even(t.groups->integers)) return run_as<typename Op::Even, R, P, Columns>(t);
    run_as<Op, R, P, Columns>(t);
  }

 private:
  template <class As, std::ptrdiff_t R, std::ptrdiff_t P, std::ptrdiff_t Columns>
  static void run_as(const TileArgs& t) {
    if (t.groups->offsets == nullptr)
      run_with<As, R, P, Columns, false>(t);
    else
      run_with<As, R, P, Columns, true>(t);
  }
  template <class As, std::ptrdiff_t R, std::ptrdiff_t P, std::ptrdiff_t Columns, bool Offsets>
  static void run_with(const TileArgs& t) {
    if constexpr (!Streams)
      multiply<V, As, R, P, Columns, Offsets>(t);
    else if (t.groups->format == Format::fp16)
      stream<V, As, Fp16, Offsets>(t);
    else if (t.groups->format == Format::bf16)
      stream<V, As, Bf16, Offsets>(t);
    else
      stream<V, As, float, Offsets>(t);
  }
};

template <class V, class Op>
using Stream = Tile<V, Op, true>;

}  // namespace fastlinear::dots
