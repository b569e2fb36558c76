// Who computes what of a product, by the code that cuts it and hands the units out, without computing anything: so that
// machines with more cores than are at hand can be looked at.
#pragma once

#include <algorithm>
#include <cstddef>
#include <vector>

#include "fastlinear/driver/gemm.hpp"

namespace fastlinear {

// A unit and the thread whose share it is in; rows and columns of y, and k. `part`: those of one part are done before
// the next is begun.
struct Piece {
  std::ptrdiff_t part, thread;
  Range rows, columns, k;
};

inline std::vector<Piece> cut(const Problem& p, const Plan& plan) {
  using namespace gemm_detail;
  std::vector<Piece> pieces;
  const Job whole(p, plan, {0, p.m});
  const std::ptrdiff_t parts = parts_of(whole), columns = plan.kernel->columns();
  for (std::ptrdiff_t i = 0; i < parts; ++i) {
    const Job job = part(whole, i, parts);
    const std::ptrdiff_t units = job.grid.units, workers = std::min(plan.threads, units);
    for (std::ptrdiff_t thread = 0; thread < workers; ++thread)
      for (std::ptrdiff_t at = share_begin(units, thread, workers); at < share_begin(units, thread + 1, workers);
           ++at) {
        const Unit u = job.grid.unit(at);
        const Range tiles = job.grid.row_tiles_of(u);
        pieces.push_back({i,
                          thread,
                          {job.part.begin + job.grid.rows_of(tiles.begin).begin,
                           job.part.begin + job.grid.rows_of(tiles.end - 1).end},
                          {u.group * columns, std::min(p.n, (u.group + 1) * columns)},
                          job.grid.slice_of(u)});
      }
  }
  return pieces;
}

}  // namespace fastlinear
