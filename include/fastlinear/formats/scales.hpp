// Scales of groups of K, and their offsets, as they lie behind a panel. Floats and e8m0 lie [group][nr]. Scales of two
// levels are small integers times an fp16 of their channel; of each 256 k there stand
//
//   int8    [256 / group][nr] integers of 8 bits, [nr] fp16
//   uint6   [3][nr] words of 16 bits, [nr] fp16: of 8 groups of 32 k, words 0 to 2 have the integers 0 and 1, 2 and 3,
//   4
//           and 5 in their lower 12 bits; their upper 4 have, from the lowest on, integer 6 and integer 7
//
// which is as many bits as Q6_K and Q4_K of ggml take.
#pragma once

#include <bit>
#include <cstddef>
#include <cstdint>

#include "fastlinear/contract/arith.hpp"
#include "fastlinear/contract/format.hpp"
#include "fastlinear/formats/bf16.hpp"
#include "fastlinear/formats/fp16.hpp"
#include "fastlinear/formats/int8.hpp"

namespace fastlinear {

// A power of two; 255 is NaN (Open Compute Project, Microscaling Formats v1.0, section 5.4.1).
struct E8m0 {
  std::uint8_t bits;
};

inline float to_float(E8m0 x) {
  if (x.bits == 255) return __builtin_nanf("");
  return std::bit_cast<float>(x.bits == 0 ? 0x400000u : std::uint32_t{x.bits} << 23);
}

inline constexpr std::ptrdiff_t kSuperK = 256;

constexpr bool is_two_level(Format scales) { return scales == Format::int8 || scales == Format::uint6; }

// Of a channel, for each 256 k.
constexpr std::ptrdiff_t super_bytes(const Groups& groups) {
  return groups.scales == Format::uint6 ? 8 : kSuperK / groups.size + 2;
}

// What the scales, or the offsets, of a panel take up to where the groups that begin at k or later stand.
constexpr std::ptrdiff_t scales_bytes(const Groups& groups, std::ptrdiff_t nr, std::ptrdiff_t k) {
  if (is_two_level(groups.scales)) return ceil_div(k, kSuperK) * nr * super_bytes(groups);
  const std::ptrdiff_t bytes = groups.scales == Format::fp32 ? 4 : groups.scales == Format::e8m0 ? 1 : 2;
  return ceil_div(k, groups.size) * nr * bytes;
}

// The integer i of 8 among three words.
constexpr std::uint32_t unpack_six(std::uint32_t a, std::uint32_t b, std::uint32_t c, std::ptrdiff_t i) {
  const std::uint32_t low = i < 2 ? a : i < 4 ? b : c;
  if (i < 6) return (i % 2 == 0 ? low : low >> 6) & 63;
  return i == 6 ? a >> 12 | (b >> 12 & 3) << 4 : b >> 14 | c >> 12 << 2;
}

// Of V::width channels, the first being number i of the floats at `from`: what kernels ask for.
template <class V>
[[gnu::always_inline]] inline V load_scales(Format format, const char* from, std::ptrdiff_t i) {
  if (format == Format::bf16) return V::load(reinterpret_cast<const Bf16*>(from) + i);
  if (format == Format::fp16) return V::load(reinterpret_cast<const Fp16*>(from) + i);
  return V::load(reinterpret_cast<const float*>(from) + i);
}

// Whether kernels read such scales as they are. All others the driver turns into fp32 first.
constexpr bool is_read(Format scales) {
  return scales == Format::fp32 || scales == Format::bf16 || scales == Format::fp16;
}

// Scales of so many groups, and nr channels, that kernels do not read, as fp32. Products of two levels are exact.
template <class V>
void expand_scales(const ScaledGroups& how, const char* from, std::ptrdiff_t groups, std::ptrdiff_t nr, float* out) {
  const std::ptrdiff_t per = kSuperK / how.size;
  for (std::ptrdiff_t g = 0; g < groups; ++g)
    for (std::ptrdiff_t at = 0; at < nr; at += V::width, out += V::width) {
      if (how.format == Format::e8m0) {
        V::store(out, V::load(reinterpret_cast<const E8m0*>(from) + g * nr + at));
      } else if (how.format == Format::int8) {
        const char* const super = from + g / per * (per + 2) * nr;
        const V small = V::load(reinterpret_cast<const Int8*>(super) + g % per * nr + at);
        V::store(out, small * V::load(reinterpret_cast<const Fp16*>(super + per * nr) + at));
      } else {
        const char* const super = from + g / per * 8 * nr;
        const V small = V::load_six(reinterpret_cast<const std::uint16_t*>(super) + at, nr, g % per);
        V::store(out, small * V::load(reinterpret_cast<const Fp16*>(super + 6 * nr) + at));
      }
    }
}

}  // namespace fastlinear
