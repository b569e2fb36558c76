// A packed weight: where its panels lie, and what stands behind them.
//
// Behind the panels of int8 weights stand the channels' scales, and for integer products the sums of their weights and
// their zero points, each for as many channels as the panels have.
#pragma once

#include <cstddef>
#include <cstdint>

#include "fastlinear/contract/arith.hpp"
#include "fastlinear/contract/format.hpp"

namespace fastlinear {

inline std::ptrdiff_t panel_elements(const Layout& layout, std::ptrdiff_t k) {
  return layout.nr * ceil_div(k, layout.kr) * layout.kr;
}

inline std::ptrdiff_t panels_bytes(const Layout& layout, std::ptrdiff_t n, std::ptrdiff_t k) {
  return ceil_div(n, layout.nr) * panel_elements(layout, k) * element_bytes(layout.format);
}

// How many arrays of four bytes a channel stand behind the panels.
constexpr std::ptrdiff_t channel_arrays(Format format) {
  return format == Format::int8 ? 3 : format == Format::int8wo ? 1 : 0;
}

inline std::ptrdiff_t packed_bytes(const Layout& layout, std::ptrdiff_t n, std::ptrdiff_t k) {
  const std::ptrdiff_t channels = ceil_div(n, layout.nr) * layout.nr;
  return panels_bytes(layout, n, k) + channel_arrays(layout.format) * channels * 4;
}

// A packed weight, as the driver reads it; the arrays are null where the layout has none.
struct Weight {
  const char* panels;
  Layout layout;
  const float* scales;
  const std::int32_t* sums;
  const std::int32_t* zeros;

  std::ptrdiff_t panel_bytes(std::ptrdiff_t k) const {
    return panel_elements(layout, k) * element_bytes(layout.format);
  }
};

inline Weight weight_at(const Layout& layout, std::ptrdiff_t n, std::ptrdiff_t k, const char* data) {
  Weight w{data, layout, nullptr, nullptr, nullptr};
  const std::ptrdiff_t arrays = channel_arrays(layout.format), channels = ceil_div(n, layout.nr) * layout.nr;
  const char* const behind = data + panels_bytes(layout, n, k);
  if (arrays > 0) w.scales = reinterpret_cast<const float*>(behind);
  if (arrays == 3) {
    w.sums = reinterpret_cast<const std::int32_t*>(behind) + channels;
    w.zeros = w.sums + channels;
  }
  return w;
}

}  // namespace fastlinear
