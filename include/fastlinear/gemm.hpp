// The driver: y = epilogue(x W^T). Threads share the units of the grid; for each, the kernel fills a scratch
// tile and the epilogue, while the tile is in L1, stores what is valid of it.
//
// Bits depend on the plan alone, never on which thread took what: every output is summed by one kernel in one order,
// and K slices are added in order.
#pragma once

#include <array>
#include <atomic>
#include <new>
#include <vector>

#include "fastlinear/epilogue.hpp"
#include "fastlinear/grid.hpp"
#include "fastlinear/parallel.hpp"
#include "fastlinear/rows.hpp"

namespace fastlinear {

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

struct Job {
  const Problem& p;
  const Plan& plan;
  Grid grid;
  float* partial;  // with K slices: the tiles of all units; otherwise null, tiles are finished where they are made

  std::ptrdiff_t tile_floats() const { return plan.kernel->mr * plan.kernel->columns(); }

  float* partial_tiles(const Unit& u) const {
    const Range tiles = grid.row_tiles_of(u);
    const std::ptrdiff_t before = (u.slice * grid.row_tiles + tiles.begin) * grid.groups + u.group * tiles.size();
    return partial + before * tile_floats();
  }
};

inline void finish_tile(const Job& job, float* tile, std::ptrdiff_t row_tile, std::ptrdiff_t group) {
  const Problem& p = job.p;
  const Range rows = job.grid.rows_of(row_tile);
  const std::ptrdiff_t columns = job.plan.kernel->columns(), column = group * columns;
  StepArgs s{tile, columns, tile, columns, rows.size(), std::min(columns, p.n - column), nullptr, nullptr};
  for (std::size_t i = 0; i < p.epilogue.count; ++i) {
    s.bias = i == 0 && p.bias != nullptr ? p.bias + column : nullptr;
    s.params = p.epilogue.params[i].data();
    if (i + 1 == p.epilogue.count) {
      s.out = p.y + rows.begin * p.stride_y + column;
      s.ld_out = p.stride_y;
    }
    p.epilogue.steps[i](s);
  }
}

// With more rows than this there is time between two lines of the panel to fetch a third.
inline constexpr std::ptrdiff_t kStreamingRows = 6;

// What one thread needs to work on units of a job.
class Worker {
 public:
  explicit Worker(const Job& job) : job_(job) {}

  void run(const Unit& u) {
    const Range tiles = job_.grid.row_tiles_of(u);
    if (u.row_block != row_block_) {
      const Problem& p = job_.p;
      first_row_ = job_.grid.rows_of(tiles.begin).begin;
      const std::ptrdiff_t rows = job_.grid.rows_of(tiles.end - 1).end - first_row_;
      x_ = prepare_rows({p.x.data + first_row_ * p.x.stride, p.x.stride}, rows, p.k, job_.plan.kernel->mr, rows_);
      row_block_ = u.row_block;
    }
    const bool sliced = job_.partial != nullptr, keep = sliced || !job_.grid.one_k_block();
    sum(u, tiles, sliced ? job_.partial_tiles(u) : tiles_.floats((keep ? tiles.size() : 1) * job_.tile_floats()), keep);
  }

 private:
  // The sums of a unit, tile by tile in `memory`: one after the other if `keep`, else all in the same place, since with
  // one K block a tile is finished before the next is begun.
  void sum(const Unit& u, const Range& tiles, float* memory, bool keep) const {
    const Problem& p = job_.p;
    const Kernel& kernel = *job_.plan.kernel;
    const std::ptrdiff_t k_bytes = kernel.layout.nr * std::ptrdiff_t{sizeof(float)};  // of one k step in one panel
    const std::ptrdiff_t panel_bytes = panel_elements(kernel.layout, p.k) * std::ptrdiff_t{sizeof(float)};
    const std::ptrdiff_t panel = u.group * kernel.panels;
    const char* weights = p.packed + panel * panel_bytes;
    const Range slice = job_.grid.slice_of(u);

    TileArgs a{};
    a.lda = x_.stride;
    a.panel_stride = panel_bytes;
    a.panels = std::min(kernel.panels, ceil_div(p.n, kernel.layout.nr) - panel);
    for (Range block = job_.grid.block_at(slice, slice.begin);; block = job_.grid.block_at(slice, block.end)) {
      a.k = block.size();
      a.panel = weights + block.begin * k_bytes;
      a.accumulate = block.begin > slice.begin;
      // Each row tile brings its share of what comes next into L2: the next K block, or the next group. A single tile
      // of few rows only streams, and the hardware's own prefetcher does that better.
      const bool last = block.end == slice.end, prefetches = tiles.size() > 1 || p.m > kStreamingRows;
      const char* next =
          last ? weights + kernel.panels * panel_bytes + slice.begin * k_bytes : weights + block.end * k_bytes;
      a.prefetch_stride = prefetches ? k_bytes * kernel.panels / tiles.size() : 0;
      for (std::ptrdiff_t t = tiles.begin; t < tiles.end; ++t) {
        const Range rows = job_.grid.rows_of(t);
        float* tile = memory + (keep ? t - tiles.begin : 0) * job_.tile_floats();
        a.rows = rows.size();
        a.a = x_.data + (rows.begin - first_row_) * x_.stride + block.begin;
        a.tile = tile;
        a.prefetch = prefetches ? next + (t - tiles.begin) * a.k * a.prefetch_stride : static_cast<const char*>(a.a);
        kernel.run(a);
        if (last && job_.partial == nullptr) finish_tile(job_, tile, t, u.group);
      }
      if (last) break;
    }
  }

  // Kept from call to call, one for each thread.
  static Scratch& scratch(std::size_t which) {
    thread_local Scratch memory[2];
    return memory[which];
  }

  const Job& job_;
  Scratch &rows_ = scratch(0), &tiles_ = scratch(1);
  std::ptrdiff_t row_block_ = -1, first_row_ = 0;  // what x_ holds
  Rows x_{};
};

// Adds the K slices of unit u (slice 0) and finishes its tiles.
inline void add_slices(const Job& job, const Unit& u) {
  const Range tiles = job.grid.row_tiles_of(u);
  float* sum = job.partial_tiles(u);
  for (std::ptrdiff_t slice = 1; slice < job.plan.k_slices; ++slice) {
    const float* other = job.partial_tiles({slice, u.row_block, u.group});
    for (std::ptrdiff_t i = 0; i < tiles.size() * job.tile_floats(); ++i) sum[i] += other[i];
  }
  for (std::ptrdiff_t t = tiles.begin; t < tiles.end; ++t)
    finish_tile(job, sum + (t - tiles.begin) * job.tile_floats(), t, u.group);
}

// Gives each thread a share of n things in a row, so that it prefetches what it will use itself and meets the same
// panels in its L2 at the next call; whoever is done with its own share takes from the others'. make() is called once a
// thread and gives what does one thing. False, or std::bad_alloc, when memory ran out.
template <class Make>
bool share_out(std::ptrdiff_t n, std::ptrdiff_t threads, const Make& make) {
  struct alignas(64) Share {
    std::atomic<std::ptrdiff_t> next;
    std::ptrdiff_t end;
  };
  const std::ptrdiff_t workers = std::min(threads, n);
  if (workers == 1) {
    auto work = make();
    for (std::ptrdiff_t i = 0; i < n; ++i) work(i);
    return true;
  }
  std::atomic<bool> failed{false};
  std::vector<Share> shares(static_cast<std::size_t>(workers));
  for (std::ptrdiff_t w = 0; w < workers; ++w) {
    shares[static_cast<std::size_t>(w)].next = n * w / workers;
    shares[static_cast<std::size_t>(w)].end = n * (w + 1) / workers;
  }
  thread_pool().run(workers, [&](std::ptrdiff_t me) {
    try {
      auto work = make();
      for (std::ptrdiff_t w = 0; w < workers; ++w) {
        Share& share = shares[static_cast<std::size_t>((me + w) % workers)];
        for (std::ptrdiff_t i = share.next++; i < share.end; i = share.next++) work(i);
      }
    } catch (const std::bad_alloc&) {
      failed = true;
    }
  });
  return !failed;
}

}  // namespace gemm_detail

// False when memory for the scratch tiles ran out; y is then undefined.
inline bool gemm(const Problem& p, const Plan& plan) try {
  using namespace gemm_detail;
  if (p.m == 0 || p.n == 0) return true;
  Job job{p, plan, Grid(plan, p.m, p.n, p.k), nullptr};
  Scratch slices;
  if (plan.k_slices > 1)
    job.partial = slices.floats(plan.k_slices * job.grid.row_tiles * job.grid.groups * job.tile_floats());

  const bool summed = share_out(job.grid.units, plan.threads, [&] {
    return [&job, worker = Worker(job)](std::ptrdiff_t i) mutable { worker.run(job.grid.unit(i)); };
  });
  if (!summed || job.partial == nullptr) return summed;
  return share_out(job.grid.units / plan.k_slices, plan.threads,
                   [&] { return [&job](std::ptrdiff_t i) { add_slices(job, job.grid.unit(i)); }; });
} catch (const std::bad_alloc&) {
  return false;
}

}  // namespace fastlinear
