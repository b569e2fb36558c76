// The micro-kernel of all vector ISAs and formats: a tile of sums in registers, while K passes by.
//
//   for each group of kr k:  w[v] = panel[group][v];  for each row: x = broadcast A[row][k]; c[row][v] += x * w[v]
//
// Op, one struct for each ISA and format (isa/<isa>/<format>.hpp), says what that means in instructions:
//   Vector, lanes, registers       the accumulators, and how many registers there are
//   Sum                            what the tile holds
//   layout, Weight                 of the panels
//   rows, Row                      of A
//   steps                          in how many steps a group of layout.kr consecutive k is used up
//   zero, load, store              accumulators
//   weights(p, step)               the weights of `lanes` channels, whose groups begin at p
//   row(a), last_row(a)            what multiplies them; last_row where K ends within the group, in its first step
//   multiply_add(x, w, c)          c + x * w
//
// Included inside an ISA's target region. K is not unrolled: loop control uses ports the FMAs do not.
#pragma once

#include <type_traits>
#include <utility>

#include "fastlinear/contract/kernel.hpp"

namespace fastlinear::kernels {

// R rows of one panel's width V * lanes; w or x is loaded one register at a time, whichever leaves the tile its
// registers.
template <class Op, std::ptrdiff_t R, std::ptrdiff_t V>
[[gnu::always_inline]] inline void step(typename Op::Vector (&c)[R][V], const typename Op::Weight* const (&weights)[V],
                                        const typename Op::Row* a, std::ptrdiff_t lda, std::ptrdiff_t s, bool last) {
  using Vector = typename Op::Vector;
  const auto next_row = [&] {
    const Vector x = last ? Op::last_row(a) : Op::row(a);
    a += lda;
    asm("" : "+r"(a));  // row by row: clang would keep the multiples of lda in memory, a load for each
    return x;
  };
  if constexpr (R * V + V + 1 <= Op::registers) {
    Vector w[V];
#pragma GCC unroll 8
    for (std::ptrdiff_t v = 0; v < V; ++v) w[v] = Op::weights(weights[v], s);
#pragma GCC unroll 16
    for (std::ptrdiff_t r = 0; r < R; ++r) {
      const Vector x = next_row();
#pragma GCC unroll 8
      for (std::ptrdiff_t v = 0; v < V; ++v) c[r][v] = Op::multiply_add(x, w[v], c[r][v]);
    }
  } else {
    Vector x[R];
#pragma GCC unroll 16
    for (std::ptrdiff_t r = 0; r < R; ++r) x[r] = next_row();
#pragma GCC unroll 8
    for (std::ptrdiff_t v = 0; v < V; ++v) {
      const Vector w = Op::weights(weights[v], s);
#pragma GCC unroll 16
      for (std::ptrdiff_t r = 0; r < R; ++r) {
        c[r][v] = Op::multiply_add(x[r], w, c[r][v]);
        // Not before this: clang would widen the next weights early, and keep a sum in memory to have the register.
        if constexpr (sizeof(*weights[v]) == 2 && V > 1 && R > 1)
          if (v + 1 < V) asm("" : "+v"(c[r][v]), "+m"(*const_cast<typename Op::Weight*>(weights[v + 1])));
      }
    }
  }
}

// R of MR rows, P of Columns / nr panels. Row tiles are balanced, so one with less than half of the rows is the only
// one: it streams the panel, the hardware prefetches, and our own prefetches would only cost it bandwidth (7 % at R =
// 1, but 1 % where bytes are widened to fp32, which takes longer than reading them). More than two lines a group do not
// help (measured with one panel and with two).
template <class Op, std::ptrdiff_t R, std::ptrdiff_t MR, std::ptrdiff_t P, std::ptrdiff_t Columns>
void multiply(const TileArgs& t) {
  using Vector = typename Op::Vector;
  using Weight = typename Op::Weight;
  constexpr std::ptrdiff_t nr = Op::layout.nr, kr = Op::layout.kr, per_panel = nr / Op::lanes, V = P * per_panel;
  constexpr bool slow = sizeof(Weight) == 1 && std::is_same_v<typename Op::Sum, float>;
  constexpr bool prefetches = (MR > 1 || slow) && 2 * R >= MR;
  constexpr bool two_lines = P * nr * kr * std::ptrdiff_t{sizeof(Weight)} >= 128;
  const auto* a = static_cast<const typename Op::Row*>(t.a);
  auto* sums = static_cast<typename Op::Sum*>(t.tile);
  [[maybe_unused]] const char *prefetch = t.prefetch, *beside = t.beside;

  const Weight* panel[P];
#pragma GCC unroll 8
  for (std::ptrdiff_t p = 0; p < P; ++p)
    panel[p] = reinterpret_cast<const Weight*>(static_cast<const char*>(t.panel) + p * t.panel_stride);

  Vector c[R][V];
#pragma GCC unroll 16
  for (std::ptrdiff_t r = 0; r < R; ++r)
#pragma GCC unroll 8
    for (std::ptrdiff_t v = 0; v < V; ++v)
      c[r][v] = t.accumulate ? Op::load(sums + r * Columns + v * Op::lanes) : Op::zero();

  std::ptrdiff_t k = 0;
  [[maybe_unused]] Lines lines = t.lines;
  // Where an operand doubles them, a row now and then: so many at once take all buffers of the core, and the panel's
  // lines wait for one.
  [[maybe_unused]] const std::ptrdiff_t pause = lines.beside.bytes > 0 && t.k > 8 * lines.rows ? 8 : 1;
  [[maybe_unused]] std::ptrdiff_t next_row_at = 0;
  if constexpr (!prefetches || kr > 1) lines.fetch();
  const Weight* w[V];
  for (; k + kr <= t.k; k += kr) {
#pragma GCC unroll 8
    for (std::ptrdiff_t v = 0; v < V; ++v) w[v] = panel[v / per_panel] + k * nr + v % per_panel * Op::lanes * kr;
    if constexpr (prefetches) {
      if constexpr (kr == 1)
        if (k == next_row_at && lines.rows > 0) {
          lines.fetch_row();
          next_row_at += pause;
        }
      __builtin_prefetch(prefetch, 0, 2);  // 2: into L2
      prefetch += t.prefetch_stride;
      if constexpr (two_lines) {
        __builtin_prefetch(beside, 0, 2);
        beside += t.beside_stride;
      }
    }
#pragma GCC unroll 2
    for (std::ptrdiff_t s = 0; s < Op::steps; ++s) {
      step<Op, R, V>(c, w, a + k + s, t.lda, s, false);
      if constexpr (Op::steps > 1) asm volatile("" ::: "memory");  // load again: a pair kept is a register lost
    }
  }
  if (kr > 1 && k < t.k) {
#pragma GCC unroll 8
    for (std::ptrdiff_t v = 0; v < V; ++v) w[v] = panel[v / per_panel] + k * nr + v % per_panel * Op::lanes * kr;
    step<Op, R, V>(c, w, a + k, t.lda, 0, true);
  }

#pragma GCC unroll 16
  for (std::ptrdiff_t r = 0; r < R; ++r)
#pragma GCC unroll 8
    for (std::ptrdiff_t v = 0; v < V; ++v) Op::store(sums + r * Columns + v * Op::lanes, c[r][v]);
}

// What `row` makes a kernel of: rows, layout, accumulate, k_step, and run for R of MR rows and P panels.
template <class Op>
struct Tile {
  static constexpr Format rows = Op::rows;
  static constexpr Format accumulate = std::is_same_v<typename Op::Sum, float> ? Format::fp32 : Format::int32;
  static constexpr Layout layout = Op::layout;
  static constexpr std::ptrdiff_t k_step = accumulate == Format::int32 ? Op::layout.kr : 1;
  template <std::ptrdiff_t R, std::ptrdiff_t MR, std::ptrdiff_t P, std::ptrdiff_t Columns>
  static void run(const TileArgs& t) {
    multiply<Op, R, MR, P, Columns>(t);
  }
};

using Run = void (*)(const TileArgs&);

// One instance for each number of rows and panels, so that tails run at full speed.
template <class T, std::ptrdiff_t MR, std::ptrdiff_t P, std::size_t... I>
void run_one(const TileArgs& t, std::index_sequence<I...>) {
  static constexpr Run instances[] = {T::template run<I % MR + 1, MR, I / MR + 1, P * T::layout.nr>...};
  instances[(t.panels - 1) * MR + t.rows - 1](t);
}

template <class T, std::ptrdiff_t MR, std::ptrdiff_t P>
void run(const TileArgs& t) {
  run_one<T, MR, P>(t, std::make_index_sequence<MR * P>());
}

// A row of the table: a tile of MR rows x P panels.
template <class T, std::ptrdiff_t MR, std::ptrdiff_t P>
constexpr Kernel row(const char* name, const Isa& isa) {
  return {name, isa, T::rows, T::layout, MR, P, run<T, MR, P>, T::accumulate, 1, T::k_step};
}

}  // namespace fastlinear::kernels
