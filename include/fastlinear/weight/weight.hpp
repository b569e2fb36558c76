// A packed weight: where its panels lie, and what stands behind them.
//
// Behind the panels of formats that have them stand arrays of four bytes a channel, for as many channels as the panels
// have: the scales, and for integer products the sums of the channels' weights and their zero points.
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
