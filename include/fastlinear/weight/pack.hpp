// Canonical weight [N, K] -> panels, and back, on torch's threads; what is done to a panel is the format's affair.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>

#include "fastlinear/host/parallel.hpp"
#include "fastlinear/weight/weight.hpp"

namespace fastlinear {

template <class Work>
void for_panels(const Layout& layout, std::ptrdiff_t n, const Work& work) {
  constexpr std::ptrdiff_t kChunk = 8;
  const std::ptrdiff_t panels = ceil_div(n, layout.nr);
  thread_pool().run(ceil_div(panels, kChunk),
                    [&](std::ptrdiff_t i) { work(i * kChunk, std::min(panels, (i + 1) * kChunk)); });
}

// Whole weights of the layout's format; the panels land in the pages of the threads that wrote them.
inline void pack_weight(const Layout& layout, const WeightView<void>& w, void* packed) {
  for_panels(layout, w.n, [&](std::ptrdiff_t first, std::ptrdiff_t last) {
    info(layout.format).pack(layout, w, packed, first, last);
  });
}

inline void unpack_weight(const Layout& layout, const void* packed, const WeightView<void>& w) {
  for_panels(layout, w.n, [&](std::ptrdiff_t first, std::ptrdiff_t last) {
    info(layout.format).unpack(layout, packed, w, first, last);
  });
}

// What stands behind the panels of int8 weights: the scales [n], for integer products the sums of the rows of `w` and
// the zero points [n] (or null: all 0); channels past n have 0.
inline void pack_channels(const Layout& layout, const WeightView<void>& w, const float* scales,
                          const std::int32_t* zeros, char* packed) {
  const Weight at = weight_at(layout, w.n, w.k, packed);
  std::memset(packed + panels_bytes(layout, w.n, w.k), 0,
              static_cast<std::size_t>(packed_bytes(layout, w.n, w.k) - panels_bytes(layout, w.n, w.k)));
  if (at.scales != nullptr) std::copy_n(scales, w.n, const_cast<float*>(at.scales));
  if (at.sums == nullptr) return;
  if (zeros != nullptr) std::copy_n(zeros, w.n, const_cast<std::int32_t*>(at.zeros));
  const auto* data = static_cast<const std::int8_t*>(w.data);
  thread_pool().run(w.n, [&](std::ptrdiff_t n) {
    std::int32_t sum = 0;
    for (std::ptrdiff_t k = 0; k < w.k; ++k) sum += data[n * w.stride_n + k * w.stride_k];
    const_cast<std::int32_t*>(at.sums)[n] = sum;
  });
}

}  // namespace fastlinear
