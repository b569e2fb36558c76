// Weights in groups as integers, by tdpbssd: rows and weights are int8, and a product adds 64 k, or those of a shorter
// group, to the int32 sums of 16 rows and 16 columns. Codes of 4 bits become bytes before, once for all row tiles.
//
//   tile     sums     A      B          a group of 128
//   32x32    4        2      2  (8)     8 loads, 8 products, 4 stores; 64 vectors are scaled and added
//
// The sums of a group leave the tiles for L1, from where vectors scale them and add them to those of y, as
// generic/dots.hpp does, to the bit. A few rows of the group before are scaled after each product and each store, so
// that tiles and vectors work at once; the places of the two groups change. A row is 6 operations, 6 loads and, with
// those of the tiles, 4 stores: for a group of 128 as long as its products take, for one of 32 twice as long.
//
// Included inside the ISA's target region.
#pragma once

#include <algorithm>

#include "fastlinear/formats/int8.hpp"
#include "fastlinear/formats/scales.hpp"
#include "fastlinear/isa/amx/tiles.hpp"
#include "fastlinear/isa/avx512/vec.hpp"

namespace fastlinear::amx {

struct GroupProducts {
  static constexpr Format rows = Format::int8, accumulate = Format::fp32;
  static constexpr Layout layout = Int8InGroups::layout;
  static constexpr std::ptrdiff_t row_bytes = 1;  // of an element

  template <int C, int A, int B>
  [[gnu::always_inline]] static void multiply_add() {
    asm volatile("tdpbssd %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(C), "i"(A), "i"(B));
  }
};

// The sums of one group as they are scaled and added to y, row by row.
template <bool Offsets>
class Scaling {
 public:
  Scaling() : left_(0) {}
  [[gnu::always_inline]] Scaling(const TileArgs& t, const std::int32_t* sums, std::ptrdiff_t group)
      : left_(t.rows), y_(static_cast<float*>(t.tile)), sums_(sums), scale_of_row_(t.row_groups.scales + group) {
    const ScaledGroups& how = *t.groups;
    const std::ptrdiff_t at = group * nr * (how.format == Format::fp32 ? 4 : 2);
#pragma GCC unroll 2
    for (std::ptrdiff_t v = 0; v < vectors; ++v) {
      scales_[v] = load_scales<V>(how.format, how.scales + at, v * V::width);
      if constexpr (Offsets) offsets_[v] = load_scales<V>(how.format, how.offsets + at, v * V::width);
    }
  }

  [[gnu::always_inline]] void rows(const TileArgs& t, std::ptrdiff_t count) {
    count = std::min(count, left_);
    left_ -= count;
    for (; count > 0; --count) {
      const V x = V::set(*scale_of_row_);
#pragma GCC unroll 2
      for (std::ptrdiff_t v = 0; v < vectors; ++v) {
        const avx512::I32 sum{_mm512_load_si512(sums_ + v * V::width)};
        V y = fused(rounded(to_float(sum) * scales_[v]), x, V::load(y_ + v * V::width));
        if constexpr (Offsets)
          y = fused(V::set(scale_of_row_[t.row_groups.totals - t.row_groups.scales]), offsets_[v], y);
        V::store(y_ + v * V::width, y);
      }
      y_ += nr, sums_ += nr, scale_of_row_ += t.lda / 4;
    }
  }

 private:
  using V = avx512::F32;
  static constexpr std::ptrdiff_t nr = GroupProducts::layout.nr, vectors = nr / V::width;
  std::ptrdiff_t left_;
  float* y_;
  const std::int32_t* sums_;
  const float* scale_of_row_;
  V scales_[vectors], offsets_[vectors];
};

// Tiles of rows as long as a step, and of weights with as many rows; those of the sums are full.
template <class Tiles>
void configure(std::ptrdiff_t step) {
  Config config = kFull;
  std::fill(config.row_bytes + Tiles::a, config.row_bytes + Tiles::b, static_cast<std::uint16_t>(step));
  std::fill_n(config.rows + Tiles::b, Tiles::b_tiles, static_cast<std::uint8_t>(step / GroupProducts::layout.kr));
  asm volatile("ldtilecfg %0" ::"m"(config) : "memory");
}

// Sums of R x 2 tiles, of a panel. With groups shorter than what a tile takes, the session's tiles are cut for the time
// of a call.
template <int R, bool Offsets>
void multiply_groups(const TileArgs& t) {
  constexpr std::ptrdiff_t nr = GroupProducts::layout.nr, kr = GroupProducts::layout.kr, stride = nr * 4;
  using Tiles = Block<GroupProducts, R, 2>;
  const std::ptrdiff_t size = t.groups->size, step = std::min(size, kBytes);
  alignas(64) float places[2][R * kRows * nr];

  if (step < kBytes) configure<Tiles>(step);
  t.lines.fetch();
  if (!t.accumulate) std::fill_n(static_cast<float*>(t.tile), t.rows * nr, 0.0f);
  const char *rows = static_cast<const char*>(t.a), *panel = static_cast<const char*>(t.panel);
  const char* prefetch = t.prefetch;
  const std::ptrdiff_t at_once = ceil_div(t.rows, 2 * R * (ceil_div(size, step) + 1));
  const std::ptrdiff_t ahead = step / kr * t.prefetch_stride;
  Scaling<Offsets> before;
  std::ptrdiff_t group = 0;
  for (std::ptrdiff_t k = 0; k < t.k; ++group) {
    const std::ptrdiff_t end = std::min(t.k, k + size);
    Tiles::zero_all(Tiles::sums);
    const auto scale = [&] { before.rows(t, at_once); };
    for (; k < end; k += step) {
      const char* b = panel;
      alignas(64) char last[kGroups * kGroupBytes];
      if (end - k < step) {
        const auto bytes = static_cast<std::size_t>(ceil_div(end - k, kr) * kGroupBytes);
        std::memcpy(last, panel, bytes);
        std::memset(last + bytes, 0, sizeof last - bytes);
        b = last;
      }
      Tiles::products(rows, t.lda, &b, scale, Tiles::sums);
      rows += step, panel += step / kr * kGroupBytes;
      for (std::ptrdiff_t line = 0; line < ahead; line += kBytes) _mm_prefetch(prefetch + line, _MM_HINT_T1);
      prefetch += ahead;
    }
    Tiles::store_all(places[group % 2], stride, scale, Tiles::sums);
    before.rows(t, t.rows);
    before = Scaling<Offsets>(t, reinterpret_cast<const std::int32_t*>(places[group % 2]), group);
  }
  before.rows(t, t.rows);
  if (step < kBytes) configure<Tiles>(kBytes);
}

inline void run_groups(const TileArgs& t) {
  const bool offsets = t.groups->offsets != nullptr;
  if (t.rows > kRows)
    offsets ? multiply_groups<2, true>(t) : multiply_groups<2, false>(t);
  else
    offsets ? multiply_groups<1, true>(t) : multiply_groups<1, false>(t);
}

inline constexpr Kernel kDotKernels[] = {
    {.name = "int8g/amx/32x32",
     .isa = kIsa,
     .rows = GroupProducts::rows,
     .layout = GroupProducts::layout,
     .mr = 32,
     .panels = 1,
     .run = run_groups,
     .accumulate = GroupProducts::accumulate,
     .row_step = kRows,
     .k_step = kBytes,
     .session = &kSession},
};

}  // namespace fastlinear::amx
