// The contract between the driver (driver/gemm.hpp) and the micro-kernels (isa/<isa>/<format>.hpp).
//
// A kernel computes one tile of raw sums: rows of A times packed panels of W. It never allocates, never threads,
// never reads a byte outside its rows of A and its panels, and writes only its scratch tile. It knows nothing of
// bias, activation, output type or edges of y: the driver clips, the epilogue finishes (epilogue.hpp).
#pragma once

#include <cstddef>
#include <cstdint>

#include "fastlinear/contract/format.hpp"

namespace fastlinear {

struct Isa;

// Lines of memory that will be written soon: `rows` of `bytes` each, so far apart. None where nobody knows.
struct Lines {
  const char* from = nullptr;
  std::ptrdiff_t stride = 0, rows = 0, bytes = 0;

  // Brings the next row of them.
  void fetch_row() {
    constexpr std::ptrdiff_t kLine = 64;
    for (std::ptrdiff_t at = 0; at < bytes; at += kLine) __builtin_prefetch(from + at, 1);
    from += stride;
    --rows;
  }
};

struct TileArgs {
  const void* a;       // first row of the tile, `rows` rows (1..mr) of k elements
  std::ptrdiff_t lda;  // elements from one row of A to the next
  std::ptrdiff_t rows;
  const void* panel;            // first packed panel; `panels` of them (1..kernel.panels)
  std::ptrdiff_t panel_stride;  // bytes from one panel to the next
  std::ptrdiff_t panels;
  std::ptrdiff_t k;                // elements; only the last block of K may end within a group of kr, which integer
                                   // rows fill up with anything, since the panel has zeros there, or within a k_step
  const ScaledGroups* groups;      // of weights that are scaled in groups, from the first panel and k on
  void* tile;                      // mr x (kernel.panels * nr) sums, 64-byte aligned, row stride kernel.panels * nr
  bool accumulate;                 // add to the tile (a later block of K) instead of overwriting it
  const char* prefetch;            // each group brings a line or two from here toward L2, then moves on by
  std::ptrdiff_t prefetch_stride;  // prefetch_stride bytes; a prefetch never faults, so it may run past the weight
  Lines y;                         // where the tile goes, to be fetched while there is time
};

// What a thread does before its first tile of a call and after its last: state of the CPU that belongs to nobody is put
// back as it was found, by means of `memory`, which lies on a multiple of its size.
inline constexpr std::size_t kSessionBytes = 64;
struct Session {
  void (*enter)(void* memory);
  void (*leave)(const void* memory);
};

struct Kernel {
  const char* name;  // "fp32/avx512/6x64": format of the weight, ISA, rows x columns of the tile
  const Isa& isa;
  Format rows;  // the form of A it reads
  Layout layout;
  std::ptrdiff_t mr, panels;
  void (*run)(const TileArgs&);
  Format accumulate = Format::fp32;  // of the sums: int32 of integers; fp16 for up to 64 products, if users ask for it

  // Rows and K that it takes at a time: it reads rows of A up to a multiple of row_step, and of each k up to a multiple
  // of k_step, where the driver has laid zeros, and writes as many rows of sums, of which nobody reads those beyond
  // `rows`. Both are powers of two.
  std::ptrdiff_t row_step = 1, k_step = 1;
  const Session* session = nullptr;

  constexpr std::ptrdiff_t columns() const { return panels * layout.nr; }
};

}  // namespace fastlinear
