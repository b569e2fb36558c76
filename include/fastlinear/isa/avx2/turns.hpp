// Codes of 4 bits by many rows of int8 on AVX2, as words.hpp multiplies a few: of 32 k a panel's codes become bytes, 1
// KB, and its scales fp32, once for all rows of a tile, which then take turns by four.
//
//   tile   sums  weights  row, product  of 16  vector operations for 64 x rows products
//   4x16   8     2        2             12     4 x rows, and 1.25 x rows that take sums of 32 k to the tile
//
// Zen 3 does 3.2 of them a cycle where two multiplications and two additions take turns, 3 where one and one do. A
// group of 32 k is finished where its sums are: the next four rows are enough to go on with.
#pragma once

#include <algorithm>

#include "fastlinear/formats/int4.hpp"
#include "fastlinear/generic/dots.hpp"
#include "fastlinear/isa/avx2/vec.hpp"
#include "fastlinear/isa/avx2/words.hpp"

namespace fastlinear::avx2::turns {

using words::kExact, words::kr, words::nr, words::kStep, words::Two;
inline constexpr std::ptrdiff_t kMost = 64;            // rows of a tile
inline constexpr std::ptrdiff_t kFour = nr * 4;        // bytes of four k
inline constexpr std::ptrdiff_t kStarts = F32::width;  // groups whose starts are made together

// What all rows meet: up to 32 k of a panel, four k of each channel side by side, and what their group is scaled with.
struct Piece {
  alignas(32) char weights[kExact * nr];
  alignas(32) float scales[nr], offsets[nr];
  std::ptrdiff_t k, group;
  bool first, last;  // of the group
};

// What there is once for each row of a tile.
struct OfRows {
  std::int32_t starts[kMost][kStarts];  // what sums begin with, of some groups
  std::int32_t sums[kMost][nr];         // of the pieces of a group, if it has several
};

// The products of four k and a row, or c and those. Two products, then two additions; as text, since GCC 12 fetches
// rows ahead, and spills sums.
[[gnu::always_inline]] inline Two products(const Two& w, const std::int8_t* a) {
  Two c;
  __m256i x;
  asm("vpbroadcastd %5, %2\n\tvpmaddubsw %2, %3, %0\n\tvpmaddubsw %2, %4, %1"
      : "=&x"(c.first), "=x"(c.second), "=&x"(x)
      : "x"(w.first), "x"(w.second), "m"(*reinterpret_cast<const char (*)[4]>(a)));
  return c;
}
[[gnu::always_inline]] inline Two add(Two c, const Two& w, const std::int8_t* a) {
  __m256i x, y;
  asm("vpbroadcastd %6, %2\n\tvpmaddubsw %2, %4, %3\n\tvpmaddubsw %2, %5, %2\n\t"
      "vpaddw %3, %0, %0\n\tvpaddw %2, %1, %1"
      : "+&x"(c.first), "+&x"(c.second), "=&x"(x), "=&x"(y)
      : "x"(w.first), "x"(w.second), "m"(*reinterpret_cast<const char (*)[4]>(a)));
  return c;
}

[[gnu::always_inline]] inline Two load(const char* weights) {
  return {I32::load(weights).v, I32::load(weights + F32::width * 4).v};
}

// R rows, from `row` on, by a piece of Steps times eight k. Whole: it is all of its group.
template <std::ptrdiff_t R, std::ptrdiff_t Steps, bool Whole, bool Offsets>
[[gnu::always_inline]] inline void multiply(const TileArgs& t, const Piece& piece, OfRows& of, std::ptrdiff_t row) {
  const std::int8_t* rows[R];
#pragma GCC unroll 4
  for (std::ptrdiff_t r = 0; r < R; ++r) rows[r] = static_cast<const std::int8_t*>(t.a) + piece.k + (row + r) * t.lda;
  // Bytes from the integers of a row to its numbers of the group.
  const auto away = [&](const float* first) {
    return reinterpret_cast<const std::int8_t*>(first + piece.group) - static_cast<const std::int8_t*>(t.a) - piece.k;
  };
  const std::ptrdiff_t scale = away(t.row_groups.scales), total = away(t.row_groups.totals);
  const std::int32_t* const starts = &of.starts[row][piece.group % kStarts];
  std::int32_t* kept = of.sums[row];
  float* tile = static_cast<float*>(t.tile) + row * nr;
  const bool first = Whole || piece.first, last = Whole || piece.last;
#pragma GCC unroll 1
  for (std::ptrdiff_t channel = 0; channel < nr; channel += 2 * F32::width) {
#pragma GCC unroll 4
    for (std::ptrdiff_t r = 0; r < R; ++r)
      asm("" : "+r"(rows[r]));  // a register each: GCC 12 would keep the sums of all addresses in memory
    const char* const weights = piece.weights + channel * 4;
    Two c[R];
#pragma GCC unroll 8
    for (std::ptrdiff_t four = 0; four < 2 * Steps; ++four) {
      const Two w = load(weights + four * kFour);
#pragma GCC unroll 4
      for (std::ptrdiff_t r = 0; r < R; ++r) c[r] = four == 0 ? products(w, rows[r]) : add(c[r], w, rows[r] + four * 4);
    }
#pragma GCC unroll 4
    for (std::ptrdiff_t r = 0; r < R; ++r) {
      const auto number = [&](std::ptrdiff_t away) {
        return F32::set(*reinterpret_cast<const float*>(rows[r] + away));
      };
      const F32 of_row = number(scale), total_of_row = Offsets ? number(total) : of_row;
      const I32 start = I32::set(starts[r * kStarts]);
      const auto leave = [&](std::ptrdiff_t v, __m256i words) {
        const std::ptrdiff_t to = r * nr + v * F32::width, n = channel + v * F32::width;
        I32 sum{_mm256_madd_epi16(words, _mm256_set1_epi16(1))};
        sum = sum + (first ? start : I32::load(kept + to));
        if (!last) return store(reinterpret_cast<char*>(kept + to), sum.v);
        const F32 product = rounded(to_float(sum) * F32::load(piece.scales + n));
        F32 y = fused(product, of_row, F32::load(tile + to));
        if constexpr (Offsets) y = fused(total_of_row, F32::load(piece.offsets + n), y);
        F32::store(tile + to, y);
      };
      leave(0, c[r].first);
      leave(1, c[r].second);
    }
    kept += 2 * F32::width, tile += 2 * F32::width;
  }
}

// All rows by a piece, whose codes begin at `codes`.
template <std::ptrdiff_t Steps, bool Whole, bool Offsets>
[[gnu::noinline]] void multiply(const TileArgs& t, Piece& piece, OfRows& of, const char* codes) {
  for (std::ptrdiff_t step = 0; step < Steps; ++step)
#pragma GCC unroll 4
    for (std::ptrdiff_t at = 0; at < kStep; at += F32::width * 4) {
      const Nibbles bytes = halves(codes + step * kStep + at);
      char* const to = piece.weights + 2 * step * kFour + at;
      store(to, bytes.low);
      store(to + kFour, bytes.high);
    }
  std::ptrdiff_t row = 0;
  for (; row + 4 <= t.rows; row += 4) multiply<4, Steps, Whole, Offsets>(t, piece, of, row);
  if (t.rows - row == 3) multiply<3, Steps, Whole, Offsets>(t, piece, of, row);
  if (t.rows - row == 2) multiply<2, Steps, Whole, Offsets>(t, piece, of, row);
  if (t.rows - row == 1) multiply<1, Steps, Whole, Offsets>(t, piece, of, row);
}

// What the sums of some groups begin with: codes lie -first of the table higher than its numbers.
inline void start(OfRows& of, const TileArgs& t, std::ptrdiff_t group, std::ptrdiff_t count) {
  const I32 above = I32::set(-t.groups->integers[0]);
  const __m256i lane = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
  const __m256i those = _mm256_cmpgt_epi32(_mm256_set1_epi32(static_cast<int>(count)), lane);
  for (std::ptrdiff_t r = 0; r < t.rows; ++r) {
    const __m256i biased = _mm256_maskload_epi32(&dots::of_row(t.row_groups.starts, t.lda, r, group), those);
    store(reinterpret_cast<char*>(of.starts[r]), (I32{_mm256_srai_epi32(biased, 7)} * above).v);
  }
}

template <bool Offsets>
void multiply(const TileArgs& t) {
  const ScaledGroups how = *t.groups;
  const std::ptrdiff_t next = nr * (how.format == Format::fp32 ? 4 : 2), groups = ceil_div(t.k, how.size);
  const bool streams = t.prefetch_stride == 0;  // the only tile of its panels; others bring some of the next ones
  const auto* codes = static_cast<const char*>(t.panel);
  const char* prefetch = streams ? codes + kStreamAhead : t.prefetch;
  const std::ptrdiff_t prefetch_step = streams ? kStep : t.prefetch_stride;
  Piece piece;
  OfRows of;

  t.lines.fetch();
  if (!t.accumulate) std::fill_n(static_cast<float*>(t.tile), t.rows * nr, 0.0f);
  const auto widen = [&](float* to, const char* from) {
    __builtin_prefetch(from + kStreamGroupsAhead * next);
    for (std::ptrdiff_t n = 0; n < nr; n += F32::width) F32::store(to + n, load_scales<F32>(how.format, from, n));
  };
  for (std::ptrdiff_t group = 0; group < groups; ++group) {
    if (group % kStarts == 0) start(of, t, group, std::min(kStarts, groups - group));
    widen(piece.scales, how.scales + group * next);
    if constexpr (Offsets) widen(piece.offsets, how.offsets + group * next);
    const std::ptrdiff_t begin = group * how.size, end = std::min(t.k, begin + how.size);
    piece.group = group;
    for (piece.k = begin; piece.k < end;) {
      const std::ptrdiff_t left = end - piece.k, steps = left >= kExact ? kExact / kr : left == 2 * kr ? 2 : 1;
      piece.first = piece.k == begin, piece.last = left <= steps * kr;
      for (std::ptrdiff_t step = 0; step < steps; ++step, prefetch += prefetch_step) {
        __builtin_prefetch(prefetch, 0, 2);
        __builtin_prefetch(prefetch + 64, 0, 2);
      }
      if (steps == 4)
        piece.first&& piece.last ? multiply<4, true, Offsets>(t, piece, of, codes)
                                 : multiply<4, false, Offsets>(t, piece, of, codes);
      else
        steps == 2 ? multiply<2, false, Offsets>(t, piece, of, codes)
                   : multiply<1, false, Offsets>(t, piece, of, codes);
      piece.k += steps * kr, codes += steps * kStep;
    }
  }
}

// Rows of any other table are multiplied as Other's, of four rows.
template <class Other>
void run_as(TileArgs t) {
  constexpr std::ptrdiff_t kRows = 4;
  const std::ptrdiff_t rows = t.rows, ahead = ceil_div(t.k, kr);
  t.prefetch_stride /= ceil_div(rows, kRows);
  for (std::ptrdiff_t row = 0; row < rows; row += kRows) {
    t.rows = std::min(kRows, rows - row);
    kernels::run<Other, kRows, 1>(t);
    t.a = static_cast<const std::int8_t*>(t.a) + kRows * t.lda;
    t.row_groups = t.row_groups.at(t.lda, kRows, 0);
    t.tile = static_cast<float*>(t.tile) + kRows * nr;
    t.prefetch += ahead * t.prefetch_stride;
    t.lines = {};
  }
}

template <class Other>
void run(const TileArgs& t) {
  if (!dots::is_even(t.groups->integers)) return run_as<Other>(t);
  t.groups->offsets == nullptr ? multiply<false>(t) : multiply<true>(t);
}

// A row of the table.
template <class Other>
constexpr Kernel row(const char* name, const Isa& isa) {
  return {name, isa, Other::rows, Other::layout, kMost, 1, run<Other>, Other::accumulate, 1, Other::k_step};
}

}  // namespace fastlinear::avx2::turns
