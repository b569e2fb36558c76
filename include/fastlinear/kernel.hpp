// The contract between the driver (gemm.hpp) and the micro-kernels (kernels/<isa>/<format>.hpp).
//
// A kernel computes one tile of raw sums: rows of A times packed panels of W. It never allocates, never threads,
// never reads a byte outside its rows of A and its panels, and writes only its scratch tile. It knows nothing of
// bias, activation, output type or edges of y: the driver clips, the epilogue finishes (epilogue.hpp).
#pragma once

#include <cstddef>
#include <cstdint>

namespace fastlinear {

// First the floating formats, of weights, rows and outputs. Weights may also be int8: int8wo ("weight-only") is
// multiplied as fp32, int8 as it is by integer rows, which are uint8 (beside a zero point) or int16, in sums of int32.
enum class Format : std::uint8_t { fp32, bf16, fp16, int8wo, int8, uint8, int16, int32 };
enum class Isa : std::uint8_t { scalar, avx2, avx_vnni, avx512, avx512_vnni, avx512_bf16, avx512_fp16 };

inline constexpr std::size_t kFormats = 8, kPackedFormats = 5, kFloatFormats = 3;
inline constexpr std::size_t kIsas = 7;
inline constexpr const char* kFormatNames[kFormats] = {"fp32", "bf16",  "fp16",  "int8wo",
                                                       "int8", "uint8", "int16", "int32"};
inline constexpr const char* kIsaNames[kIsas] = {"scalar",      "avx2",        "avx_vnni",   "avx512",
                                                 "avx512_vnni", "avx512_bf16", "avx512_fp16"};

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

struct TileArgs {
  const void* a;       // first row of the tile, `rows` rows (1..mr) of k elements
  std::ptrdiff_t lda;  // elements from one row of A to the next
  std::ptrdiff_t rows;
  const void* panel;            // first packed panel; `panels` of them (1..kernel.panels)
  std::ptrdiff_t panel_stride;  // bytes from one panel to the next
  std::ptrdiff_t panels;
  std::ptrdiff_t k;                // elements; only the last block of K may end within a group of kr, which integer
                                   // rows fill up with anything, since the panel has zeros there
  void* tile;                      // mr x (kernel.panels * nr) sums, 64-byte aligned, row stride kernel.panels * nr
  bool accumulate;                 // add to the tile (a later block of K) instead of overwriting it
  const char* prefetch;            // each group brings a line or two from here towards L2, then moves on by
  std::ptrdiff_t prefetch_stride;  // prefetch_stride bytes; a prefetch never faults, so it may run past the weight
};

struct Kernel {
  const char* name;  // "fp32/avx512/6x64": format of the weight, ISA, rows x columns of the tile
  Isa isa;
  Format rows;  // the form of A it reads
  Layout layout;
  std::ptrdiff_t mr, panels;
  void (*run)(const TileArgs&);
  Format accumulate = Format::fp32;  // of the sums: int32 of integers; fp16 for up to 64 products, if users ask for it

  constexpr std::ptrdiff_t columns() const { return panels * layout.nr; }

  // Whether it can run on a weight in this layout: its own, or one that the driver widens panel by panel.
  constexpr bool reads(const Layout& packed) const {
    const bool widened = layout.format == Format::fp32 && packed.format <= Format::int8wo;
    const bool paired = layout.format == Format::bf16 && rows == Format::bf16 && packed.format == Format::int8wo;
    return packed == layout || ((widened || paired) && packed.nr == layout.nr);
  }
};

}  // namespace fastlinear
