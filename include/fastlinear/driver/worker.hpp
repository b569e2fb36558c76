// What one thread does in a call: units of the grids, each tile by tile.
#pragma once

#include <algorithm>
#include <cstring>
#include <span>

#include "fastlinear/driver/finish.hpp"

namespace fastlinear {

class Worker {
 public:
  explicit Worker(std::span<const Job> jobs) : jobs_(jobs), session_(jobs[0].plan.kernel->session) {
    if (session_ != nullptr) session_->enter(state_);
  }
  ~Worker() {
    if (session_ != nullptr) session_->leave(state_);
  }
  Worker(const Worker&) = delete;
  Worker& operator=(const Worker&) = delete;

  // Unit i of all jobs; one thread's follow one another, mostly.
  void run(std::ptrdiff_t i) {
    while (i < jobs_[job_].first_unit) --job_;
    while (i >= jobs_[job_].first_unit + jobs_[job_].grid.units) ++job_;
    const Job& job = jobs_[job_];
    const Unit u = job.grid.unit(i - job.first_unit);
    const Range tiles = job.grid.row_tiles_of(u);
    const bool sliced = job.partial != nullptr, keep = sliced || !job.grid.one_k_block();
    std::byte* memory =
        sliced ? job.partial_tiles(u) : tiles_.bytes((keep ? tiles.size() : kPlaces) * job.tile_bytes());
    sum(job, u, tiles, memory, keep);
  }

 private:
  // With more rows than this, or with bytes that are widened to fp32, there is time between two lines of the panel to
  // fetch a third. Otherwise a single tile only streams, and the hardware's own prefetcher does that better.
  static constexpr std::ptrdiff_t kStreamingRows = 6;

  // With one K block, tiles take turns in so many places: one is finished while the sums of the next are under way.
  static constexpr std::ptrdiff_t kPlaces = 2;

  // The sums of a unit, tile by tile in `memory`: one after the other if `keep`, else in turns. A tile is finished when
  // the next has been begun, not before: the end of a tile waits for its last sums, and by then there are others to go
  // on with, for which the tile unit of AMX is free.
  void sum(const Job& job, const Unit& u, const Range& tiles, std::byte* memory, bool keep) {
    const Problem& p = job.p;
    const Kernel& kernel = *job.plan.kernel;
    const Layout& packed = p.weight.layout;
    const std::ptrdiff_t channel = u.group * kernel.columns(), panel = channel / packed.nr;
    const char* weights = p.weight.panels + panel * job.panel_bytes;
    const Range slice = job.grid.slice_of(u);
    const bool slow = info(packed.format).bits <= 8 && job.plan.form == nullptr;
    const bool prefetches = tiles.size() > 1 || job.part.size() > kStreamingRows || slow;

    const bool finishes = job.partial == nullptr;
    const Finish finish(job, u.group);
    const std::ptrdiff_t tile_bytes = job.tile_bytes();
    const auto place = [&](std::ptrdiff_t t) {
      return memory + (keep ? t - tiles.begin : (t - tiles.begin) % kPlaces) * tile_bytes;
    };
    // Rows that no unit of this thread's has passed over are beyond L2, and too many side by side to be foreseen.
    const bool fresh = prefetches && job.x.rows.index == nullptr && (block_ != u.row_block || block_of_ != &job);
    block_ = u.row_block, block_of_ = &job;
    TileArgs a{};
    a.lda = job.x.rows.stride;
    a.panels = std::min(kernel.panels, ceil_div(p.n - channel, kernel.layout.nr));
    for (Range block = job.grid.block_at(slice, slice.begin);; block = job.grid.block_at(slice, block.end)) {
      a.k = block.size();
      a.accumulate = block.begin > slice.begin;
      a.panel = weights + panel_offset(packed, block.begin);
      a.panel_stride = job.panel_bytes;
      const ScaledGroups groups_here = expanded(job, p.weight.groups.at(packed, panel, block.begin), a);
      a.groups = &groups_here;
      if (job.converted) convert_panels(job, channel, a);
      // Each row tile brings its share of what comes next into L2: the next K block, or the next group.
      const bool last = block.end == slice.end;
      const char* next =
          last ? weights + kernel.columns() / packed.nr * job.panel_bytes + panel_offset(packed, slice.begin)
               : weights + panel_offset(packed, block.end);
      const std::ptrdiff_t groups = round_up(a.k, kernel.layout.kr) / kernel.layout.kr;
      a.prefetch_stride = prefetches ? job.group_bytes / tiles.size() : 0;
      Range rows{}, before{};  // of the tile at hand and of the last one
      for (std::ptrdiff_t t = tiles.begin; t < tiles.end; ++t) {
        before = rows, rows = job.grid.rows_of(t);
        std::byte* const tile = place(t);
        a.rows = rows.size();
        a.a = job.x.rows.at(rows.begin, block.begin);
        if (job.x.groups.scales != nullptr)
          a.row_groups = job.x.groups.at(a.lda, rows.begin, block.begin / p.weight.groups.size);
        a.tile = tile;
        a.prefetch = prefetches ? next + (t - tiles.begin) * groups * a.prefetch_stride : static_cast<const char*>(a.a);
        a.beside_stride = 0;
        if (fresh && groups > 0 && t + 1 < tiles.end) {
          a.beside = job.x.rows.at(rows.end, block.begin);
          a.beside_stride = rows.size() * a.lda * element_bytes(job.x.rows.format) / groups;
        }
        a.lines = last && finishes ? finish.lines(rows) : Lines{};
        kernel.run(a);
        if (last && finishes && t > tiles.begin) finish.tile(place(t - 1), before);
      }
      if (last && finishes) finish.tile(place(tiles.end - 1), rows);
      if (last) break;
    }
  }

  // Scales and offsets that kernels do not read, as fp32, once for all row tiles.
  ScaledGroups expanded(const Job& job, ScaledGroups groups, const TileArgs& a) {
    if (groups.size == 0 || is_read(groups.format)) return groups;
    const std::ptrdiff_t nr = job.p.weight.layout.nr, count = ceil_div(a.k, groups.size);
    const std::ptrdiff_t panels = ceil_div(a.panels * job.plan.kernel->layout.nr, nr);
    float* out = scales_.floats(2 * panels * count * nr);
    const auto expand = [&](const char* from) {
      const auto* const begin = reinterpret_cast<const char*>(out);
      for (std::ptrdiff_t i = 0; i < panels; ++i, out += count * nr)
        job.plan.vectors->expand_scales(groups, from + i * groups.panel_stride, count, nr, out);
      return begin;
    };
    ScaledGroups made = groups;
    made.scales = expand(groups.scales);
    if (groups.offsets != nullptr) made.offsets = expand(groups.offsets);
    made.format = Format::fp32;
    made.panel_stride = count * nr * element_bytes(Format::fp32);
    return made;
  }

  // Panels in the format that the kernel reads, where they are packed in another. It costs one load, one instruction
  // and one store a vector, once for all row tiles, and the copy stays in L2.
  void convert_panels(const Job& job, std::ptrdiff_t channel, TileArgs& a) {
    const Layout &layout = job.p.weight.layout, &read = job.plan.kernel->layout;
    const ConvertPanel convert =
        job.plan.vectors->conversions[static_cast<std::size_t>(layout.format)].panel_in(read.format);
    const auto* const packed = static_cast<const char*>(a.panel);
    const std::ptrdiff_t bytes = panel_offset(read, round_up(a.k, layout.kr));
    std::byte* const copies = wide_.bytes(a.panels * bytes);
    for (std::ptrdiff_t i = 0; i < a.panels; ++i) {
      const std::ptrdiff_t first = channel % layout.nr + i * read.nr, panel = first / layout.nr;
      ScaledGroups groups = *a.groups;
      groups.scales += panel * groups.panel_stride;
      if (groups.offsets != nullptr) groups.offsets += panel * groups.panel_stride;
      convert({packed + panel * job.panel_bytes, layout, first % layout.nr, read.nr, a.k, copies + i * bytes, &groups});
    }
    a.panel = copies;
    a.panel_stride = bytes;
  }

  // Kept from call to call, one for each thread.
  static Scratch& scratch(std::size_t which) {
    thread_local Scratch memory[3];
    return memory[which];
  }

  std::span<const Job> jobs_;
  const Session* session_;
  alignas(kSessionBytes) char state_[kSessionBytes];
  Scratch &tiles_ = scratch(0), &wide_ = scratch(1), &scales_ = scratch(2);
  std::size_t job_ = 0;
  const Job* block_of_ = nullptr;
  std::ptrdiff_t block_ = -1;  // of rows, which the last unit passed over
};

}  // namespace fastlinear
