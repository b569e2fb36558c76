// What numbers are made of, and how packed weights lie in memory.
#pragma once

#include <cstddef>
#include <cstdint>

namespace fastlinear {

// First the floating formats, of weights, rows and outputs. Weights may also be int8: int8wo ("weight-only") is
// multiplied as fp32, int8 as it is by integer rows, which are uint8 (beside a zero point) or int16, in sums of int32.
enum class Format : std::uint8_t { fp32, bf16, fp16, int8wo, int8, uint8, int16, int32 };

inline constexpr std::size_t kFormats = 8, kPackedFormats = 5, kFloatFormats = 3;
inline constexpr const char* kFormatNames[kFormats] = {"fp32", "bf16",  "fp16",  "int8wo",
                                                       "int8", "uint8", "int16", "int32"};

constexpr std::ptrdiff_t element_bytes(Format format) {
  constexpr std::ptrdiff_t bytes[kFormats] = {4, 2, 2, 1, 1, 1, 2, 4};
  return bytes[static_cast<std::size_t>(format)];
}

constexpr bool is_float(Format format) { return static_cast<std::size_t>(format) < kFloatFormats; }

// How a weight [N, K] lies in memory: panels of nr output channels; in a panel, groups of kr consecutive k, each
// holding its nr channels side by side. Kernels with equal layouts read the same packed bytes, so the tuner may swap
// them without a second copy.
struct Layout {
  Format format;
  std::ptrdiff_t nr, kr;
  friend constexpr bool operator==(const Layout&, const Layout&) = default;
};

}  // namespace fastlinear
