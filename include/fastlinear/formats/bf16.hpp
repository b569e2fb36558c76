// bf16: the upper half of a float. Widening is a shift; narrowing rounds to nearest, ties to even.
#pragma once

#include <cstddef>
#include <cstdint>

namespace fastlinear {

struct Bf16 {
  std::uint16_t bits;
  // In a panel, two consecutive k of a channel share 32 bits: one shift and one mask make two vectors of floats, and
  // vdpbf16ps takes them as they are.
  static constexpr std::ptrdiff_t kr = 2;
};

[[gnu::always_inline]] inline float to_float(Bf16 x) { return __builtin_bit_cast(float, std::uint32_t{x.bits} << 16); }

// Half a unit less one, plus the last bit that stays, carries exactly where the nearest even lies above. A NaN keeps
// its sign and upper payload, and is made quiet, since what is cut off may have been all that made it one.
[[gnu::always_inline]] inline void from_float(float value, Bf16& out) {
  const auto bits = __builtin_bit_cast(std::uint32_t, value);
  const std::uint32_t rounded = value == value ? bits + 0x7fff + (bits >> 16 & 1) : bits | 0x400000;
  out.bits = static_cast<std::uint16_t>(rounded >> 16);
}

}  // namespace fastlinear
