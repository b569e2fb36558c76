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

#include <cstddef>
#include <cstdint>

#include "fastlinear/contract/arith.hpp"
#include "fastlinear/formats/all.hpp"

namespace fastlinear {

inline std::ptrdiff_t panels_bytes(const Layout& layout, std::ptrdiff_t n, std::ptrdiff_t k) {
  return ceil_div(n, layout.nr) * panel_offset(layout, k);
}

constexpr std::ptrdiff_t channel_arrays(Format format) { return info(format).arrays; }

inline constexpr std::ptrdiff_t kTableBytes = Int4::codes * 4;

// Of the scales, which is that of the offsets, of all panels.
inline std::ptrdiff_t scales_bytes(const Layout& layout, std::ptrdiff_t n, std::ptrdiff_t k) {
  return layout.groups.size == 0 ? 0 : ceil_div(n, layout.nr) * scales_bytes(layout.groups, layout.nr, k);
}

inline std::ptrdiff_t packed_bytes(const Layout& layout, std::ptrdiff_t n, std::ptrdiff_t k) {
  const std::ptrdiff_t channels = ceil_div(n, layout.nr) * layout.nr;
  const std::ptrdiff_t scales = scales_bytes(layout, n, k) * (layout.groups.offsets ? 2 : 1);
  const std::ptrdiff_t table = layout.format == Format::int4 ? kTableBytes : 0;
  const std::ptrdiff_t order = layout.groups.ordered ? k * std::ptrdiff_t{sizeof(std::int32_t)} : 0;
  return panels_bytes(layout, n, k) + scales + channel_arrays(layout.format) * channels * 4 + table + order;
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
  Weight w{.panels = data, .layout = layout, .scales = nullptr, .sums = nullptr, .zeros = nullptr};
  const std::ptrdiff_t arrays = channel_arrays(layout.format), channels = ceil_div(n, layout.nr) * layout.nr;
  const char* behind = data + panels_bytes(layout, n, k);
  if (info(layout.format).grouped) {
    const std::ptrdiff_t bytes = scales_bytes(layout, n, k);
    const std::ptrdiff_t stride = scales_bytes(layout.groups, layout.nr, k);
    w.groups = {layout.groups.size, behind, nullptr, layout.groups.scales, stride, nullptr};
    behind += bytes;
    if (layout.groups.offsets) {
      w.groups.offsets = behind;
      behind += bytes;
    }
    w.groups.unit = 1.0f;
    if (layout.format == Format::int4) {
      w.groups.table = reinterpret_cast<const float*>(behind);
      w.groups.unit = 0.0f;  // until `find_integers` has been asked
      behind += kTableBytes;
    }
    if (layout.groups.ordered) w.order = reinterpret_cast<const std::int32_t*>(behind);
    return w;
  }
  if (arrays > 0) w.scales = reinterpret_cast<const float*>(behind);
  if (arrays == 3) {
    w.sums = reinterpret_cast<const std::int32_t*>(behind) + channels;
    w.zeros = w.sums + channels;
  }
  return w;
}

}  // namespace fastlinear
