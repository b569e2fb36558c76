// int8 weights: as numbers, in panels that floating rows multiply, and as integers, in panels for dot products.
#pragma once

#include <cstddef>
#include <cstdint>

#include "fastlinear/contract/format.hpp"

namespace fastlinear {

struct Int8 {
  std::int8_t value;
  static constexpr std::ptrdiff_t kr = 1;
  // Four consecutive k of a channel share 32 bits, which is what vpdpbusd multiplies and adds up in one lane.
  static constexpr std::ptrdiff_t dot_kr = 4;
};

// In groups: one layout on every ISA, that of dot products.
struct Int8InGroups {
  static constexpr Layout layout{Format::int8g, 32, Int8::dot_kr};
};

[[gnu::always_inline]] inline float to_float(Int8 x) { return x.value; }

// 2^31 / (255 * 128) and 2^31 / (255 * 255): the longest sums of u8 * s8, and of u8 * (s8 - zero point), in int32.
inline constexpr std::ptrdiff_t kDotLimit = 65793, kDotLimitWithZeros = 33025;

}  // namespace fastlinear
