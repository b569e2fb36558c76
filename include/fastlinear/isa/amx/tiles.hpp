// The micro-kernel of AMX: sums in tiles of 16 rows x 16 columns, while K passes by in steps of 64 bytes a row.
//
//   a step of A is 16 rows x 64 bytes, as rows lie; a step of B is 16 groups of 16 columns x 4 bytes, which is how
//   panels of 32 columns lie: two tiles side by side, 128 bytes from one group to the next
//
//   tile     sums     A      B                loads for its products, a step
//   32x32    4        2      2       (8)      4 for 4
//   16x64    4        1      3       (8)      5 for 4; bound by the weights' bytes, as few rows always are
//
// A product takes the unit 16 cycles, a load the ports 8: with four of each, loads have half of the time to spare, as
// long as their lines are in L1. From L2 a step comes just as fast as it is used, and early enough by itself:
// prefetching it took more of the ports than it gave. What comes next is brought from beyond L2, each line once. Loads
// stand between products, which never wait for the one before: the four sums are apart.
//
// The lines that the tile is finished with are fetched meanwhile, a row a step: all at once they would take all buffers
// of the core, and the loads of tiles would wait behind them (a tenth to a third of the time at K = 768).
//
// All tiles keep their full shape, so that one configuration serves a whole call: rows come in sixteens (`row_step`)
// and steps of K are whole (`k_step`), filled up with zeros by the driver; the last groups of a panel are copied beside
// zeros here. A row of 16 too many costs less than a second configuration, which takes some 200 cycles and empties all
// tiles.
//
// The instructions are written as text: intrinsics of GCC 12 know nothing of the memory that a tile is loaded from, nor
// of AMX-FP16. Included inside the ISA's target region.
#pragma once

#include <cstring>
#include <utility>

#include "fastlinear/contract/arith.hpp"
#include "fastlinear/contract/kernel.hpp"

namespace fastlinear::amx {

extern const Isa kIsa;

inline constexpr std::ptrdiff_t kRows = 16, kBytes = 64;  // of a tile
inline constexpr std::ptrdiff_t kGroups = 16, kGroupBytes = 128;

template <int T>
[[gnu::always_inline]] inline void load(const void* from, std::ptrdiff_t stride) {
  asm volatile("tileloadd (%0,%1,1), %%tmm%c2" ::"r"(from), "r"(stride), "i"(T) : "memory");
}

template <int T>
[[gnu::always_inline]] inline void store(void* to, std::ptrdiff_t stride) {
  asm volatile("tilestored %%tmm%c2, (%0,%1,1)" ::"r"(to), "r"(stride), "i"(T) : "memory");
}

template <int T>
[[gnu::always_inline]] inline void zero() {
  asm volatile("tilezero %%tmm%c0" ::"i"(T));
}

// ---- the configuration: found, set, and put back
// ---------------------------------------------------------------------

struct alignas(64) Config {
  std::uint8_t palette, start_row, reserved[14];
  std::uint16_t row_bytes[16];
  std::uint8_t rows[16];
};
static_assert(sizeof(Config) == kSessionBytes);

inline constexpr Config kFull{1, 0, {}, {64, 64, 64, 64, 64, 64, 64, 64}, {16, 16, 16, 16, 16, 16, 16, 16}};

// What another library has configured on this thread, and believes in, is kept in `memory` meanwhile.
inline void enter(void* memory) {
  asm volatile("sttilecfg %0" : "=m"(*static_cast<Config*>(memory)));
  if (std::memcmp(memory, &kFull, sizeof kFull) != 0) asm volatile("ldtilecfg %0" ::"m"(kFull) : "memory");
}

// Tiles that nobody uses would cost every switch of threads 8 KB, and the core its deeper sleep.
inline void leave(const void* memory) {
  const auto& before = *static_cast<const Config*>(memory);
  if (before.palette == 0)
    asm volatile("tilerelease");
  else if (std::memcmp(&before, &kFull, sizeof kFull) != 0)
    asm volatile("ldtilecfg %0" ::"m"(before));
}

inline constexpr Session kSession{enter, leave};

// ---- the kernel
// ------------------------------------------------------------------------------------------------------

// Sums of R x C tiles: the sum of row block r and column block c is tile r * C + c; behind the sums come those of A,
// then of B in turn.
template <class Op, int R, int C>
struct Block {
  static constexpr int a = R * C, b = a + R, b_tiles = 8 - b < C ? 8 - b : C;
  static_assert(b_tiles >= 1);

  template <class Float>
  [[gnu::always_inline]] static Float* at(Float* tile, std::ptrdiff_t stride, int sum) {
    return tile + (sum / C * kRows * stride + sum % C * kBytes) / std::ptrdiff_t{sizeof(Float)};
  }

  // Column block I / R, row block I % R: B is loaded before the first row block, A before the first column block.
  template <int I>
  [[gnu::always_inline]] static void product(const char* rows, std::ptrdiff_t lda, const char* const* panels) {
    constexpr int c = I / R, r = I % R, weights = b + c % b_tiles;
    if constexpr (r == 0) load<weights>(panels[c / 2] + c % 2 * kBytes, kGroupBytes);
    if constexpr (c == 0) load<a + r>(rows + r * kRows * lda, lda);
    Op::template multiply_add<r * C + c, a + r, weights>();
  }

  static constexpr auto sums = std::make_integer_sequence<int, R * C>();

  template <int... I>
  [[gnu::always_inline]] static void zero_all(std::integer_sequence<int, I...>) {
    (zero<I>(), ...);
  }
  template <int... I>
  [[gnu::always_inline]] static void load_all(const float* tile, std::ptrdiff_t stride,
                                              std::integer_sequence<int, I...>) {
    (load<I>(at(tile, stride, I), stride), ...);
  }
  template <int... I>
  [[gnu::always_inline]] static void store_all(float* tile, std::ptrdiff_t stride, std::integer_sequence<int, I...>) {
    (store<I>(at(tile, stride, I), stride), ...);
  }
  template <int... I>
  [[gnu::always_inline]] static void products(const char* rows, std::ptrdiff_t lda, const char* const* panels,
                                              std::integer_sequence<int, I...>) {
    (product<I>(rows, lda, panels), ...);
  }
  // With something else to do after each product, and each store.
  template <class Between, int... I>
  [[gnu::always_inline]] static void products(const char* rows, std::ptrdiff_t lda, const char* const* panels,
                                              const Between& between, std::integer_sequence<int, I...>) {
    ((product<I>(rows, lda, panels), between()), ...);
  }
  template <class Between, int... I>
  [[gnu::always_inline]] static void store_all(float* tile, std::ptrdiff_t stride, const Between& between,
                                               std::integer_sequence<int, I...>) {
    ((store<I>(at(tile, stride, I), stride), between()), ...);
  }

  [[gnu::always_inline]] static void run(const TileArgs& t, std::ptrdiff_t tile_stride) {
    constexpr std::ptrdiff_t P = C / 2, element = Op::row_bytes, k_step = kBytes / element;
    auto* const tile = static_cast<float*>(t.tile);
    const std::ptrdiff_t lda = t.lda * element, steps = t.k / k_step;
    const char* rows = static_cast<const char*>(t.a);
    const char* panels[P];
    for (std::ptrdiff_t p = 0; p < P; ++p) panels[p] = static_cast<const char*>(t.panel) + p * t.panel_stride;
    const char* prefetch = t.prefetch;
    const std::ptrdiff_t ahead = kGroups * t.prefetch_stride, lines = (ahead + kBytes - 1) / kBytes;
    const std::ptrdiff_t line_stride = lines > 0 ? ahead / lines : 0;

    if (t.accumulate)
      load_all(tile, tile_stride, sums);
    else
      zero_all(sums);
    Lines lines_of_end = t.lines;
    const std::ptrdiff_t rows_a_step = steps > 0 ? ceil_div(lines_of_end.rows, steps) : 0;
    for (std::ptrdiff_t s = 0; s < steps; ++s) {
      for (std::ptrdiff_t r = 0; r < rows_a_step && lines_of_end.rows > 0; ++r) lines_of_end.fetch_row();
      products(rows, lda, panels, sums);
      rows += kBytes;
      for (std::ptrdiff_t p = 0; p < P; ++p) panels[p] += kGroups * kGroupBytes;
      if (R > 1)
        for (std::ptrdiff_t line = 0; line < lines; ++line, prefetch += line_stride)
          _mm_prefetch(prefetch, _MM_HINT_T1);
    }
    if (const std::ptrdiff_t rest = t.k % k_step; rest > 0) {
      alignas(64) char last[P][kGroups * kGroupBytes];
      const auto bytes = static_cast<std::size_t>((rest + Op::layout.kr - 1) / Op::layout.kr * kGroupBytes);
      const char* copies[P];
      for (std::ptrdiff_t p = 0; p < P; ++p) {
        std::memcpy(last[p], panels[p], bytes);
        std::memset(last[p] + bytes, 0, sizeof last[p] - bytes);
        copies[p] = last[p];
      }
      products(rows, lda, copies, sums);
    }
    store_all(tile, tile_stride, sums);
  }
};

// MR rows (16 or 32) of P panels; of fewer rows or panels only what is there.
template <class Op, std::ptrdiff_t MR, std::ptrdiff_t P>
void run(const TileArgs& t) {
  constexpr std::ptrdiff_t stride = P * Op::layout.nr * 4;
  const auto block = [&]<int R, int C>() { Block<Op, R, C>::run(t, stride); };
  const bool one_row_block = t.rows <= kRows, one_panel = t.panels == 1;
  if (MR > kRows && !one_row_block)
    block.template operator()<MR / kRows, 2>();
  else if (P > 1 && !one_panel)
    block.template operator()<1, 2 * P>();
  else
    block.template operator()<1, 2>();
}

// A row of the table.
template <class Op, std::ptrdiff_t MR, std::ptrdiff_t P>
constexpr Kernel row(const char* name, const Isa& isa) {
  return {.name = name,
          .isa = isa,
          .rows = Op::rows,
          .layout = Op::layout,
          .mr = MR,
          .panels = P,
          .run = run<Op, MR, P>,
          .accumulate = Op::accumulate,
          .row_step = kRows,
          .k_step = kBytes / Op::row_bytes,
          .session = &kSession};
}

}  // namespace fastlinear::amx
