// The driver: y = epilogue(x W^T), for one problem or many. The prologue makes of x what the kernel reads; then threads
// share the units of all grids: for each, the kernel fills a scratch tile and the epilogue, while the tile is in L1,
// stores what is valid of it.
//
// Bits depend on the plan alone, never on which thread took what: every output is summed by one kernel in one order,
// and K slices are added in order.
#pragma once

#include <algorithm>
#include <new>
#include <span>
#include <vector>

#include "fastlinear/driver/worker.hpp"
#include "fastlinear/host/parallel.hpp"

namespace fastlinear {

namespace gemm_detail {

// With less than this to make (about 10 us) a second thread is not worth waking.
inline constexpr std::ptrdiff_t kSerialElements = 64 << 10;

template <class Sum>
void add(std::byte* sums, const std::byte* others, std::ptrdiff_t count) {
  auto* const sum = reinterpret_cast<Sum*>(sums);
  const auto* const other = reinterpret_cast<const Sum*>(others);
  for (std::ptrdiff_t i = 0; i < count; ++i) sum[i] += other[i];
}

// Adds the K slices of unit u (slice 0) and finishes its tiles.
inline void add_slices(const Job& job, const Unit& u) {
  const Range tiles = job.grid.row_tiles_of(u);
  std::byte* sum = job.partial_tiles(u);
  const std::ptrdiff_t count = tiles.size() * job.tile_bytes() / Job::kSumBytes;
  for (std::ptrdiff_t slice = 1; slice < job.plan.k_slices; ++slice) {
    const std::byte* other = job.partial_tiles({slice, u.row_block, u.group});
    if (is_float(job.plan.kernel->accumulate))
      add<float>(sum, other, count);
    else
      add<std::uint32_t>(sum, other, count);
  }
  const Finish finish(job, u.group);
  for (std::ptrdiff_t t = tiles.begin; t < tiles.end; ++t)
    finish.tile(sum + (t - tiles.begin) * job.tile_bytes(), job.grid.rows_of(t));
}

// The biases in fp32, widened if need be into memory that the calling thread keeps.
inline void widen_biases(std::span<Job> jobs) {
  const auto is_wide = [](const Job& job) { return job.p.bias.data == nullptr || job.p.bias.format == kNumbers; };
  std::ptrdiff_t total = 0;
  for (Job& job : jobs)
    if (is_wide(job))
      job.bias = static_cast<const float*>(job.p.bias.data);
    else
      total += job.p.n;
  if (total == 0) return;
  thread_local Scratch memory;
  float* wide = memory.floats(total);
  for (Job& job : jobs) {
    if (is_wide(job)) continue;
    job.plan.vectors->conversions[static_cast<std::size_t>(job.p.bias.format)].widen(job.p.bias.data, wide, job.p.n);
    job.bias = wide;
    wide += job.p.n;
  }
}

// All rows that the jobs' kernels read, in memory that the calling thread keeps. False when memory ran out.
inline bool prepare(std::span<Job> jobs) {
  std::ptrdiff_t rows = 0, bytes = 0, elements = 0;
  for (Job& job : jobs) {
    job.first_row = rows;
    rows += job.prologue.rows();
    bytes += job.prologue.rows() * job.prologue.row_bytes();
    elements += job.prologue.rows() * job.p.k;
  }
  thread_local Scratch data, scales;
  char* to = rows == 0 ? nullptr : reinterpret_cast<char*>(data.bytes(bytes));
  auto* const row_scales =
      rows == 0 ? nullptr : reinterpret_cast<RowScale*>(scales.bytes(rows * std::ptrdiff_t{sizeof(RowScale)}));
  for (Job& job : jobs) {
    job.x = job.prologue.place(to, row_scales + job.first_row);
    to += job.prologue.rows() * job.prologue.row_bytes();
  }
  if (rows == 0) return true;
  return share_out(rows, elements < kSerialElements ? 1 : jobs[0].plan.threads, [&] {
    return [jobs, at = std::size_t{0}](std::ptrdiff_t i) mutable {
      while (i < jobs[at].first_row) --at;
      while (i >= jobs[at].first_row + jobs[at].prologue.rows()) ++at;
      jobs[at].prologue.make(i - jobs[at].first_row);
    };
  });
}

// All jobs at once, of one plan, whose rows are there. False when memory ran out. `chained`: a unit is made of each
// job, one after the other.
inline bool multiply_prepared(std::span<Job> jobs, bool chained = false) {
  const Plan& plan = jobs[0].plan;
  widen_biases(jobs);
  std::ptrdiff_t units = 0, partial = 0;
  for (Job& job : jobs) {
    job.first_unit = units;
    units += job.grid.units;
    partial += plan.k_slices * job.grid.row_tiles * job.grid.groups * job.tile_bytes();
  }
  if (chained)
    return share_out(jobs[0].grid.units, plan.threads, [&] {
      return [jobs, worker = Worker(jobs)](std::ptrdiff_t i) mutable {
        for (const Job& job : jobs) worker.run(job.first_unit + i);
      };
    });
  Scratch slices;
  if (plan.k_slices > 1) {
    std::byte* next = slices.bytes(partial);
    for (Job& job : jobs) {
      job.partial = next;
      next += plan.k_slices * job.grid.row_tiles * job.grid.groups * job.tile_bytes();
    }
  }
  const bool summed = share_out(units, plan.threads,
                                [&] { return [worker = Worker(jobs)](std::ptrdiff_t i) mutable { worker.run(i); }; });
  if (!summed || plan.k_slices == 1) return summed;
  return share_out(units / plan.k_slices, plan.threads, [&] {
    return [jobs, slices = plan.k_slices, at = std::size_t{0}](std::ptrdiff_t i) mutable {
      while (i * slices < jobs[at].first_unit) --at;
      while (i * slices >= jobs[at].first_unit + jobs[at].grid.units) ++at;
      add_slices(jobs[at], jobs[at].grid.unit(i - jobs[at].first_unit / slices));
    };
  });
}

inline bool multiply(std::span<Job> jobs) { return prepare(jobs) && multiply_prepared(jobs); }

// In how many parts the rows of a problem are made: of as many as stay in cache (L2 to L3). With fewer the whole weight
// would be read more often.
inline std::ptrdiff_t parts_of(const Job& whole) {
  const std::ptrdiff_t bytes = whole.prologue.rows() * whole.prologue.row_bytes();
  if (bytes <= whole.plan.blocks.prepared) return 1;
  return ceil_div(whole.p.m, std::max(whole.plan.blocks.prepared / whole.prologue.row_bytes(), whole.plan.kernel->mr));
}

inline Job part(const Job& whole, std::ptrdiff_t i, std::ptrdiff_t parts) {
  return {whole.p, whole.plan, {whole.p.m * i / parts, whole.p.m * (i + 1) / parts}};
}

}  // namespace gemm_detail

// False when memory for the scratch tiles ran out; y is then undefined.
inline bool gemm(const Problem& p, const Plan& plan) try {
  using namespace gemm_detail;
  if (p.m == 0 || p.n == 0) return true;
  Job whole(p, plan, {0, p.m});
  const std::ptrdiff_t parts = parts_of(whole);
  if (parts == 1) return multiply({&whole, 1});
  for (std::ptrdiff_t i = 0; i < parts; ++i) {
    Job job = part(whole, i, parts);
    if (!multiply({&job, 1})) return false;
  }
  return true;
} catch (const std::bad_alloc&) {
  return false;
}

// Problems of one plan and as many groups of K on the same rows of x, which are made for all at once. `chained`: the
// epilogue of each may read, where it writes, what the one before it makes; all have as many channels, and no K slices.
inline bool gemm_together(std::span<const Problem> problems, const Plan& plan, bool chained) try {
  using namespace gemm_detail;
  const std::ptrdiff_t m = problems[0].m;
  if (m == 0 || problems[0].n == 0) return true;
  const std::ptrdiff_t parts = parts_of({problems[0], plan, {0, m}});
  std::vector<Job> jobs;
  for (std::ptrdiff_t i = 0; i < parts; ++i) {
    jobs.clear();
    for (const Problem& p : problems) jobs.emplace_back(p, plan, Range{m * i / parts, m * (i + 1) / parts});
    if (!prepare({jobs.data(), 1})) return false;
    for (Job& job : jobs) job.x = jobs[0].x;
    if (!multiply_prepared(jobs, chained)) return false;
  }
  return true;
} catch (const std::bad_alloc&) {
  return false;
}

// Many problems of one plan, that no other product waits for: their units are shared out as if they were one.
inline bool gemm(std::span<const Problem> problems, const Plan& plan) try {
  using namespace gemm_detail;
  std::vector<Job> jobs;
  std::ptrdiff_t bytes = 0;
  const auto flush = [&] {
    const bool done = jobs.empty() || multiply(jobs);
    jobs.clear();
    bytes = 0;
    return done;
  };
  for (const Problem& p : problems) {
    if (p.m == 0 || p.n == 0) continue;
    const Job whole(p, plan, {0, p.m});
    const std::ptrdiff_t parts = parts_of(whole);
    for (std::ptrdiff_t i = 0; i < parts; ++i) {
      jobs.push_back(part(whole, i, parts));
      bytes += jobs.back().prologue.rows() * jobs.back().prologue.row_bytes();
      if (bytes >= plan.blocks.prepared && !flush()) return false;
    }
  }
  return flush();
} catch (const std::bad_alloc&) {
  return false;
}

}  // namespace fastlinear
