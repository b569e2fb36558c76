// Codes of 4 bits by several rows of int8 on AVX2, where the numbers of the table follow one another: codes are weights
// then, a constant too high, and products and their sums are int16.
//
// Two products are at most 2 * 15 * 127, so vpmaddubsw never saturates, and sums of the eight that 32 k bring a lane,
// at most 30480, are exact in int16, too. Only then do they go on in int32, by one vpmaddwd, which dots.hpp takes for
// each eight k.
//
//   tile   sums  weights  row, product  of 16  vector operations for 64 x rows products
//   4x16   8     4        2             14     3 + 4 x 4
#pragma once

#include "fastlinear/formats/int4.hpp"
#include "fastlinear/generic/dots.hpp"
#include "fastlinear/isa/avx2/vec.hpp"

namespace fastlinear::avx2::words {

inline constexpr std::ptrdiff_t kExact = 32;  // k whose sums are
inline constexpr std::ptrdiff_t kr = Int4::kr, nr = Int4::nr, kStep = nr * 4, kVectors = nr / F32::width;

// Of 16 channels, eight each.
struct Two {
  __m256i first, second;
};

// c and the products of eight k and a row. As text, since GCC 12 fetches the row ahead, and spills sums.
[[gnu::always_inline]] inline Two add(Two c, const Two& low, const Two& high, const std::int8_t* a) {
  __m256i x, y;
  asm("vpbroadcastd %8, %2\n\tvpmaddubsw %2, %4, %3\n\tvpmaddubsw %2, %5, %2\n\t"
      "vpaddw %3, %0, %0\n\tvpaddw %2, %1, %1\n\t"
      "vpbroadcastd %9, %2\n\tvpmaddubsw %2, %6, %3\n\tvpmaddubsw %2, %7, %2\n\t"
      "vpaddw %3, %0, %0\n\tvpaddw %2, %1, %1"
      : "+&x"(c.first), "+&x"(c.second), "=&x"(x), "=&x"(y)
      : "x"(low.first), "x"(low.second), "x"(high.first), "x"(high.second),
        "m"(*reinterpret_cast<const char (*)[4]>(a)), "m"(*reinterpret_cast<const char (*)[4]>(a + 4)));
  return c;
}

// From where on the codes, the rows and what is to be prefetched are.
struct Place {
  const char* codes;
  const std::int8_t* a;
  const char* prefetch;
  std::ptrdiff_t lda, prefetch_step;

  [[gnu::always_inline]] void skip(std::ptrdiff_t steps) {
    codes += steps * kStep;
    a += steps * kr;
    prefetch += steps * prefetch_step;
  }
};

// Sums of 16 channels and Steps times eight k, on top of those at `sums`, [R][nr] of int32, or the first of them.
template <std::ptrdiff_t R, std::ptrdiff_t Steps>
[[gnu::always_inline]] inline void add(std::int32_t* sums, bool first, const Place& at) {
  static_assert(Steps * kr <= kExact);
  Two c[R];
#pragma GCC unroll 4
  for (std::ptrdiff_t r = 0; r < R; ++r) c[r] = {_mm256_setzero_si256(), _mm256_setzero_si256()};
#pragma GCC unroll 4
  for (std::ptrdiff_t i = 0; i < Steps; ++i) {
    __builtin_prefetch(at.prefetch + i * at.prefetch_step);
    const Nibbles one = halves(at.codes + i * kStep), other = halves(at.codes + i * kStep + kStep / kVectors);
#pragma GCC unroll 4
    for (std::ptrdiff_t r = 0; r < R; ++r)
      c[r] = add(c[r], {one.low, other.low}, {one.high, other.high}, at.a + r * at.lda + i * kr);
  }
#pragma GCC unroll 4
  for (std::ptrdiff_t r = 0; r < R; ++r) {
    const auto leave = [first](std::int32_t* to, __m256i words) {
      I32 sum{_mm256_madd_epi16(words, _mm256_set1_epi16(1))};
      if (!first) sum = sum + I32::load(to);
      store(reinterpret_cast<char*>(to), sum.v);
    };
    leave(sums + r * nr, c[r].first);
    leave(sums + r * nr + F32::width, c[r].second);
  }
}

// R rows of a panel.
//
// What a group adds to the tile waits some 30 cycles for its sums, and the core has registers for less than half of the
// next products meanwhile. So sums are left in L1, and taken up after those of the next group.
template <std::ptrdiff_t R, bool Offsets>
void multiply(const TileArgs& t) {
  const ScaledGroups how = *t.groups;
  const RowGroups x = t.row_groups;
  const std::ptrdiff_t lda = t.lda, next = nr * (how.format == Format::fp32 ? 4 : 2);
  const I32 above = I32::set(-how.integers[0]);
  auto* const tile = static_cast<float*>(t.tile);
  alignas(32) std::int32_t sums[2][R * nr];

  t.lines.fetch();
  if (!t.accumulate) std::fill_n(tile, R * nr, 0.0f);
  const auto finish = [&](std::ptrdiff_t group) {
    F32 scale[kVectors], offset[kVectors];
    const auto widen = [&](F32(&to)[kVectors], const char* from) {
      __builtin_prefetch(from + kStreamGroupsAhead * next);
#pragma GCC unroll 4
      for (std::ptrdiff_t v = 0; v < kVectors; ++v) to[v] = load_scales<F32>(how.format, from, v * F32::width);
    };
    widen(scale, how.scales + group * next);
    if constexpr (Offsets) widen(offset, how.offsets + group * next);
#pragma GCC unroll 4
    for (std::ptrdiff_t r = 0; r < R; ++r) {
      const I32 start = I32{_mm256_srai_epi32(I32::set(dots::of_row(x.starts, lda, r, group)).v, 7)} * above;
      const F32 of_row = F32::set(dots::of_row(x.scales, lda, r, group));
#pragma GCC unroll 4
      for (std::ptrdiff_t v = 0; v < kVectors; ++v) {
        const std::ptrdiff_t at = r * nr + v * F32::width;
        const I32 whole = I32::load(sums[group % 2] + at) + start;
        F32 sum = fused(rounded(to_float(whole) * scale[v]), of_row, F32::load(tile + at));
        if constexpr (Offsets) sum = fused(F32::set(dots::of_row(x.totals, lda, r, group)), offset[v], sum);
        F32::store(tile + at, sum);
      }
    }
  };

  const bool streams = t.prefetch_stride == 0;  // the only tile of its panels; others bring some of the next ones
  const auto* const panel = static_cast<const char*>(t.panel);
  Place place{panel, static_cast<const std::int8_t*>(t.a), streams ? panel + kStreamAhead : t.prefetch, lda,
              streams ? kStep : t.prefetch_stride};
  std::ptrdiff_t group = 0;
  for (std::ptrdiff_t k = 0; k < t.k; k += how.size, ++group) {
    const std::ptrdiff_t size = std::min(t.k - k, how.size);
    for (std::ptrdiff_t channel = 0; channel < nr; channel += 2 * F32::width) {
      Place here = place;
      here.codes += channel * 4;
      here.prefetch += channel * 4;
      std::int32_t* const to = sums[group % 2] + channel;
      std::ptrdiff_t left = size;
      for (; left >= kExact; left -= kExact, here.skip(kExact / kr)) add<R, kExact / kr>(to, left == size, here);
      for (; left > 0; left -= kr, here.skip(1)) add<R, 1>(to, left == size, here);
    }
    place.skip(how.size / kr);
    if (group > 0) finish(group - 1);
  }
  if (group > 0) finish(group - 1);
}

// What kernels::row makes a kernel of. A single row, and rows of any other table, by twos, are multiplied as Other's.
template <class Other>
struct Tile : Other {
  template <std::ptrdiff_t R, std::ptrdiff_t MR, std::ptrdiff_t P, std::ptrdiff_t Columns>
  static void run(const TileArgs& t) {
    static_assert(P == 1);
    if constexpr (R > 1)
      if (dots::is_even(t.groups->integers))
        return t.groups->offsets == nullptr ? multiply<R, false>(t) : multiply<R, true>(t);
    by_twos<R, MR, P, Columns>(t);
  }

 private:
  template <std::ptrdiff_t R, std::ptrdiff_t MR, std::ptrdiff_t P, std::ptrdiff_t Columns>
  static void by_twos(TileArgs t) {
    Other::template run < R<2 ? R : 2, MR, P, Columns>(t);
    if constexpr (R > 2) {
      t.a = static_cast<const std::int8_t*>(t.a) + 2 * t.lda;
      t.row_groups = t.row_groups.at(t.lda, 2, 0);
      t.tile = static_cast<float*>(t.tile) + 2 * Columns;
      t.lines = {};
      by_twos<R - 2, MR, P, Columns>(t);
    }
  }
};

}  // namespace fastlinear::avx2::words
