// The driver: y = epilogue(x W^T). Cuts M x N (and K, by plan) into units, lets each thread take units from a counter,
// runs the kernel into a scratch tile, runs the epilogue on the tile and stores what is valid.
//
//   unit = (K slice, block of row tiles, group of panels)
//   for each K block of the slice:  for each row tile of the block:  kernel;  after the last K block: epilogue
//
// The panels of a group stay in L2 while the row tiles pass over them. Bits depend on the plan alone, never on which
// thread took what: every output is summed by one kernel in one order, and K slices are added in order.
#pragma once

#include <algorithm>
#include <array>
#include <atomic>

#include "fastlinear/epilogue.hpp"
#include "fastlinear/pack.hpp"
#include "fastlinear/parallel.hpp"
#include "fastlinear/rows.hpp"

namespace fastlinear {

struct Plan {
  const Kernel* kernel;
  std::ptrdiff_t threads, k_slices;
};

struct EpilogueProgram {
  static constexpr std::size_t kMaxSteps = 4;
  std::array<Step, kMaxSteps> steps;
  std::array<std::array<float, kMaxParams>, kMaxSteps> params;
  std::size_t count;  // at least one: "identity" adds the bias and stores
};

struct Problem {
  std::ptrdiff_t m, n, k;
  Rows x;
  const char* packed;  // in plan.kernel->layout
  const float* bias;   // n of them, or null
  float* y;
  std::ptrdiff_t stride_y;
  EpilogueProgram epilogue;
};

namespace gemm_detail {

// Bytes of a panel group's K block: half of the smallest L2 we meet (1 MB), so that it stays there beside the rows.
inline constexpr std::ptrdiff_t kPanelBlockBytes = 512 << 10;
// Bytes of A a block of row tiles may take: L2 to L3. Smaller blocks would read W more often.
inline constexpr std::ptrdiff_t kRowBlockBytes = 4 << 20;
// Units a thread: enough that a thread the scheduler holds back leaves its share to the others.
inline constexpr std::ptrdiff_t kUnitsPerThread = 4;

struct Grid {
  std::ptrdiff_t panel_stride;   // bytes
  std::ptrdiff_t groups;         // of kernel.panels panels
  std::ptrdiff_t row_tiles, row_blocks;
  std::ptrdiff_t slice_k, block_k;
  std::ptrdiff_t tile_floats;
  std::ptrdiff_t units, chunk;
};

// Part i of n, of `total` things split as evenly as whole things allow: 16 rows on a 14-row kernel are 8 + 8.
inline std::ptrdiff_t part(std::ptrdiff_t total, std::ptrdiff_t i, std::ptrdiff_t n) { return total * i / n; }

inline Grid make_grid(const Problem& p, const Plan& plan) {
  const Kernel& kernel = *plan.kernel;
  const std::ptrdiff_t element = sizeof(float);
  Grid g{};
  g.panel_stride = panel_elements(kernel.layout, p.k) * element;
  g.groups = ceil_div(ceil_div(p.n, kernel.layout.nr), kernel.panels);
  g.row_tiles = ceil_div(p.m, kernel.mr);
  g.slice_k = ceil_div(ceil_div(std::max<std::ptrdiff_t>(p.k, 1), plan.k_slices), kernel.layout.kr) * kernel.layout.kr;
  const std::ptrdiff_t blocks = ceil_div(g.slice_k * kernel.columns() * element, kPanelBlockBytes);
  g.block_k = ceil_div(g.slice_k, blocks);
  g.tile_floats = kernel.mr * kernel.columns();

  const std::ptrdiff_t tiles_in_block = std::max<std::ptrdiff_t>(1, kRowBlockBytes / (kernel.mr * std::max<std::ptrdiff_t>(p.k, 1) * element));
  g.row_blocks = ceil_div(g.row_tiles, tiles_in_block);
  if (plan.threads > 1) {
    const std::ptrdiff_t wanted = ceil_div(plan.threads * kUnitsPerThread, g.groups * plan.k_slices);
    g.row_blocks = std::min(g.row_tiles, std::max(g.row_blocks, wanted));
  }
  g.units = plan.k_slices * g.row_blocks * g.groups;
  g.chunk = plan.threads > 1 ? std::max<std::ptrdiff_t>(1, g.units / (plan.threads * kUnitsPerThread)) : g.units;
  return g;
}

struct Unit {
  std::ptrdiff_t slice, row_block, group;
};

inline Unit unit_at(const Grid& g, std::ptrdiff_t i) {
  return {i / (g.groups * g.row_blocks), i / g.groups % g.row_blocks, i % g.groups};
}

inline void finish_tile(const Problem& p, const Plan& plan, float* tile, std::ptrdiff_t row, std::ptrdiff_t rows,
                        std::ptrdiff_t group) {
  const std::ptrdiff_t columns = plan.kernel->columns(), column = group * columns;
  StepArgs s{tile, columns, tile, columns, rows, std::min(columns, p.n - column), nullptr, nullptr};
  for (std::size_t i = 0; i < p.epilogue.count; ++i) {
    s.bias = i == 0 && p.bias != nullptr ? p.bias + column : nullptr;
    s.params = p.epilogue.params[i].data();
    if (i + 1 == p.epilogue.count) {
      s.out = p.y + row * p.stride_y + column;
      s.ld_out = p.stride_y;
    }
    p.epilogue.steps[i](s);
  }
}

// Sums of one unit. `tiles` holds one tile for each row tile of the block; with one K block a single tile is enough,
// since it is finished before the next one starts. `finish(tile, row tile)` runs after the last K block.
template <class Finish>
void run_unit(const Problem& p, const Plan& plan, const Grid& g, const Unit& u, const Rows& x, std::ptrdiff_t first_row,
              float* tiles, bool keep_tiles, const Finish& finish) {
  const Kernel& kernel = *plan.kernel;
  const std::ptrdiff_t t0 = part(g.row_tiles, u.row_block, g.row_blocks);
  const std::ptrdiff_t t1 = part(g.row_tiles, u.row_block + 1, g.row_blocks);
  const std::ptrdiff_t panel = u.group * kernel.panels;
  const std::ptrdiff_t k_step_bytes = kernel.layout.nr * std::ptrdiff_t{sizeof(float)};
  const std::ptrdiff_t k0 = std::min(p.k, u.slice * g.slice_k), k1 = std::min(p.k, k0 + g.slice_k);
  const char* weights = p.packed + panel * g.panel_stride;

  TileArgs a{};
  a.lda = x.stride;
  a.panel_stride = g.panel_stride;
  a.panels = std::min(kernel.panels, ceil_div(p.n, kernel.layout.nr) - panel);
  std::ptrdiff_t k = k0;
  do {
    const std::ptrdiff_t k_end = std::min(k1, k + g.block_k);
    a.k = k_end - k;
    a.panel = weights + k * k_step_bytes;
    a.accumulate = k > k0;
    // What the kernel needs after this block, in shares of the row tiles: the next K block, or the next group.
    const char* next = k_end < k1 ? weights + k_end * k_step_bytes
                                  : p.packed + ((panel + kernel.panels) * g.panel_stride + k0 * k_step_bytes);
    const std::ptrdiff_t share = a.k * k_step_bytes * kernel.panels / (t1 - t0);
    a.prefetch_stride = a.k > 0 ? share / a.k : 0;
    for (std::ptrdiff_t t = t0; t < t1; ++t) {
      const std::ptrdiff_t row = part(p.m, t, g.row_tiles);
      a.rows = part(p.m, t + 1, g.row_tiles) - row;
      a.a = x.data + (row - first_row) * x.stride + k;
      a.tile = tiles + (keep_tiles ? (t - t0) * g.tile_floats : 0);
      a.prefetch = next + (t - t0) * share;
      kernel.run(a);
      if (k_end == k1) finish(static_cast<float*>(a.tile), t);
    }
    k = k_end;
  } while (k < k1);
}

struct ThreadScratch {
  Scratch rows, tiles;
};

inline ThreadScratch& thread_scratch() {
  thread_local ThreadScratch scratch;
  return scratch;
}

// Hands out [0, n) in chunks to plan.threads workers; work(begin, end) returns false when it ran out of memory.
template <class Work>
bool share_out(std::ptrdiff_t n, std::ptrdiff_t chunk, std::ptrdiff_t threads, const Work& work) {
  std::atomic<std::ptrdiff_t> next{0};
  std::atomic<bool> failed{false};
  thread_pool().run(std::min(threads, ceil_div(n, chunk)), [&](std::ptrdiff_t) {
    try {
      for (std::ptrdiff_t i = next.fetch_add(chunk); i < n; i = next.fetch_add(chunk)) work(i, std::min(n, i + chunk));
    } catch (const std::bad_alloc&) {
      failed = true;
    }
  });
  return !failed;
}

}  // namespace gemm_detail

// False when memory for the scratch tiles ran out; y is then undefined.
inline bool gemm(const Problem& p, const Plan& plan) {
  using namespace gemm_detail;
  if (p.m == 0 || p.n == 0) return true;
  const Grid g = make_grid(p, plan);
  const Kernel& kernel = *plan.kernel;

  // With K slices, the tiles of every slice are kept until the slices are added up.
  Scratch sliced;
  const std::ptrdiff_t slice_floats = g.row_tiles * g.groups * g.tile_floats;
  float* partial = nullptr;
  if (plan.k_slices > 1) {
    try {
      partial = sliced.floats(plan.k_slices * slice_floats);
    } catch (const std::bad_alloc&) {
      return false;
    }
  }

  const auto tiles_of = [&](const Unit& u) {
    const std::ptrdiff_t t0 = part(g.row_tiles, u.row_block, g.row_blocks);
    const std::ptrdiff_t count = part(g.row_tiles, u.row_block + 1, g.row_blocks) - t0;
    return partial + u.slice * slice_floats + (t0 * g.groups + u.group * count) * g.tile_floats;
  };

  const bool computed = share_out(g.units, g.chunk, plan.threads, [&](std::ptrdiff_t begin, std::ptrdiff_t end) {
    ThreadScratch& scratch = thread_scratch();
    Rows x{};
    std::ptrdiff_t prepared = -1, first_row = 0;
    for (std::ptrdiff_t i = begin; i < end; ++i) {
      const Unit u = unit_at(g, i);
      const std::ptrdiff_t t0 = part(g.row_tiles, u.row_block, g.row_blocks);
      const std::ptrdiff_t t1 = part(g.row_tiles, u.row_block + 1, g.row_blocks);
      if (u.row_block != prepared) {
        first_row = part(p.m, t0, g.row_tiles);
        const std::ptrdiff_t rows = part(p.m, t1, g.row_tiles) - first_row;
        x = prepare_rows({p.x.data + first_row * p.x.stride, p.x.stride}, rows, p.k, kernel.mr, scratch.rows);
        prepared = u.row_block;
      }
      if (partial != nullptr) {
        run_unit(p, plan, g, u, x, first_row, tiles_of(u), true, [](float*, std::ptrdiff_t) {});
      } else {
        const bool keep = g.block_k < p.k;
        float* tiles = scratch.tiles.floats((keep ? t1 - t0 : 1) * g.tile_floats);
        run_unit(p, plan, g, u, x, first_row, tiles, keep, [&](float* tile, std::ptrdiff_t t) {
          const std::ptrdiff_t row = part(p.m, t, g.row_tiles);
          finish_tile(p, plan, tile, row, part(p.m, t + 1, g.row_tiles) - row, u.group);
        });
      }
    }
  });
  if (!computed || partial == nullptr) return computed;

  return share_out(g.row_blocks * g.groups, 1, plan.threads, [&](std::ptrdiff_t begin, std::ptrdiff_t) {
    Unit u = unit_at(g, begin);
    const std::ptrdiff_t t0 = part(g.row_tiles, u.row_block, g.row_blocks);
    const std::ptrdiff_t t1 = part(g.row_tiles, u.row_block + 1, g.row_blocks);
    float* sum = tiles_of(u);
    for (u.slice = 1; u.slice < plan.k_slices; ++u.slice) {
      const float* other = tiles_of(u);
      for (std::ptrdiff_t j = 0; j < (t1 - t0) * g.tile_floats; ++j) sum[j] += other[j];
    }
    for (std::ptrdiff_t t = t0; t < t1; ++t) {
      const std::ptrdiff_t row = part(p.m, t, g.row_tiles);
      finish_tile(p, plan, sum + (t - t0) * g.tile_floats, row, part(p.m, t + 1, g.row_tiles) - row, u.group);
    }
  });
}

}  // namespace fastlinear
