// How a product M x N x K is cut: pure arithmetic, no memory, no threads.
//
//   unit = (K slice, block of row tiles, group of panels): what one thread takes at a time
//
// The panels of a group stay in L2 while the row tiles of the block pass over them, one K block after the other.
#pragma once

#include <algorithm>

#include "fastlinear/contract/arith.hpp"
#include "fastlinear/contract/isa.hpp"

namespace fastlinear {

struct Plan {
  const Kernel* kernel;
  std::ptrdiff_t threads, k_slices;  // at least 1
  const Vectors* vectors;            // those of the kernel's ISA
};

inline Plan make_plan(const Kernel& kernel, std::ptrdiff_t threads, std::ptrdiff_t k_slices) {
  return {&kernel, threads, k_slices, &vectors_of(kernel.isa)};
}

struct Range {
  std::ptrdiff_t begin, end;
  std::ptrdiff_t size() const { return end - begin; }
};

struct Unit {
  std::ptrdiff_t slice, row_block, group;
};

class Grid {
 public:
  // K is cut between groups of kr elements: of the packed weight, or of the kernel, or its k_step, if those are longer.
  Grid(const Plan& plan, std::ptrdiff_t packed_kr, std::ptrdiff_t m, std::ptrdiff_t n, std::ptrdiff_t k)
      : m_(m), k_(k), row_step_(plan.kernel->row_step) {
    const Kernel& kernel = *plan.kernel;
    const std::ptrdiff_t kr = std::max({packed_kr, kernel.layout.kr, kernel.k_step});
    const std::ptrdiff_t row_tile_bytes = kernel.mr * std::max(k, one) * element_bytes(kernel.rows);
    const std::ptrdiff_t columns_bytes = kernel.columns() * element_bytes(kernel.layout.format);
    groups = ceil_div(ceil_div(n, kernel.layout.nr), kernel.panels);
    row_tiles = ceil_div(m, kernel.mr);

    slice_k_ = ceil_div(ceil_div(std::max(k, one), plan.k_slices), kr) * kr;
    k_blocks_ = ceil_div(slice_k_ * columns_bytes, panel_block_bytes);
    block_k_ = ceil_div(ceil_div(slice_k_, k_blocks_), kr) * kr;

    const std::ptrdiff_t wanted = plan.threads > 1 ? plan.threads * units_per_thread : 1;
    row_blocks_ = ceil_div(row_tiles, std::max(one, row_block_bytes / row_tile_bytes));
    row_blocks_ = std::min(row_tiles, std::max(row_blocks_, ceil_div(wanted, groups * plan.k_slices)));
    units = plan.k_slices * row_blocks_ * groups;
  }

  // Neighbours share their rows and read adjacent panels.
  Unit unit(std::ptrdiff_t i) const { return {i / (groups * row_blocks_), i / groups % row_blocks_, i % groups}; }
  Range row_tiles_of(const Unit& u) const {
    return {part(row_tiles, u.row_block, row_blocks_), part(row_tiles, u.row_block + 1, row_blocks_)};
  }
  // Rows of one tile: tiles differ by one row_step at most, since 16 rows on a 14-row kernel run faster as 8 + 8.
  Range rows_of(std::ptrdiff_t row_tile) const {
    const std::ptrdiff_t steps = ceil_div(m_, row_step_);
    return {std::min(m_, part(steps, row_tile, row_tiles) * row_step_),
            std::min(m_, part(steps, row_tile + 1, row_tiles) * row_step_)};
  }
  Range slice_of(const Unit& u) const {
    return {std::min(k_, u.slice * slice_k_), std::min(k_, (u.slice + 1) * slice_k_)};
  }
  // The K block of `slice` that begins at k.
  Range block_at(const Range& slice, std::ptrdiff_t k) const { return {k, std::min(slice.end, k + block_k_)}; }
  bool one_k_block() const { return k_blocks_ == 1; }

  std::ptrdiff_t groups, row_tiles;
  std::ptrdiff_t units;

 private:
  // Half of the smallest L2 we meet (1 MB) for the K block of a group, so that it stays there beside the rows.
  static constexpr std::ptrdiff_t panel_block_bytes = 512 << 10;
  // L2 to L3 for the rows of a block. With fewer rows the whole weight would be read more often.
  static constexpr std::ptrdiff_t row_block_bytes = 4 << 20;
  // Enough that a thread the scheduler holds back leaves its share to the others.
  static constexpr std::ptrdiff_t units_per_thread = 4;
  static constexpr std::ptrdiff_t one = 1;

  static std::ptrdiff_t part(std::ptrdiff_t total, std::ptrdiff_t i, std::ptrdiff_t parts) { return total * i / parts; }

  std::ptrdiff_t m_, k_, row_step_, slice_k_, k_blocks_, block_k_, row_blocks_;
};

}  // namespace fastlinear
