// The formats of the library, in the order of enum Format, and what follows from a row. To add one: a header beside
// this one (its elements, how they are packed), a name in the enum, a row here.
#pragma once

#include <algorithm>
#include <iterator>

#include "fastlinear/contract/arith.hpp"
#include "fastlinear/contract/format.hpp"
#include "fastlinear/formats/elements.hpp"
#include "fastlinear/formats/int4.hpp"
#include "fastlinear/formats/scales.hpp"

namespace fastlinear {

inline constexpr FormatInfo kFormats[] = {
    {Format::fp32, "fp32", 32, true, pack_elements<std::uint32_t>, unpack_elements<std::uint32_t>},
    {Format::bf16, "bf16", 16, true, pack_elements<std::uint16_t>, unpack_elements<std::uint16_t>, bit(Format::fp32)},
    {Format::fp16, "fp16", 16, true, pack_elements<std::uint16_t>, unpack_elements<std::uint16_t>, bit(Format::fp32)},
    {Format::w8f, "w8f", 8, false, pack_elements<std::uint8_t>, unpack_elements<std::uint8_t>,
     bit(Format::fp32) | bit(Format::bf16), 1},
    {Format::int8, "int8", 8, false, pack_elements<std::uint8_t>, unpack_elements<std::uint8_t>, 0, 3, 0x80},
    {Format::uint8, "uint8", 8, false, nullptr, nullptr},
    {Format::int16, "int16", 16, false, nullptr, nullptr},
    {Format::int32, "int32", 32, false, nullptr, nullptr},
    {Format::int4, "int4", 4, false, pack_nibbles, unpack_nibbles,
     bit(Format::fp32) | bit(Format::bf16) | bit(Format::int8g), 0, 0, true},
    {Format::int8g, "int8g", 8, false, pack_elements<std::uint8_t>, unpack_elements<std::uint8_t>,
     bit(Format::fp32) | bit(Format::bf16), 0, 0, true},
    {Format::e8m0, "e8m0", 8, false, nullptr, nullptr},
    {Format::uint6, "uint6", 6, false, nullptr, nullptr},
    {Format::fp8, "fp8", 8, false, pack_elements<std::uint8_t>, unpack_elements<std::uint8_t>,
     bit(Format::fp32) | bit(Format::bf16), 0, 0, true},
};

static_assert([] {
  for (std::size_t i = 0; i < std::size(kFormats); ++i)
    if (kFormats[i].format != static_cast<Format>(i)) return false;
  return true;
}());

// In which biases, epilogues and sums of floating products are kept.
inline constexpr Format kNumbers = Format::fp32;

// Null past the end.
constexpr const FormatInfo* format_at(std::size_t i) { return i < std::size(kFormats) ? kFormats + i : nullptr; }
constexpr const FormatInfo& info(Format format) { return kFormats[static_cast<std::size_t>(format)]; }

constexpr bool is_float(Format format) { return info(format).floating; }
// Of numbers that stand side by side, in x, a bias, y.
constexpr std::ptrdiff_t element_bytes(Format format) { return info(format).bits / 8; }

// K may be cut between those only.
constexpr std::ptrdiff_t k_step(const Layout& layout) {
  return std::max({layout.kr, layout.groups.size, is_two_level(layout.groups.scales) ? kSuperK : 1});
}
constexpr std::ptrdiff_t group_bytes(const Layout& layout) {
  return layout.nr * layout.kr * info(layout.format).bits / 8;
}
// Where in a panel the group of k begins, if one does; where the panel ends, of the last k.
constexpr std::ptrdiff_t panel_offset(const Layout& layout, std::ptrdiff_t k) {
  return ceil_div(k, layout.kr) * group_bytes(layout);
}

inline ScaledGroups ScaledGroups::at(const Layout& layout, std::ptrdiff_t panel, std::ptrdiff_t k) const {
  if (size == 0) return *this;
  const std::ptrdiff_t bytes = panel * panel_stride + scales_bytes({size, format}, layout.nr, k);
  ScaledGroups there = *this;
  there.scales += bytes;
  if (offsets != nullptr) there.offsets += bytes;
  return there;
}

}  // namespace fastlinear
