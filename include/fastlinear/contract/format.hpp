// What numbers are made of, and how packed weights lie in memory. A format is a row of formats/all.hpp; whoever needs
// to know something of a format asks its row, and nobody else multiplies by the size of an element.
//
// A weight [N, K] is cut into panels of nr channels, a panel into blocks of k_block consecutive k, and a block into
// groups of kr. In a group each channel has its kr elements side by side; before the groups of a block may stand what
// belongs to it alone, for each channel (side_bytes: scales, zero points). Most formats have no such thing, and a block
// is a group. W[n, k] of bf16/32x2, of 5 k, in bytes from the start of panel n / 32, whose channels are j = n % 32:
//
//   block = group     0: k 0, 1                   128: k 2, 3                 256: k 4, and zeros
//   channel j       | 0      1     ...  31      | 0      1     ...  31      | 0      1     ...  31      |
//   elements k, k+1 | k0 k1  k0 k1      k0 k1   | k2 k3  k2 k3      k2 k3   | k4 0   k4 0       k4 0    |
//   bytes           | 0      4          124     | 128    132        252     | 256    260        380     | 384
//
// so W[37, 3] has its two bytes at 384 + 128 + 4 * 5 + 2. That is also the tile of weights that AMX reads: rows of 64
// bytes, 128 apart. With 16 int4 codes a channel and block of 32 k and an fp16 scale (k_block 32, side_bytes 2), a
// block of 32 channels would be 64 bytes of scales and 512 of codes.
#pragma once

#include <cstddef>
#include <cstdint>

namespace fastlinear {

// Weights may be int8 twice: int8wo ("weight-only") is multiplied as fp32, int8 as it is by integer rows, which are
// uint8 (beside a zero point) or int16, in sums of int32.
enum class Format : std::uint8_t { fp32, bf16, fp16, int8wo, int8, uint8, int16, int32 };

constexpr std::uint32_t bit(Format format) { return 1u << static_cast<unsigned>(format); }

// Panels of nr output channels in groups of kr. Kernels with equal layouts read the same packed bytes, so the tuner may
// swap them without a second copy.
struct Layout {
  Format format;
  std::ptrdiff_t nr, kr;
  friend constexpr bool operator==(const Layout&, const Layout&) = default;
};

// Any strides, in elements, so that a transposed weight (GPT-2's Conv1D) packs without a copy.
template <class Element>
struct WeightView {
  Element* data;
  std::ptrdiff_t n, k, stride_n, stride_k;
};

// Panels [first, last) of a weight; exact, and the last panel and group are filled up with zeros.
using Pack = void (*)(const Layout&, const WeightView<void>&, void* packed, std::ptrdiff_t first, std::ptrdiff_t last);
using Unpack = void (*)(const Layout&, const void* packed, const WeightView<void>&, std::ptrdiff_t first,
                        std::ptrdiff_t last);

struct FormatInfo {
  Format format;
  const char* name;
  std::ptrdiff_t bits;  // of an element
  bool floating;        // x, biases, operands and outputs may be of it
  Pack pack;            // null where weights are not of it
  Unpack unpack;
  std::uint32_t converts_to = 0;  // formats that the driver can turn its panels into (`bit`), where the ISA can
  std::ptrdiff_t arrays = 0;      // of 4 bytes a channel behind the panels: scales, and with 3 also sums, zero points
  std::uint8_t flip = 0;          // of integer x and y: the bits that make uint8 of them
  std::ptrdiff_t k_block = 0;     // 0: a group; a power of two, as kr is
  std::ptrdiff_t side_bytes = 0;  // a channel and block
};

}  // namespace fastlinear
