// int4: codes of 4 bits, which mean what a table of 16 numbers says. Eight consecutive k of a channel share 32 bits:
//
//   byte j holds k = j in its lower and k = 4 + j in its upper half
//
// so that four k of one kind lie in the bytes of a lane as vpdpbusd multiplies them, after a mask or one shift, and as
// tiles of AMX read them; a lane shifted by code_shift(k) begins with the code of k, which is all that vpermps looks
// at.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>

#include "fastlinear/contract/arith.hpp"
#include "fastlinear/contract/format.hpp"

namespace fastlinear {

struct Int4 {
  static constexpr std::ptrdiff_t kr = 8, nr = 32, codes = 16;  // one layout on every ISA
  static constexpr Layout layout{Format::int4, nr, kr};
};

constexpr int code_shift(std::ptrdiff_t k) { return static_cast<int>(k % 4 * 8 + k / 4 * 4); }

// Codes come as a byte each.
inline void pack_nibbles(const Layout& layout, const WeightView<void>& w, void* packed, std::ptrdiff_t first,
                         std::ptrdiff_t last) {
  const auto* data = static_cast<const std::uint8_t*>(w.data);
  const std::ptrdiff_t groups = ceil_div(w.k, Int4::kr);
  for (std::ptrdiff_t p = first; p < last; ++p)
    for (std::ptrdiff_t j = 0; j < layout.nr; ++j) {
      const std::ptrdiff_t n = p * layout.nr + j;
      for (std::ptrdiff_t g = 0; g < groups; ++g) {
        std::uint32_t lane = 0;
        for (std::ptrdiff_t i = 0; i < Int4::kr && n < w.n && g * Int4::kr + i < w.k; ++i)
          lane |= (data[n * w.stride_n + (g * Int4::kr + i) * w.stride_k] & 15u) << code_shift(i);
        std::memcpy(static_cast<char*>(packed) + ((p * groups + g) * layout.nr + j) * 4, &lane, sizeof lane);
      }
    }
}

inline void unpack_nibbles(const Layout& layout, const void* packed, const WeightView<void>& w, std::ptrdiff_t first,
                           std::ptrdiff_t last) {
  auto* data = static_cast<std::uint8_t*>(w.data);
  const std::ptrdiff_t groups = ceil_div(w.k, Int4::kr);
  for (std::ptrdiff_t n = first * layout.nr; n < last * layout.nr && n < w.n; ++n)
    for (std::ptrdiff_t g = 0; g < groups; ++g) {
      std::uint32_t lane;
      std::memcpy(&lane,
                  static_cast<const char*>(packed) + ((n / layout.nr * groups + g) * layout.nr + n % layout.nr) * 4,
                  sizeof lane);
      for (std::ptrdiff_t i = 0; i < Int4::kr && g * Int4::kr + i < w.k; ++i)
        data[n * w.stride_n + (g * Int4::kr + i) * w.stride_k] = static_cast<std::uint8_t>(lane >> code_shift(i) & 15);
    }
}

}  // namespace fastlinear
