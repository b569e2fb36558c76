// How a product M x N x K is cut: pure arithmetic, no memory, no threads.
//
//   unit = (K slice, block of row tiles, group of panels): what one thread takes at a time
//
// The panels of a group stay in L2 while the row tiles of the block pass over them, one K block after the other.
#pragma once

#include <algorithm>

#include "fastlinear/contract/arith.hpp"
#include "fastlinear/driver/plan.hpp"

namespace fastlinear {

struct Range {
  std::ptrdiff_t begin, end;
  std::ptrdiff_t size() const { return end - begin; }
};

struct Unit {
  std::ptrdiff_t slice, row_block, group;
};

class Grid {
 public:
  // K is cut between groups of the packed weight, groups of the kernel and its steps, whichever are longest.
  Grid(const Plan& plan, const Layout& packed, std::ptrdiff_t m, std::ptrdiff_t n, std::ptrdiff_t k)
      : m_(m), k_(k), row_step_(plan.kernel->row_step), row_steps_(ceil_div(m, row_step_)) {
    const Kernel& kernel = *plan.kernel;
    const std::ptrdiff_t row_tile_bytes = kernel.mr * std::max(k, one) * element_bytes(kernel.rows);
    const std::ptrdiff_t group_bytes = kernel.panels * panel_offset(kernel.layout, 1);  // of kr consecutive k
    const std::ptrdiff_t step = std::max({fastlinear::k_step(packed), kernel.layout.kr, kernel.k_step});
    groups = ceil_div(ceil_div(n, kernel.layout.nr), kernel.panels);
    row_tiles = ceil_div(row_steps_, kernel.mr / row_step_);

    slice_k_ = round_up(ceil_div(std::max(k, one), plan.k_slices), step);
    k_blocks_ = ceil_div(slice_k_ / kernel.layout.kr * group_bytes, plan.blocks.panels);
    block_k_ = round_up(ceil_div(slice_k_, k_blocks_), step);

    const std::ptrdiff_t wanted = plan.threads > 1 ? plan.threads * units_per_thread : 1;
    row_blocks_ = ceil_div(row_tiles, std::max(ceil_div(least_rows, kernel.mr), plan.blocks.rows / row_tile_bytes));
    row_blocks_ = std::min(row_tiles, std::max(row_blocks_, ceil_div(wanted, groups * plan.k_slices)));
    if (plan.threads > 1) row_blocks_ = balanced(row_blocks_, plan.threads, plan.k_slices);
    units = plan.k_slices * row_blocks_ * groups;
  }

  // Neighbors share their rows and read adjacent panels.
  Unit unit(std::ptrdiff_t i) const { return {i / (groups * row_blocks_), i / groups % row_blocks_, i % groups}; }
  Range row_tiles_of(const Unit& u) const {
    return {part(row_tiles, u.row_block, row_blocks_), part(row_tiles, u.row_block + 1, row_blocks_)};
  }
  // Rows of one tile: tiles differ by one step at most, since 16 rows on a 14-row kernel run faster as 8 + 8.
  Range rows_of(std::ptrdiff_t row_tile) const {
    return {part(row_steps_, row_tile, row_tiles) * row_step_,
            std::min(m_, part(row_steps_, row_tile + 1, row_tiles) * row_step_)};
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
  // Enough that a thread the scheduler holds back leaves its share to the others.
  static constexpr std::ptrdiff_t units_per_thread = 4;
  // For each block of rows the whole weight is read: with so many rows, memory keeps up with the multiplications.
  static constexpr std::ptrdiff_t least_rows = 128;
  static constexpr std::ptrdiff_t one = 1;

  // At least `least` blocks of rows: so few that the thread with the most to do has at most a tenth more than the mean;
  // or those with which it has least. Tried is what makes the longest block shorter, down to single tiles.
  std::ptrdiff_t balanced(std::ptrdiff_t least, std::ptrdiff_t threads, std::ptrdiff_t slices) const {
    constexpr int kTries = 32;
    const std::ptrdiff_t tiles = row_tiles * groups * slices;
    std::ptrdiff_t best = least, best_most = 0;
    for (std::ptrdiff_t blocks = least, tries = 0; tries < kTries; ++tries) {
      const std::ptrdiff_t longest = ceil_div(row_tiles, blocks);
      const std::ptrdiff_t most = ceil_div(blocks * groups * slices, threads) * longest;
      if (best_most == 0 || most < best_most) best = blocks, best_most = most;
      if (longest == 1 || 10 * most * threads <= 11 * tiles) break;
      blocks = ceil_div(row_tiles, longest - 1);
    }
    return best;
  }

  static std::ptrdiff_t part(std::ptrdiff_t total, std::ptrdiff_t i, std::ptrdiff_t parts) { return total * i / parts; }

  std::ptrdiff_t m_, k_, row_step_, row_steps_, slice_k_, k_blocks_, block_k_, row_blocks_;
};

}  // namespace fastlinear
