// How to compute a product: which kernel, by how many threads, cut how; and all that follows from that alone, looked up
// when a plan is made and not in each call.
#pragma once

#include <algorithm>
#include <cstddef>

#include "fastlinear/contract/isa.hpp"
#include "fastlinear/formats/all.hpp"

namespace fastlinear {

// Whether a kernel runs on a weight in this layout: its own, or one that the driver turns into it panel by panel. That
// is for kernels that multiply elements as they are; those that widen weights themselves have nothing to gain. Panels
// of groups have one width on every ISA, and may be turned into narrower ones. Weights are not packed in pairs of fp16,
// which but one ISA reads.
constexpr bool reads(const Kernel& kernel, const Layout& packed) {
  const Layout pairs{Format::fp16, kernel.layout.nr, 2}, plain{Format::fp16, kernel.layout.nr, 1};
  if (kernel.layout == pairs) return packed == plain;
  if (packed == pairs) return false;
  const FormatInfo& from = info(packed.format);
  const bool fits = from.grouped ? kernel.columns() % packed.nr == 0 : packed.nr == kernel.layout.nr;
  const bool as_they_are = kernel.rows == (kernel.layout.format == Format::int8g ? Format::int8 : kernel.layout.format);
  const bool converted = as_they_are && fits && (from.converts_to & bit(kernel.layout.format)) != 0;
  return packed == kernel.layout || converted;
}

// What the caches of a machine hold; 0 where it does not say.
struct Caches {
  std::size_t l1d, l2, l3;
};

struct Blocks {
  std::ptrdiff_t panels;    // bytes of a K block of a group of panels
  std::ptrdiff_t rows;      // bytes of a block of rows of A, over which a group passes
  std::ptrdiff_t prepared;  // bytes of the rows that the prologue makes at a time
};

// Half of L2 for a K block. For a block of rows, which every group reads again, half of it, too, since from L3 that
// takes longer than AMX multiplies it; but an eighth for rows of fp32, of which 1024 come with a weight that fills L2
// beside them: that is 1 to 4 % faster, and more where who runs on the core's other thread has half of L2 (integers
// lose as much). An eighth of L3, which all cores share, for prepared rows, at least what L2 holds and at most 4 MB.
inline Blocks blocks_of(const Caches& caches, Format rows) {
  constexpr std::ptrdiff_t kUnknown = 1 << 20, kMostPrepared = 4 << 20;
  const auto l2 = caches.l2 > 0 ? static_cast<std::ptrdiff_t>(caches.l2) : kUnknown;
  const auto l3 = caches.l3 > 0 ? static_cast<std::ptrdiff_t>(caches.l3) : 8 * kMostPrepared;
  const std::ptrdiff_t share = rows == Format::fp32 ? 8 : 2;
  return {l2 / 2, l2 / share, std::clamp(l3 / 8, std::min(l2, kMostPrepared), kMostPrepared)};
}

struct Plan {
  const Kernel* kernel;
  std::ptrdiff_t threads, k_slices;  // at least 1
  Blocks blocks;
  const Vectors* vectors;  // those of the kernel's ISA
  const RowForm* form;     // of integer rows; null for others
};

inline Plan make_plan(const Kernel& kernel, std::ptrdiff_t threads, std::ptrdiff_t k_slices, const Caches& caches) {
  const Vectors& vectors = vectors_of(kernel.isa);
  const RowForm* form = nullptr;
  for (const RowForm& each : vectors.quantization->forms)
    if (each.rows == kernel.rows) form = &each;
  return {&kernel, threads, k_slices, blocks_of(caches, kernel.rows), &vectors, form};
}

}  // namespace fastlinear
