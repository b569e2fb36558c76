// A packed weight: where its panels lie, and what stands behind them.
//
// Behind the panels of formats that have them stand arrays of four bytes a channel, for as many channels as the panels
// have: the scales, and for integer products the sums of the channels' weights and their zero points. Behind panels
// that are scaled in groups of K stand
//
//   the scales [panel] as formats/scales.hpp has them, the offsets likewise if there are any, the 16 numbers that codes
//   of 4 bits stand for, and, if the columns have an order of their own, for each the int32 number of the column of x
//   that it multiplies
//
// apart from the codes, since a kernel needs them once a group, and what is read one after another is fetched ahead.
#pragma once

#include <algorithm>
#include <array>
#include <cstddef>
#include <cstdint>
#include <numeric>

#include "fastlinear/contract/arith.hpp"
#include "fastlinear/formats/all.hpp"

namespace fastlinear {

inline std::ptrdiff_t panels_bytes(const Layout& layout, std::ptrdiff_t n, std::ptrdiff_t k) {
  return ceil_div(n, layout.nr) * panel_offset(layout, k);
}

constexpr std::ptrdiff_t channel_arrays(Format format) { return info(format).arrays; }

inline constexpr std::ptrdiff_t kTableBytes = Int4::codes * 4;

// Bytes that a panel has in each of the arrays of panels that a packed weight is, in their order, then zeros; behind
// these stands what all panels have.
inline std::array<std::ptrdiff_t, 4> arrays_of_panels(const Layout& layout, std::ptrdiff_t k) {
  std::array<std::ptrdiff_t, 4> bytes{panel_offset(layout, k)};
  std::fill_n(bytes.begin() + 1, channel_arrays(layout.format), layout.nr * 4);
  if (layout.groups.size > 0)
    std::fill_n(bytes.begin() + 1, layout.groups.offsets ? 2 : 1, scales_bytes(layout.groups, layout.nr, k));
  return bytes;
}

inline std::ptrdiff_t packed_bytes(const Layout& layout, std::ptrdiff_t n, std::ptrdiff_t k) {
  const auto arrays = arrays_of_panels(layout, k);
  const std::ptrdiff_t table = layout.format == Format::int4 ? kTableBytes : 0;
  const std::ptrdiff_t order = layout.groups.ordered ? k * std::ptrdiff_t{sizeof(std::int32_t)} : 0;
  return ceil_div(n, layout.nr) * std::accumulate(arrays.begin(), arrays.end(), std::ptrdiff_t{0}) + table + order;
}

// A packed weight, as the driver reads it; the arrays are null where the layout has none.
struct Weight {
  const char* panels;
  Layout layout;
  const float* scales;
  const std::int32_t* sums;
  const std::int32_t* zeros;
  ScaledGroups groups{};
  const std::int32_t* order = nullptr;  // of k: the column of x that each column multiplies; null: its own number
};

// The integers that a table of 16 numbers is, or that its doubles are.
inline void find_integers(ScaledGroups& groups) {
  for (const float unit : {1.0f, 0.5f}) {
    bool all = true;
    for (std::size_t i = 0; i < Int4::codes; ++i) {
      const float number = groups.table[i] / unit;
      const bool fits = number >= -128.0f && number <= 127.0f;
      groups.integers[i] = static_cast<std::int8_t>(fits ? number : 0.0f);
      all = all && fits && static_cast<float>(groups.integers[i]) == number;
    }
    groups.unit = all ? unit : 0.0f;
    if (all) return;
  }
}

inline Weight weight_at(const Layout& layout, std::ptrdiff_t n, std::ptrdiff_t k, const char* data) {
  const auto bytes = arrays_of_panels(layout, k);
  std::array<const char*, bytes.size() + 1> at{data};
  for (std::size_t i = 0; i < bytes.size(); ++i) at[i + 1] = at[i] + ceil_div(n, layout.nr) * bytes[i];
  Weight w{.panels = data, .layout = layout, .scales = nullptr, .sums = nullptr, .zeros = nullptr};
  if (info(layout.format).grouped) {
    const char* const offsets = layout.groups.offsets ? at[2] : nullptr;
    w.groups = {layout.groups.size, at[1], offsets, layout.groups.scales, bytes[1], nullptr};
    w.groups.unit = 1.0f;
    const char* behind = at.back();
    if (layout.format == Format::int4) {
      w.groups.table = reinterpret_cast<const float*>(behind);
      w.groups.unit = 0.0f;  // until `find_integers` has been asked
      behind += kTableBytes;
    }
    if (layout.groups.ordered) w.order = reinterpret_cast<const std::int32_t*>(behind);
    return w;
  }
  const std::ptrdiff_t arrays = channel_arrays(layout.format);
  if (arrays > 0) w.scales = reinterpret_cast<const float*>(at[1]);
  if (arrays == 3) {
    w.sums = reinterpret_cast<const std::int32_t*>(at[2]);
    w.zeros = reinterpret_cast<const std::int32_t*>(at[3]);
  }
  return w;
}

}  // namespace fastlinear
