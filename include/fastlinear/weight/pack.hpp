// Canonical weight [N, K] -> panels, and back, on torch's threads; what is done to a panel is the format's affair.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>

#include "fastlinear/formats/bf16.hpp"
#include "fastlinear/formats/fp16.hpp"
#include "fastlinear/host/parallel.hpp"
#include "fastlinear/weight/weight.hpp"

namespace fastlinear {

// Element i of numbers in a floating format, side by side.
inline float read_float(Format format, const void* from, std::ptrdiff_t i) {
  if (format == Format::bf16) return to_float(static_cast<const Bf16*>(from)[i]);
  if (format == Format::fp16) return to_float(static_cast<const Fp16*>(from)[i]);
  return static_cast<const float*>(from)[i];
}

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

// What stands behind the panels of weights in groups: scales [n, groups], offsets likewise (or null), both in the
// layout's format and side by side, the 16 numbers that codes stand for, and what they make each channel sum up to, in
// the order of fastlinear/spec/int4.py. Channels past n have 0.
inline void pack_groups(const Layout& layout, const WeightView<void>& codes, const void* scales, const void* offsets,
                        const float* table, char* packed) {
  const std::ptrdiff_t n = codes.n, k = codes.k, size = layout.groups.size, groups = ceil_div(k, size);
  const Weight at = weight_at(layout, n, k, packed);
  char* const behind = packed + panels_bytes(layout, n, k);
  std::memset(behind, 0, static_cast<std::size_t>(packed + packed_bytes(layout, n, k) - behind));
  const std::ptrdiff_t bytes = element_bytes(layout.groups.scales);
  const auto lay = [&](const void* from, const char* to, std::ptrdiff_t row) {
    for (std::ptrdiff_t g = 0; g < groups; ++g)
      std::memcpy(
          const_cast<char*>(to) + row / layout.nr * at.groups.panel_stride + (g * layout.nr + row % layout.nr) * bytes,
          static_cast<const char*>(from) + (row * groups + g) * bytes, static_cast<std::size_t>(bytes));
  };
  std::copy_n(table, Int4::codes, const_cast<float*>(at.groups.table));
  const auto* data = static_cast<const std::uint8_t*>(codes.data);
  const auto number = [&](const void* from, std::ptrdiff_t i) { return read_float(layout.groups.scales, from, i); };
  thread_pool().run(n, [&](std::ptrdiff_t row) {
    lay(scales, at.groups.scales, row);
    if (offsets != nullptr) lay(offsets, at.groups.offsets, row);
    float total = 0.0f;
    for (std::ptrdiff_t g = 0; g < groups; ++g) {
      float sum = 0.0f;
      const std::ptrdiff_t end = std::min(k, (g + 1) * size);
      for (std::ptrdiff_t i = g * size; i < end; ++i)
        sum += table[data[row * codes.stride_n + i * codes.stride_k] & 15];
      total += sum * number(scales, row * groups + g);
      if (offsets != nullptr) total += static_cast<float>(end - g * size) * number(offsets, row * groups + g);
    }
    const_cast<float*>(at.totals)[row] = total;
  });
}

}  // namespace fastlinear
