// One problem, or some rows of one, as the threads of a call see it.
#pragma once

#include <cstddef>

#include "fastlinear/driver/grid.hpp"
#include "fastlinear/driver/problem.hpp"
#include "fastlinear/driver/prologue.hpp"

namespace fastlinear {

struct Job {
  const Problem& p;
  const Plan& plan;
  Range part;  // of the problem's rows; all other rows below are counted from its begin
  Grid grid;
  Prologue prologue;
  PreparedRows x{};
  const float* bias = nullptr;    // n of them, or null
  std::ptrdiff_t panel_bytes;     // from one packed panel to the next
  std::ptrdiff_t group_bytes;     // of the packed panels of a group, for one step of kr k
  bool converted;                 // panels are not read as they are packed
  std::ptrdiff_t first_unit = 0;  // of those of all jobs
  std::ptrdiff_t first_row = 0;   // of those that all prologues make
  std::byte* partial = nullptr;   // with K slices: the tiles of all units; else tiles are finished where they are made

  Job(const Problem& problem, const Plan& how, const Range& rows)
      : p(problem),
        plan(how),
        part(rows),
        grid(how, problem.weight.layout, rows.size(), problem.n, problem.k),
        prologue(problem, how, rows),
        panel_bytes(panel_offset(problem.weight.layout, problem.k)),
        group_bytes(fastlinear::group_bytes(problem.weight.layout) * how.kernel->layout.kr / problem.weight.layout.kr *
                    how.kernel->columns() / problem.weight.layout.nr),
        converted(problem.weight.layout != how.kernel->layout) {}

  // Sums are fp32 or int32.
  static constexpr std::ptrdiff_t kSumBytes = 4;
  std::ptrdiff_t tile_bytes() const { return plan.kernel->mr * plan.kernel->columns() * kSumBytes; }

  std::byte* partial_tiles(const Unit& u) const {
    const Range tiles = grid.row_tiles_of(u);
    const std::ptrdiff_t before = (u.slice * grid.row_tiles + tiles.begin) * grid.groups + u.group * tiles.size();
    return partial + before * tile_bytes();
  }
};

}  // namespace fastlinear
