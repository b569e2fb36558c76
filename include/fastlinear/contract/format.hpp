// What numbers are made of, and how packed weights lie in memory. A format is a row of formats/all.hpp; whoever needs
// to know something of a format asks its row, and nobody else multiplies by the size of an element.
//
// A weight [N, K] is cut into panels of nr channels, and a panel into groups of kr consecutive k. In a group each
// channel has its kr elements side by side. W[n, k] of bf16/32x2, of 5 k, in bytes from the start of panel n / 32,
// whose channels are j = n % 32:
//
//   group             0: k 0, 1                   128: k 2, 3                 256: k 4, and zeros
//   channel j       | 0      1     ...  31      | 0      1     ...  31      | 0      1     ...  31      |
//   elements k, k+1 | k0 k1  k0 k1      k0 k1   | k2 k3  k2 k3      k2 k3   | k4 0   k4 0       k4 0    |
//   bytes           | 0      4          124     | 128    132        252     | 256    260        380     | 384
//
// so W[37, 3] has its two bytes at 384 + 128 + 4 * 5 + 2. That is also the tile of weights that AMX reads: rows of 64
// bytes, 128 apart. What belongs to scaled groups of K (`Groups`) stands behind all panels (weight/weight.hpp).
#pragma once

#include <cstddef>
#include <cstdint>

namespace fastlinear {

// Weights may be int8 twice: w8f ("weights of 8 bits, times floats") is multiplied as fp32, int8 as it is by integer
// rows, which are uint8 (beside a zero point) or int16, in sums of int32.
// Codes of int4 mean what a table of 16 numbers says, scaled group by group; int8g are integers scaled likewise, and
// fp8 are float8_e4m3fn.
// The scales themselves are floats, or e8m0, or integers of 8 or 6 bits (int8, uint6) times an fp16 for each 256 k.
enum class Format : std::uint8_t { fp32, bf16, fp16, w8f, int8, uint8, int16, int32, int4, int8g, e8m0, uint6, fp8 };

constexpr std::uint32_t bit(Format format) { return 1u << static_cast<unsigned>(format); }

// Of a weight whose channels are scaled by parts of K: W[n, k] = scale[n, g] * table[code[n, k]] + offset[n, g], where
// g = k / size.
struct Groups {
  std::ptrdiff_t size = 0;       // a power of two from 16 on; the last group may be shorter
  Format scales = Format::fp32;  // of scales and offsets (formats/scales.hpp)
  bool offsets = false;          // else they are 0
  bool ordered = false;          // columns of W have another order than those of x (weight/weight.hpp)
};

// Panels of nr output channels in groups of kr. Kernels with equal layouts read the same packed bytes, so the tuner may
// swap them without a second copy. How a weight is scaled is told to a kernel in each call, and so makes no difference.
struct Layout {
  Format format;
  std::ptrdiff_t nr, kr;
  Groups groups{};
  friend constexpr bool operator==(const Layout& a, const Layout& b) {
    return a.format == b.format && a.nr == b.nr && a.kr == b.kr;
  }
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

// Scales and offsets of a packed weight, and what its codes mean, as a kernel reads them.
struct ScaledGroups {
  std::ptrdiff_t size = 0;
  const char* scales = nullptr;   // those of a panel, as formats/scales.hpp has them
  const char* offsets = nullptr;  // likewise, or null
  Format format = Format::fp32;
  std::ptrdiff_t panel_stride = 0;  // bytes, from one panel's to the next
  const float* table = nullptr;     // of 16, for int4
  // What codes stand for is integers times this, a power of two; 0 where it is not. Those of the table are `integers`.
  float unit = 0.0f;
  std::int8_t integers[16] = {};

  // From a later panel, and the group that begins at k, on.
  ScaledGroups at(const Layout& layout, std::ptrdiff_t panel, std::ptrdiff_t k) const;
};

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
  bool grouped = false;           // scaled in groups of K
};

}  // namespace fastlinear
