// Weights that are scaled in groups of K, written once over a vector type V: a micro-kernel for floating rows, which
// looks codes up in its inner loop, and the conversion of a panel for kernels of other formats.
//
// Codes, for each ISA one struct a format (isa/<isa>/codes.hpp), is what codes mean, a table in registers for int4:
//   layout, bytes       of the panels; what kr k of a channel take
//   vectors             of V::width channels that a load is of
//   unit                what values are to be multiplied by, a power of two
//   Lanes load(p)       the codes of vectors * V::width channels, kr consecutive k
//   V value(lanes, i)   what those of the i-th k stand for, over the unit; from kr on, of the second vector
//   multiply_add(x, w, c), add(x, c)   c + *x * w and c + *x, in place
//   Integers(how)       of int4, what codes mean as integers: unpack(p, low, high) makes of the codes of V::width
//                       channels those of the first and of the last four k, as bytes
//
// Sums of a group are made in registers, multiplied by its scale and added to the tile, in L1: for a group of 32 k that
// is a load, an FMA and a store for 32 FMAs. An offset wants the sum of x over the group, which is one addition a row
// and k, for all channels of the tile.
//
// Included inside an ISA's target region.
#pragma once

#include <algorithm>
#include <type_traits>

#include "fastlinear/contract/kernel.hpp"
#include "fastlinear/formats/fp8.hpp"
#include "fastlinear/formats/int4.hpp"
#include "fastlinear/formats/int8.hpp"
#include "fastlinear/formats/scales.hpp"
#include "fastlinear/generic/ahead.hpp"

namespace fastlinear::groups {

template <class V, class Codes>
[[gnu::always_inline]] inline V in_units(V x) {
  if constexpr (Codes::unit == 1.0f)
    return x;
  else
    return x * V::set(Codes::unit);
}

// Adds kr k, whose codes begin at `panels`, to the sums c of R rows; Summing: and x itself to `totals`, in every lane.
template <class V, class Codes, bool Summing, std::ptrdiff_t R, std::ptrdiff_t Count, std::ptrdiff_t P>
[[gnu::always_inline]] inline void add(decltype(V::v) (&c)[R][Count], decltype(V::v) (&totals)[R], const Codes table,
                                       const char* const (&panels)[P], const float* a, std::ptrdiff_t lda) {
  constexpr std::ptrdiff_t per_panel = Count / P;
#pragma GCC unroll 8
  for (std::ptrdiff_t first = 0; first < Count; first += Codes::vectors) {
    const auto lanes = table.load(panels[first / per_panel] + first % per_panel * V::width * Codes::bytes);
#pragma GCC unroll 8
    for (std::ptrdiff_t i = 0; i < Codes::vectors * Codes::layout.kr; ++i) {
      const std::ptrdiff_t v = first + i / Codes::layout.kr, k = i % Codes::layout.kr;
      const auto w = table.value(lanes, i).v;
#pragma GCC unroll 8
      for (std::ptrdiff_t r = 0; r < R; ++r) c[r][v] = Codes::multiply_add(a + r * lda + k, w, c[r][v]);
    }
  }
  if constexpr (Summing) {
#pragma GCC unroll 8
    for (std::ptrdiff_t r = 0; r < R; ++r)
#pragma GCC unroll 8
      for (std::ptrdiff_t i = 0; i < Codes::layout.kr; ++i) totals[r] = Codes::add(a + r * lda + i, totals[r]);
  }
}

// R rows of P panels; Columns: of a full tile.
template <class V, class Codes, std::ptrdiff_t R, std::ptrdiff_t P, std::ptrdiff_t Columns, bool Summing>
void multiply(const TileArgs& t) {
  using Vector = decltype(V::v);
  constexpr std::ptrdiff_t nr = Codes::layout.nr, kr = Codes::layout.kr, per_panel = nr / V::width,
                           Count = P * per_panel, bytes = nr * Codes::bytes;
  const ScaledGroups g = *t.groups;
  const Codes table(g.table);
  const auto* a = static_cast<const float*>(t.a);
  auto* const sums = static_cast<float*>(t.tile);
  const char* panels[P];
#pragma GCC unroll 8
  for (std::ptrdiff_t p = 0; p < P; ++p) panels[p] = static_cast<const char*>(t.panel) + p * t.panel_stride;

  t.lines.fetch();
  if (!t.accumulate)
    for (std::ptrdiff_t r = 0; r < R; ++r) std::fill_n(sums + r * Columns, P * nr, 0.0f);
  const char *scales = g.scales, *offsets = g.offsets;
  const std::ptrdiff_t next = nr * (g.format == Format::fp32 ? 4 : 2);
  Ahead codes(codes_ahead(P), t.k / kr * bytes, P * t.panel_stride);
  Ahead groups(kGroupsAhead * next, (t.k + g.size - 1) / g.size * next, P * g.panel_stride);
  for (std::ptrdiff_t k = 0; k < t.k;) {
    const std::ptrdiff_t end = std::min(t.k, k + g.size);
    if constexpr (R == 1) {
      const std::ptrdiff_t ahead = groups.step(next);
      for (std::ptrdiff_t p = 0; p < P; ++p) {
        __builtin_prefetch(scales + p * g.panel_stride + ahead, 0, 2);
        if constexpr (Summing) __builtin_prefetch(offsets + p * g.panel_stride + ahead, 0, 2);
      }
    }
    Vector c[R][Count], totals[R];
#pragma GCC unroll 8
    for (std::ptrdiff_t r = 0; r < R; ++r) {
      totals[r] = V::set(0.0f).v;
#pragma GCC unroll 8
      for (std::ptrdiff_t v = 0; v < Count; ++v) c[r][v] = V::set(0.0f).v;
    }
    for (; k + kr <= end; k += kr) {
      add<V, Codes, Summing>(c, totals, table, panels, a + k, t.lda);
      const std::ptrdiff_t ahead = R == 1 ? codes.step(bytes) : 0;
#pragma GCC unroll 8
      for (std::ptrdiff_t p = 0; p < P; ++p) {
        if constexpr (R == 1)
          for (std::ptrdiff_t line = 0; line < bytes; line += 64) __builtin_prefetch(panels[p] + ahead + line, 0, 2);
        panels[p] += bytes;
      }
    }
    if (k < end) {  // the last of K: rows end here
      float last[R][kr] = {};
      for (std::ptrdiff_t r = 0; r < R; ++r) std::copy_n(a + r * t.lda + k, end - k, last[r]);
      const float* there = last[0];
      asm("" : "+r"(there));  // one address, not an operand on the stack for each of its numbers
      add<V, Codes, Summing>(c, totals, table, panels, there, kr);
      k = end;
    }
#pragma GCC unroll 8
    for (std::ptrdiff_t v = 0; v < Count; ++v) {
      const std::ptrdiff_t panel = v / per_panel * g.panel_stride, at = v % per_panel * V::width;
      const V scale = load_scales<V>(g.format, scales + panel, at);
      V offset = V::set(0.0f);
      if constexpr (Summing) offset = load_scales<V>(g.format, offsets + panel, at);
#pragma GCC unroll 8
      for (std::ptrdiff_t r = 0; r < R; ++r) {
        float* const to = sums + r * Columns + v * V::width;
        V sum = fma(in_units<V, Codes>(V{c[r][v]}), scale, V::load(to));
        if constexpr (Summing) sum = fma(V{totals[r]}, offset, sum);
        V::store(to, sum);
      }
    }
    scales += next;
    if constexpr (Summing) offsets += next;
  }
}

// What kernels::row makes a kernel of.
template <class V, class Codes>
struct Tile {
  static constexpr Format rows = Format::fp32, accumulate = Format::fp32;
  static constexpr Layout layout = Codes::layout;
  static constexpr std::ptrdiff_t k_step = 1;
  template <std::ptrdiff_t R, std::ptrdiff_t MR, std::ptrdiff_t P, std::ptrdiff_t Columns>
  static void run(const TileArgs& t) {
    if (t.groups->offsets == nullptr)
      multiply<V, Codes, R, P, Columns, false>(t);
    else
      multiply<V, Codes, R, P, Columns, true>(t);
  }
};

// Calls visit(k, j, w) for the weights w of each k and each V::width channels from args.first on, j being counted from
// there: scale * table[code] + offset, each rounded.
template <class V, class Codes, class Visit>
[[gnu::always_inline]] inline void for_each_weight(const ConvertArgs& args, const Visit& visit) {
  const ScaledGroups& g = *args.groups;
  const Codes table(g.table);
  const std::ptrdiff_t nr = args.layout.nr;
  constexpr std::ptrdiff_t kr = Codes::layout.kr, vectors = Codes::vectors;
  for (std::ptrdiff_t j = 0; j < args.channels; j += vectors * V::width)
    for (std::ptrdiff_t begin = 0, group = 0; begin < args.k; begin += g.size, ++group) {
      const std::ptrdiff_t end = std::min(args.k, begin + g.size), at = group * nr + args.first + j;
      V scale[vectors], offset[vectors];
#pragma GCC unroll 2
      for (std::ptrdiff_t v = 0; v < vectors; ++v) {
        scale[v] = load_scales<V>(g.format, g.scales, at + v * V::width);
        offset[v] = g.offsets == nullptr ? V::set(0.0f) : load_scales<V>(g.format, g.offsets, at + v * V::width);
      }
      for (std::ptrdiff_t k = begin; k < end; k += kr) {
        const auto* codes = static_cast<const char*>(args.panel) + (k / kr * nr + args.first + j) * Codes::bytes;
        const typename Codes::Lanes lanes = table.load(codes);
#pragma GCC unroll 8
        for (std::ptrdiff_t i = 0; i < vectors * kr; ++i) {
          const V number = in_units<V, Codes>(table.value(lanes, i));
          if (k + i % kr < end)
            visit(k + i % kr, j + i / kr * V::width, rounded(number * scale[i / kr]) + offset[i / kr]);
        }
      }
    }
}

template <class V, class Codes>
void widen_panel(const ConvertArgs& args) {
  auto* const out = static_cast<float*>(args.out);
  for_each_weight<V, Codes>(args,
                            [&](std::ptrdiff_t k, std::ptrdiff_t j, V w) { V::store(out + k * args.channels + j, w); });
}

template <class V, class Codes>
void pair_panel(const ConvertArgs& args) {
  auto* const out = static_cast<Bf16*>(args.out);
  V even = V::set(0.0f);
  for_each_weight<V, Codes>(args, [&](std::ptrdiff_t k, std::ptrdiff_t j, V w) {
    if (k % 2 == 0) even = w;
    if (k % 2 == 1 || k + 1 == args.k)
      V::store_pairs(out + (k / 2 * args.channels + j) * 2, nearest_bf16(even),
                     k % 2 == 0 ? V::set(0.0f) : nearest_bf16(w));
  });
}

// What codes mean as integers, exactly: the panel that int8g would have.
template <class V, class Codes>
void byte_panel(const ConvertArgs& args) {
  const typename Codes::Integers integers(*args.groups);
  const std::ptrdiff_t row = args.channels * 4;  // bytes of four k
  const auto* codes = static_cast<const char*>(args.panel) + args.first * 4;
  auto* out = static_cast<char*>(args.out);
  for (std::ptrdiff_t k = 0; k < args.k; k += Codes::layout.kr, codes += args.layout.nr * 4, out += 2 * row)
    for (std::ptrdiff_t at = 0; at < row; at += V::width * 4) integers.unpack(codes + at, out + at, out + row + at);
}

// Null for the vectors of ISAs that do not multiply bf16.
template <class V, class Codes>
inline constexpr ConvertPanel pairing = [] {
  if constexpr (requires { &V::store_pairs; })
    return pair_panel<V, Codes>;
  else
    return nullptr;
}();

}  // namespace fastlinear::groups
