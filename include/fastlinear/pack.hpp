// Canonical weight [N, K] -> panels, and back. Both are exact copies; the last panel is padded with zeros.
//
//   panel p, group g, channel j, element i   holds   W[p * nr + j, g * kr + i]
//
// so one k step of a kernel (kr elements of nr channels) is one contiguous run of nr * kr elements.
#pragma once

#include <sys/mman.h>

#include <algorithm>
#include <cstring>

#include "fastlinear/kernel.hpp"
#include "fastlinear/parallel.hpp"

namespace fastlinear {

// Any strides, in elements, so that a transposed weight (GPT-2's Conv1D) packs without a copy.
template <class Element>
struct WeightView {
  Element* data;
  std::ptrdiff_t n, k, stride_n, stride_k;

  Element& at(std::ptrdiff_t row, std::ptrdiff_t column) const { return data[row * stride_n + column * stride_k]; }
};

inline std::ptrdiff_t ceil_div(std::ptrdiff_t a, std::ptrdiff_t b) { return (a + b - 1) / b; }

inline std::ptrdiff_t panel_elements(const Layout& layout, std::ptrdiff_t k) {
  return layout.nr * ceil_div(k, layout.kr) * layout.kr;
}

inline std::ptrdiff_t packed_elements(const Layout& layout, std::ptrdiff_t n, std::ptrdiff_t k) {
  return ceil_div(n, layout.nr) * panel_elements(layout, k);
}

// Calls visit(packed element, row, column) for every element of panels [first, last), padding included, in an order
// that keeps both sides within a few cache lines: 16 groups of k at a time read one line of every row and fill
// contiguous memory.
template <class Element, class Visit>
void for_each_packed(const Layout& layout, std::ptrdiff_t k, Element* packed, std::ptrdiff_t first, std::ptrdiff_t last,
                     Visit visit) {
  constexpr std::ptrdiff_t kBlock = 16;
  const std::ptrdiff_t groups = ceil_div(k, layout.kr), run = layout.nr * layout.kr;
  for (std::ptrdiff_t p = first; p < last; ++p) {
    Element* panel = packed + p * groups * run;
    for (std::ptrdiff_t g0 = 0; g0 < groups; g0 += kBlock) {
      const std::ptrdiff_t g1 = std::min(groups, g0 + kBlock);
      for (std::ptrdiff_t j = 0; j < layout.nr; ++j)
        for (std::ptrdiff_t g = g0; g < g1; ++g)
          for (std::ptrdiff_t i = 0; i < layout.kr; ++i)
            visit(panel[g * run + j * layout.kr + i], p * layout.nr + j, g * layout.kr + i);
    }
  }
}

// Asks for 2 MB pages: a weight that comes from memory is read 1.5 times as fast with them (4 KB pages cost a TLB miss
// every 64 lines). Only advice; the pages must not have been touched yet.
inline constexpr std::size_t kHugePage = 2 << 20;

inline void advise_huge_pages(void* data, std::size_t bytes) {
  const std::size_t skip = (kHugePage - reinterpret_cast<std::size_t>(data) % kHugePage) % kHugePage;
  if (bytes > skip) madvise(static_cast<char*>(data) + skip, bytes - skip, MADV_HUGEPAGE);
}

template <class Work>
void for_panels(const Layout& layout, std::ptrdiff_t n, const Work& work) {
  constexpr std::ptrdiff_t kChunk = 8;
  const std::ptrdiff_t panels = ceil_div(n, layout.nr);
  thread_pool().run(ceil_div(panels, kChunk),
                    [&](std::ptrdiff_t i) { work(i * kChunk, std::min(panels, (i + 1) * kChunk)); });
}

template <class Element>
void pack_panels(const Layout& layout, const WeightView<const Element>& w, Element* packed, std::ptrdiff_t first,
                 std::ptrdiff_t last) {
  for_each_packed(layout, w.k, packed, first, last, [&](Element& cell, std::ptrdiff_t row, std::ptrdiff_t column) {
    cell = row < w.n && column < w.k ? w.at(row, column) : Element{};
  });
}

template <class Element>
void unpack_panels(const Layout& layout, const Element* packed, const WeightView<Element>& w, std::ptrdiff_t first,
                   std::ptrdiff_t last) {
  for_each_packed(layout, w.k, packed, first, last,
                  [&](const Element& cell, std::ptrdiff_t row, std::ptrdiff_t column) {
                    if (row < w.n && column < w.k) w.at(row, column) = cell;
                  });
}

// Whole weights, on torch's threads; the panels land in the pages of the threads that wrote them.
template <class Element>
void pack_weight(const Layout& layout, const WeightView<const Element>& w, Element* packed) {
  for_panels(layout, w.n,
             [&](std::ptrdiff_t first, std::ptrdiff_t last) { pack_panels(layout, w, packed, first, last); });
}

template <class Element>
void unpack_weight(const Layout& layout, const Element* packed, const WeightView<Element>& w) {
  for_panels(layout, w.n,
             [&](std::ptrdiff_t first, std::ptrdiff_t last) { unpack_panels(layout, packed, w, first, last); });
}

}  // namespace fastlinear
