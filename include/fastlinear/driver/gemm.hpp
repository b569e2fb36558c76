// The driver: y = epilogue(x W^T). Threads share the units of the grid; for each, the kernel fills a scratch
// tile and the epilogue, while the tile is in L1, stores what is valid of it.
//
// Bits depend on the plan alone, never on which thread took what: every output is summed by one kernel in one order,
// and K slices are added in order.
#pragma once

#include <algorithm>
#include <new>

#include "fastlinear/contract/isa.hpp"
#include "fastlinear/driver/finish.hpp"
#include "fastlinear/driver/grid.hpp"
#include "fastlinear/driver/integer_rows.hpp"
#include "fastlinear/driver/problem.hpp"
#include "fastlinear/driver/rows.hpp"
#include "fastlinear/host/parallel.hpp"

namespace fastlinear {

namespace gemm_detail {

// With more rows than this, or with bytes that are widened to fp32, there is time between two lines of the panel to
// fetch a third. Otherwise a single tile only streams, and the hardware's own prefetcher does that better.
inline constexpr std::ptrdiff_t kStreamingRows = 6;

// A kernel's session, if it has one: entered and left by the thread that has this.
class OpenSession {
 public:
  explicit OpenSession(const Session* session) : session_(session) {
    if (session_ != nullptr) session_->enter(memory_);
  }
  OpenSession(const OpenSession&) = delete;
  OpenSession& operator=(const OpenSession&) = delete;
  ~OpenSession() {
    if (session_ != nullptr) session_->leave(memory_);
  }

 private:
  const Session* session_;
  alignas(kSessionBytes) char memory_[kSessionBytes];
};

// What one thread needs to work on units of a job.
class Worker {
 public:
  explicit Worker(const Job& job) : job_(job), session_(job.plan.kernel->session) {}

  void run(const Unit& u) {
    const Range tiles = job_.grid.row_tiles_of(u);
    if (u.row_block != row_block_) {
      const Problem& p = job_.p;
      first_row_ = job_.grid.rows_of(tiles.begin).begin;
      const std::ptrdiff_t rows = job_.grid.rows_of(tiles.end - 1).end - first_row_;
      x_ = prepare_rows({p.x.at(first_row_, 0), p.x.stride, p.x.format, p.x.filled}, rows, p.k, *job_.plan.kernel,
                        job_.vectors.conversions[static_cast<std::size_t>(p.x.format)], rows_);
      row_block_ = u.row_block;
    }
    const bool sliced = job_.partial != nullptr, keep = sliced || !job_.grid.one_k_block();
    sum(u, tiles, sliced ? job_.partial_tiles(u) : tiles_.floats((keep ? tiles.size() : 1) * job_.tile_floats()), keep);
  }

 private:
  // The sums of a unit, tile by tile in `memory`: one after the other if `keep`, else all in the same place, since with
  // one K block a tile is finished before the next is begun.
  void sum(const Unit& u, const Range& tiles, float* memory, bool keep) {
    const Problem& p = job_.p;
    const Kernel& kernel = *job_.plan.kernel;
    const Layout& packed = p.weight.layout;
    const std::ptrdiff_t k_bytes = packed.nr * element_bytes(packed.format);  // of one k in one panel
    const std::ptrdiff_t panel_bytes = p.weight.panel_bytes(p.k);
    const std::ptrdiff_t panel = u.group * kernel.panels;
    const char* weights = p.weight.panels + panel * panel_bytes;
    const Range slice = job_.grid.slice_of(u);

    TileArgs a{};
    a.lda = x_.stride;
    a.panels = std::min(kernel.panels, ceil_div(p.n, packed.nr) - panel);
    for (Range block = job_.grid.block_at(slice, slice.begin);; block = job_.grid.block_at(slice, block.end)) {
      a.k = block.size();
      a.accumulate = block.begin > slice.begin;
      set_panels(a, weights + block.begin * k_bytes, panel_bytes);
      // Each row tile brings its share of what comes next into L2: the next K block, or the next group.
      const bool last = block.end == slice.end;
      const bool prefetches = tiles.size() > 1 || p.m > kStreamingRows || packed.format == Format::int8wo;
      const char* next =
          last ? weights + kernel.panels * panel_bytes + slice.begin * k_bytes : weights + block.end * k_bytes;
      const std::ptrdiff_t groups = ceil_div(a.k, kernel.layout.kr);
      a.prefetch_stride = prefetches ? k_bytes * kernel.layout.kr * kernel.panels / tiles.size() : 0;
      for (std::ptrdiff_t t = tiles.begin; t < tiles.end; ++t) {
        const Range rows = job_.grid.rows_of(t);
        float* tile = memory + (keep ? t - tiles.begin : 0) * job_.tile_floats();
        a.rows = rows.size();
        a.a = x_.at(rows.begin - first_row_, block.begin);
        a.tile = tile;
        a.prefetch = prefetches ? next + (t - tiles.begin) * groups * a.prefetch_stride : static_cast<const char*>(a.a);
        kernel.run(a);
        if (last && job_.partial == nullptr) finish_tile(job_, tile, t, u.group);
      }
      if (last) break;
    }
  }

  // The panels at `packed`, panel_bytes apart: as they are, or in the format that the kernel reads, if that is another.
  // Widening costs one load, one instruction and one store a vector, once for all row tiles, and the copy stays in L2.
  void set_panels(TileArgs& a, const char* packed, std::ptrdiff_t panel_bytes) {
    const Layout &layout = job_.p.weight.layout, &read = job_.plan.kernel->layout;
    a.panel = packed;
    a.panel_stride = panel_bytes;
    if (layout == read) return;
    const Conversion& conversion = job_.vectors.conversions[static_cast<std::size_t>(layout.format)];
    const auto convert = read.format == Format::fp32 ? conversion.widen_panel : conversion.pair_panel;
    const std::ptrdiff_t bytes = ceil_div(a.k, read.kr) * read.kr * read.nr * element_bytes(read.format);
    auto* const copies = static_cast<char*>(wide_.bytes(a.panels * bytes));
    for (std::ptrdiff_t i = 0; i < a.panels; ++i) convert(packed + i * panel_bytes, read.nr, a.k, copies + i * bytes);
    a.panel = copies;
    a.panel_stride = bytes;
  }

  // Kept from call to call, one for each thread.
  static Scratch& scratch(std::size_t which) {
    thread_local Scratch memory[3];
    return memory[which];
  }

  const Job& job_;
  OpenSession session_;
  Scratch &rows_ = scratch(0), &tiles_ = scratch(1), &wide_ = scratch(2);
  std::ptrdiff_t row_block_ = -1, first_row_ = 0;  // what x_ holds
  Rows x_{};
};

inline void add(Format sums, float* sum, const float* other, std::ptrdiff_t count) {
  if (sums != Format::int32) {
    for (std::ptrdiff_t i = 0; i < count; ++i) sum[i] += other[i];
    return;
  }
  for (std::ptrdiff_t i = 0; i < count; ++i)
    sum[i] = __builtin_bit_cast(
        float, __builtin_bit_cast(std::uint32_t, sum[i]) + __builtin_bit_cast(std::uint32_t, other[i]));
}

// Adds the K slices of unit u (slice 0) and finishes its tiles.
inline void add_slices(const Job& job, const Unit& u) {
  const Range tiles = job.grid.row_tiles_of(u);
  float* sum = job.partial_tiles(u);
  for (std::ptrdiff_t slice = 1; slice < job.plan.k_slices; ++slice) {
    const float* other = job.partial_tiles({slice, u.row_block, u.group});
    add(job.plan.kernel->accumulate, sum, other, tiles.size() * job.tile_floats());
  }
  for (std::ptrdiff_t t = tiles.begin; t < tiles.end; ++t)
    finish_tile(job, sum + (t - tiles.begin) * job.tile_floats(), t, u.group);
}

// The bias in fp32, widened if need be into memory that the calling thread keeps.
inline const float* wide_bias(const Problem& p, const Conversion* conversions) {
  if (p.bias.data == nullptr || p.bias.format == Format::fp32) return static_cast<const float*>(p.bias.data);
  thread_local Scratch memory;
  float* wide = memory.floats(p.n);
  conversions[static_cast<std::size_t>(p.bias.format)].widen(p.bias.data, wide, p.n);
  return wide;
}

inline bool multiply(const Problem& p, const Plan& plan, const RowScale* row_scales) {
  const Vectors& vectors = *plan.vectors;
  const Grid grid(plan, p.weight.layout.kr, p.m, p.n, p.k);
  const std::size_t first = p.epilogue.steps[0].function;
  const std::size_t absorbed = first == kRelu || first == kIdentity;
  const float floor = first == kRelu ? 0.0f : -kInfinity;
  Job job{p, plan, vectors, wide_bias(p, vectors.conversions), row_scales, absorbed, floor, grid, nullptr};
  Scratch slices;
  if (plan.k_slices > 1)
    job.partial = slices.floats(plan.k_slices * job.grid.row_tiles * job.grid.groups * job.tile_floats());

  const bool summed = share_out(job.grid.units, plan.threads, [&] {
    return [&job, worker = Worker(job)](std::ptrdiff_t i) mutable { worker.run(job.grid.unit(i)); };
  });
  if (!summed || job.partial == nullptr) return summed;
  return share_out(job.grid.units / plan.k_slices, plan.threads,
                   [&] { return [&job](std::ptrdiff_t i) { add_slices(job, job.grid.unit(i)); }; });
}

// As many rows at a time as stay in cache (L2 to L3) once they are integers. With fewer the whole weight would be read
// more often.
inline bool multiply_integers(const Problem& p, const Plan& plan) {
  constexpr std::ptrdiff_t kBlockBytes = 4 << 20;
  const Kernel& kernel = *plan.kernel;
  const std::ptrdiff_t fit = kBlockBytes / (scratch_stride(p.k, kernel) * element_bytes(kernel.rows));
  const std::ptrdiff_t blocks = ceil_div(p.m, std::max(fit, kernel.mr));
  for (std::ptrdiff_t b = 0; b < blocks; ++b) {
    const Range rows{p.m * b / blocks, p.m * (b + 1) / blocks};
    Problem part = p;
    part.m = rows.size();
    part.x.data = p.x.at(rows.begin, 0);
    part.y.data += rows.begin * p.y.stride * element_bytes(p.y.format);
    part.first_row = rows.begin;
    const IntegerRows x =
        quantize_rows(part.x, part.m, p.k, kernel, *plan.vectors, p.quantizer, p.weight.zeros != nullptr, plan.threads);
    part.x = x.rows;
    if (!multiply(part, plan, x.scales)) return false;
  }
  return true;
}

}  // namespace gemm_detail

// False when memory for the scratch tiles ran out; y is then undefined.
inline bool gemm(const Problem& p, const Plan& plan) try {
  if (p.m == 0 || p.n == 0) return true;
  if (plan.kernel->accumulate == Format::int32) return gemm_detail::multiply_integers(p, plan);
  return gemm_detail::multiply(p, plan, nullptr);
} catch (const std::bad_alloc&) {
  return false;
}

}  // namespace fastlinear
