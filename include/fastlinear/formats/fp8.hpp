// fp8: float8_e4m3fn, a sign, four bits of exponent and three of mantissa, in groups of K. All but NaN, 0x7f and 0xff,
// which stand for 480 and -480 here: weights that have one are not packed so.
//
// Two consecutive k of a channel share 16 bits. Shifted to where an fp16 has them, its own three fields are the number
// times 2^-8, denormals included, of which F16C makes floats whatever MXCSR says of denormals.
#pragma once

#include <cstddef>
#include <cstdint>

#include "fastlinear/contract/format.hpp"

namespace fastlinear {

struct Fp8 {
  std::uint8_t bits;
  static constexpr std::ptrdiff_t kr = 2, nr = 32;  // one layout on every ISA
  static constexpr Layout layout{Format::fp8, nr, kr};
  static constexpr float of_half = 0x1p8f;  // what the fp16 is to be multiplied by
};

[[gnu::always_inline]] inline float to_float(Fp8 x) {
  const std::uint32_t magnitude = x.bits & 0x7fu, sign = (x.bits & 0x80u) << 24;
  const float number = magnitude < 8 ? static_cast<float>(magnitude) * 0x1p-9f
                                     : __builtin_bit_cast(float, (magnitude << 20) + (120u << 23));
  return __builtin_bit_cast(float, sign | __builtin_bit_cast(std::uint32_t, number));
}

}  // namespace fastlinear
