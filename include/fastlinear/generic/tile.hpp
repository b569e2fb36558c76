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
// The loop over K has the loads, the multiplications and a few additions of pointers, no more: who runs on the core's
// other thread leaves half of what it can issue. What is to be fetched is seen to between stretches of K; once in a
// group, with a pointer for each row, that was 37 instructions instead of 26 (fp32/avx2/6x16) and 1.1 to 1.3 times the
// time beside a busy neighbor. It is not unrolled: that gained nothing (Zen 3).
//
// Included inside an ISA's target region.
#pragma once

#include <algorithm>
#include <type_traits>
#include <utility>

#include "fastlinear/contract/kernel.hpp"

namespace fastlinear::kernels {

// f(0), f(1), .. f(N - 1) with constants: what is an array for the reader is a register each for GCC, which takes
// arrays apart before it unrolls loops.
template <std::size_t N, class F>
[[gnu::always_inline]] inline void each_constant(F f) {
  [&]<std::size_t... I>(std::index_sequence<I...>) __attribute__((always_inline)) {
    (f(std::integral_constant<std::size_t, I>{}), ...);
  }(std::make_index_sequence<N>());
}

// Where the operands of a tile's next group are. Rows have a pointer for every three, from which addresses of x86 reach
// the other two. How the pointers follow from one another is hidden: clang would keep the multiples of lda in memory, a
// load for each, and GCC add lda row by row.
template <class Op, std::ptrdiff_t R, std::ptrdiff_t P>
struct Place {
  using Row = typename Op::Row;
  using Weight = typename Op::Weight;
  static constexpr std::ptrdiff_t nr = Op::layout.nr, kr = Op::layout.kr, reach = 3;
  static constexpr std::size_t pointers = (R + reach - 1) / reach;

  [[gnu::always_inline]] explicit Place(const TileArgs& t) : lda(t.lda) {
    each_constant<pointers>([&](auto i) __attribute__((always_inline)) {
      rows[i] = static_cast<const Row*>(t.a) + std::ptrdiff_t{i} * reach * lda;
    });
    each_constant<P>([&](auto i) __attribute__((always_inline)) {
      panels[i] =
          reinterpret_cast<const Weight*>(static_cast<const char*>(t.panel) + std::ptrdiff_t{i} * t.panel_stride);
    });
  }
  [[gnu::always_inline]] void move() {
    each_constant<pointers>([&](auto i) __attribute__((always_inline)) {
      rows[i] += kr;
      asm("" : "+r"(rows[i]));
    });
    each_constant<P>([&](auto i) __attribute__((always_inline)) { panels[i] += nr * kr; });
  }
  [[gnu::always_inline]] const Row* row(std::ptrdiff_t r) const { return rows[r / reach] + r % reach * lda; }
  [[gnu::always_inline]] const Weight* weights(std::ptrdiff_t v) const {
    constexpr std::ptrdiff_t per_panel = nr / Op::lanes;
    return panels[v / per_panel] + v % per_panel * Op::lanes * kr;
  }

  const Row* rows[pointers];
  const Weight* panels[static_cast<std::size_t>(P)];
  std::ptrdiff_t lda;
};

// Step s of the group at hand; `last` where K ends within it. w or x is loaded one register at a time, whichever leaves
// the tile its registers.
template <class Op, std::ptrdiff_t R, std::ptrdiff_t P, std::ptrdiff_t V>
[[gnu::always_inline]] inline void step(typename Op::Vector (&c)[R][V], const Place<Op, R, P>& at, std::ptrdiff_t s,
                                        bool last) {
  using Vector = typename Op::Vector;
  using Weight = typename Op::Weight;
  const auto row = [&](std::ptrdiff_t r) __attribute__((always_inline)) {
    const auto* const a = at.row(r) + s;
    return last ? Op::last_row(a) : Op::row(a);
  };
  if constexpr (R * V + V + 1 <= Op::registers) {
    Vector w[V];
#pragma GCC unroll 8
    for (std::ptrdiff_t v = 0; v < V; ++v) w[v] = Op::weights(at.weights(v), s);
#pragma GCC unroll 16
    for (std::ptrdiff_t r = 0; r < R; ++r) {
      const Vector x = row(r);
#pragma GCC unroll 8
      for (std::ptrdiff_t v = 0; v < V; ++v) c[r][v] = Op::multiply_add(x, w[v], c[r][v]);
    }
  } else {
    Vector x[R];
#pragma GCC unroll 16
    for (std::ptrdiff_t r = 0; r < R; ++r) x[r] = row(r);
#pragma GCC unroll 8
    for (std::ptrdiff_t v = 0; v < V; ++v) {
      const Vector w = Op::weights(at.weights(v), s);
#pragma GCC unroll 16
      for (std::ptrdiff_t r = 0; r < R; ++r) {
        c[r][v] = Op::multiply_add(x[r], w, c[r][v]);
        // Not before this: clang would widen the next weights early, and keep a sum in memory to have the register.
        if constexpr (sizeof(Weight) == 2 && V > 1 && R > 1)
          if (v + 1 < V) asm("" : "+v"(c[r][v]), "+m"(*const_cast<Weight*>(at.weights(v + 1))));
      }
    }
  }
}

// What a tile fetches while its sums are made, some of it in each stretch of so many groups: the lines that it will be
// finished with, panels that come next, and rows. More than two lines of panels a group do not help.
template <std::ptrdiff_t Stretch>
class Fetches {
 public:
  [[gnu::always_inline]] Fetches(const TileArgs& t, std::ptrdiff_t groups)
      : lines_(t.lines),
        next_(t.prefetch),
        beside_(t.beside),
        next_bytes_(Stretch * t.prefetch_stride),
        beside_bytes_(Stretch * t.beside_stride),
        apart_(std::max(kLine, t.prefetch_stride / 2)) {
    while (lines_.rows > groups / Stretch) lines_.fetch_row();  // there are too few stretches for one in each
  }
  [[gnu::always_inline]] void fetch() {
    if (lines_.rows > 0) lines_.fetch_row();
    for (std::ptrdiff_t at = 0; at < next_bytes_; at += apart_) __builtin_prefetch(next_ + at, 0, 2);  // 2: into L2
    for (std::ptrdiff_t at = 0; at < beside_bytes_; at += kLine) __builtin_prefetch(beside_ + at, 0, 2);
    next_ += next_bytes_, beside_ += beside_bytes_;
  }

 private:
  static constexpr std::ptrdiff_t kLine = 64;
  Lines lines_;
  const char *next_, *beside_;
  std::ptrdiff_t next_bytes_, beside_bytes_, apart_;
};

// R of MR rows, P of Columns / nr panels. Row tiles are balanced, so one with less than half of the rows is the only
// one: it streams the panel, the hardware prefetches, and our own prefetches would only cost it bandwidth (7 % at R =
// 1, but 1 % where bytes are widened to fp32, which takes longer than reading them).
template <class Op, std::ptrdiff_t R, std::ptrdiff_t MR, std::ptrdiff_t P, std::ptrdiff_t Columns>
void multiply(const TileArgs& t) {
  constexpr std::ptrdiff_t kr = Op::layout.kr, V = P * Op::layout.nr / Op::lanes;
  constexpr bool slow = sizeof(typename Op::Weight) == 1 && std::is_same_v<typename Op::Sum, float>;
  constexpr bool prefetches = (MR > 1 || slow) && 2 * R >= MR;
  constexpr std::ptrdiff_t stretch = 16;
  auto* sums = static_cast<typename Op::Sum*>(t.tile);

  typename Op::Vector c[R][V];
#pragma GCC unroll 16
  for (std::ptrdiff_t r = 0; r < R; ++r)
#pragma GCC unroll 8
    for (std::ptrdiff_t v = 0; v < V; ++v)
      c[r][v] = t.accumulate ? Op::load(sums + r * Columns + v * Op::lanes) : Op::zero();

  Place<Op, R, P> at(t);
  const auto group = [&]() __attribute__((always_inline)) {
#pragma GCC unroll 2
    for (std::ptrdiff_t s = 0; s < Op::steps; ++s) {
      step<Op, R, P>(c, at, s, false);
      if constexpr (Op::steps > 1) asm volatile("" ::: "memory");  // load again: a pair kept is a register lost
    }
    at.move();
  };
  std::ptrdiff_t left = t.k / kr;
  [[maybe_unused]] Fetches<stretch> fetches(t, left);
  if constexpr (!prefetches) t.lines.fetch();
  while (left > 0) {
    if constexpr (prefetches) fetches.fetch();
    do group();
    while ((--left & (stretch - 1)) != 0);
  }
  if (kr > 1 && t.k % kr > 0) step<Op, R, P>(c, at, 0, true);

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
