// IEEE binary16 on a CPU that has no instruction for it. AVX2 machines convert with F16C instead.
#pragma once

#include <cstddef>
#include <cstdint>

namespace fastlinear {

struct Fp16 {
  std::uint16_t bits;
  static constexpr std::ptrdiff_t kr = 1;
};

// Exponent and mantissa, moved to where a float has them, read 2^112 too small; a product mends that, denormals
// included. What had all exponent bits set is an infinity or NaN and gets them set again.
[[gnu::always_inline]] inline float to_float(Fp16 x) {
  const std::uint32_t sign = (x.bits & 0x8000u) << 16, magnitude = (x.bits & 0x7fffu) << 13;
  const auto scaled = __builtin_bit_cast(std::uint32_t, __builtin_bit_cast(float, magnitude) * 0x1p112f);
  return __builtin_bit_cast(float, sign | scaled | (magnitude >= 0x0f800000u ? 0x7f800000u : 0u));
}

// To nearest, ties to even, by adding a power of two whose last place is that of the result (Maratyszcza's FP16,
// fp16_ieee_from_fp32_value). Scaling up and down first turns everything beyond the range into an infinity.
[[gnu::always_inline]] inline void from_float(float value, Fp16& out) {
  const auto bits = __builtin_bit_cast(std::uint32_t, value);
  const std::uint32_t exponent = bits & 0x7f800000u, magnitude = bits & 0x7fffffffu;
  const float absolute = __builtin_bit_cast(float, magnitude) * 0x1p112f * 0x1p-110f;
  const std::uint32_t unit = (exponent < 0x38800000u ? 0x38800000u : exponent) + 0x07800000u;
  const auto sum = __builtin_bit_cast(std::uint32_t, __builtin_bit_cast(float, unit) + absolute);
  const std::uint32_t finite = (sum >> 13 & 0x7c00u) + (sum & 0x0fffu);
  out.bits = static_cast<std::uint16_t>((bits >> 16 & 0x8000u) | (magnitude > 0x7f800000u ? 0x7e00u : finite));
}

}  // namespace fastlinear
