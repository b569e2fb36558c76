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

// Lines of memory that a tile will be finished with: `rows` rows of y, which will be written, and as many of a tensor
// that the epilogue reads beside them, of `bytes` each and so far apart. No bytes of what nobody knows.
struct Lines {
  struct Part {
    const char* from = nullptr;
    std::ptrdiff_t stride = 0, bytes = 0;
  };
  std::ptrdiff_t rows = 0;
  Part y{}, beside{};

  // Brings the next row of them.
  void fetch_row() {
    constexpr std::ptrdiff_t kLine = 64;
    for (std::ptrdiff_t at = 0; at < y.bytes; at += kLine) __builtin_prefetch(y.from + at, 1);
    for (std::ptrdiff_t at = 0; at < beside.bytes; at += kLine) __builtin_prefetch(beside.from + at, 0);
    y.from += y.stride;
    beside.from += beside.stride;
    --rows;
  }
  // All of them, at once.
  void fetch() const {
    for (Lines left = *this; left.rows > 0;) left.fetch_row();
  }
};

// What stands beside rows of int8 that are scaled in groups of K: for each group of a row the scale; -128 times the sum
// of its integers, which is what is too much where weights lie 128 higher; and the sum of the numbers that they stand
// for. Those of the next row are as far away as its integers.
struct RowGroups {
  const float* scales = nullptr;
  const std::int32_t* starts = nullptr;
  const float* totals = nullptr;

  RowGroups at(std::ptrdiff_t row_bytes, std::ptrdiff_t row, std::ptrdiff_t group) const {
    const std::ptrdiff_t i = row * row_bytes / 4 + group;
    return {scales + i, starts + i, totals + i};
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
  RowGroups row_groups;            // of rows that are, from the first row and k on
  void* tile;                      // mr x (kernel.panels * nr) sums, 64-byte aligned, row stride kernel.panels * nr
  bool accumulate;                 // add to the tile (a later block of K) instead of overwriting it
  const char* prefetch;            // so many bytes from here on for each group are to be brought toward L2, a line or
  std::ptrdiff_t prefetch_stride;  // two of them; a prefetch never faults, so they may be past the weight
  const char* beside;              // the same of rows of A; kernels that have no time for it let it be
  std::ptrdiff_t beside_stride;    // 0 for none
  Lines lines;                     // where the tile goes and what it meets, to be fetched while there is time
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
