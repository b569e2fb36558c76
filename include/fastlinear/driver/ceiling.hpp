// What the machine can do at most, measured with what the library has, so that a benchmark needs no compiler:
// operations a second of a kernel whose operands stay in L1, bytes a second that are read from memory of a given size,
// and the clock. Each is the best of several repetitions, from the first thread's start to the last one's end.
#pragma once

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstddef>
#include <cstdint>
#include <cstring>

#include "fastlinear/driver/plan.hpp"
#include "fastlinear/host/memory.hpp"
#include "fastlinear/host/parallel.hpp"
#include "fastlinear/weight/weight.hpp"

namespace fastlinear::ceiling {

inline double now() {
  return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

// Seconds of the fastest of `repeats` runs of make()() on so many threads at once.
template <class Make>
double fastest(std::ptrdiff_t threads, int repeats, const Make& make) {
  double best = 1e30;
  for (int i = 0; i < repeats; ++i) {
    std::atomic<double> first{1e30}, last{0};
    thread_pool().run(threads, [&](std::ptrdiff_t thread) {
      auto work = make(thread);
      const double start = now();
      work();
      const double end = now();
      for (double seen = first; start < seen && !first.compare_exchange_weak(seen, start);) {
      }
      for (double seen = last; end > seen && !last.compare_exchange_weak(seen, end);) {
      }
    });
    best = std::min(best, last - first);
  }
  return best;
}

// Operations a second, two a multiply-add, of full tiles on this kernel: rows in L1, where they may overlap, panels in
// L2, and K so long that a tile's beginning and end do not count.
inline double operations(const Plan& plan) {
  const Kernel& kernel = *plan.kernel;
  constexpr std::ptrdiff_t kPanelBytes = 128 << 10, kTiles = 100, kLine = 64, kGroup = 128;
  const std::ptrdiff_t element = element_bytes(kernel.rows), step = std::max(kernel.k_step, kernel.layout.kr);
  const std::ptrdiff_t step_bytes = kernel.panels * panel_offset(kernel.layout, step);
  const std::ptrdiff_t k = std::max<std::ptrdiff_t>(1, kPanelBytes / step_bytes) * step;
  const std::ptrdiff_t panel = panel_offset(kernel.layout, k), lda = kLine / element;
  const auto row_bytes = static_cast<std::size_t>((kernel.mr * lda + k) * element);
  const double seconds = fastest(plan.threads, 8, [&](std::ptrdiff_t) {
    return [&] {
      thread_local Scratch rows, panels, tile, scales;
      TileArgs a{};
      char* const x = reinterpret_cast<char*>(rows.bytes(static_cast<std::ptrdiff_t>(row_bytes)));
      char* const w = reinterpret_cast<char*>(panels.bytes(kernel.panels * panel));
      std::memset(x, 0, row_bytes);
      std::memset(w, 0, static_cast<std::size_t>(kernel.panels * panel));
      a.a = x, a.lda = lda, a.rows = kernel.mr, a.k = k;
      a.panel = w, a.panel_stride = panel, a.panels = kernel.panels;
      a.tile = tile.bytes(kernel.mr * kernel.columns() * 4);
      a.prefetch = a.beside = x;
      ScaledGroups groups{.size = kGroup};  // of weights that are scaled in groups, and of the rows beside them
      if (info(kernel.layout.format).grouped) {
        const std::ptrdiff_t beside = kTableBytes + ceil_div(k, kGroup) * kernel.layout.nr * 4 + kernel.mr * kLine;
        auto* const zeros = reinterpret_cast<char*>(scales.bytes(beside));
        std::memset(zeros, 0, static_cast<std::size_t>(beside));
        groups.scales = zeros;
        groups.table = reinterpret_cast<const float*>(zeros);
        a.row_groups = {groups.table, reinterpret_cast<const std::int32_t*>(zeros), groups.table};
      }
      a.groups = &groups;
      alignas(kSessionBytes) char state[kSessionBytes];
      if (kernel.session != nullptr) kernel.session->enter(state);
      for (std::ptrdiff_t i = 0; i < kTiles; ++i) kernel.run(a);
      if (kernel.session != nullptr) kernel.session->leave(state);
    };
  });
  return 2.0 * static_cast<double>(kernel.mr * kernel.columns() * k * kTiles * plan.threads) / seconds;
}

// Bytes a second that `threads` threads read of [data, data + bytes), each its share, `passes` times; prefetched so
// many bytes ahead, 0 for as the hardware does.
inline double bandwidth(const char* data, std::ptrdiff_t bytes, std::ptrdiff_t threads, int passes,
                        std::ptrdiff_t ahead) {
  constexpr std::ptrdiff_t kLine = 64;
  std::atomic<std::uint64_t> sums{0};  // so that reading is not in vain
  const double seconds = fastest(threads, passes > 1 ? 3 : 1, [&](std::ptrdiff_t thread) {
    return [&, thread] {
      const std::ptrdiff_t begin = share_begin(bytes / kLine, thread, threads) * kLine;
      const std::ptrdiff_t end = share_begin(bytes / kLine, thread + 1, threads) * kLine;
      std::uint64_t sum = 0;
      for (int pass = 0; pass < passes; ++pass)
        for (std::ptrdiff_t at = begin; at < end; at += kLine) {
          if (ahead != 0) __builtin_prefetch(data + at + ahead);
          std::uint64_t word;  // one of a line: lines are what is read
          std::memcpy(&word, data + at, sizeof word);
          sum += word;
        }
      sums += sum;
    };
  });
  return static_cast<double>(bytes) * passes / seconds;
}

// Cycles a second: of additions that wait for one another, each of which takes one on any CPU of ours. (They add a
// register, since some CPUs add constants without an addition.)
inline double clock() {
  constexpr std::uint64_t kSums = 1 << 20, kAtOnce = 16;
  const double seconds = fastest(1, 8, [](std::ptrdiff_t) {
    return [] {
      std::uint64_t sum = 3;
      for (std::uint64_t i = 0; i < kSums; i += kAtOnce)
#pragma GCC unroll 16
        for (std::uint64_t j = 0; j < kAtOnce; ++j) {
          sum += sum;
          asm volatile("" : "+r"(sum));
        }
    };
  });
  return static_cast<double>(kSums) / seconds;
}

}  // namespace fastlinear::ceiling
