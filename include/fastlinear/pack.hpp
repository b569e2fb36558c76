// Canonical weight [N, K] -> panels, and back. Both are exact copies; the last panel is padded with zeros.
//
//   panel p, group g, channel j, element i   holds   W[p * nr + j, g * kr + i]
//
// so one k step of a kernel (kr elements of nr channels) is one contiguous run of nr * kr elements.
#pragma once

#include <sys/mman.h>

#include <algorithm>
#include <cstdint>

#include "fastlinear/kernel.hpp"
#include "fastlinear/parallel.hpp"

namespace fastlinear {

// Any strides, in elements, so that a transposed weight (GPT-2's Conv1D) packs without a copy.
template <class Element>
struct WeightView {
  Element* data;
  std::ptrdiff_t n, k, stride_n, stride_k;
};

inline std::ptrdiff_t ceil_div(std::ptrdiff_t a, std::ptrdiff_t b) { return (a + b - 1) / b; }

inline std::ptrdiff_t panel_elements(const Layout& layout, std::ptrdiff_t k) {
  return layout.nr * ceil_div(k, layout.kr) * layout.kr;
}

inline std::ptrdiff_t packed_bytes(const Layout& layout, std::ptrdiff_t n, std::ptrdiff_t k) {
  return ceil_div(n, layout.nr) * panel_elements(layout, k) * element_bytes(layout.format);
}

// Calls visit(cells, row, begin, end) for runs of [begin, end) in K of each row of panels [first, last), where element
// k lies at cells(k); rows past n and elements past k are padding. Runs are a few cache lines long: a row is read as a
// stream, and what is written of it stays in L1 until its neighbours have filled the lines.
template <class Element, class Visit>
void for_each_run(const Layout& layout, std::ptrdiff_t k, Element* packed, std::ptrdiff_t first, std::ptrdiff_t last,
                  const Visit& visit) {
  const std::ptrdiff_t groups = ceil_div(k, layout.kr), step = layout.nr * layout.kr, block = ceil_div(64, layout.kr);
  for (std::ptrdiff_t p = first; p < last; ++p)
    for (std::ptrdiff_t g = 0; g < groups; g += block)
      for (std::ptrdiff_t j = 0; j < layout.nr; ++j)
        visit(packed + (p * groups + g) * step + j * layout.kr, p * layout.nr + j, g * layout.kr,
              std::min(groups, g + block) * layout.kr);
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
  const std::ptrdiff_t kr = layout.kr, step = layout.nr * kr;
  for_each_run(layout, w.k, packed, first, last,
               [&](Element* cells, std::ptrdiff_t row, std::ptrdiff_t begin, std::ptrdiff_t end) {
                 const std::ptrdiff_t valid = row < w.n ? std::min(end, w.k) : begin;
                 const Element* source = w.data + row * w.stride_n + begin * w.stride_k;
                 for (std::ptrdiff_t g = 0; g < (end - begin) / kr; ++g)
                   for (std::ptrdiff_t i = 0; i < kr; ++i)
                     cells[g * step + i] = begin + g * kr + i < valid ? source[(g * kr + i) * w.stride_k] : Element{};
               });
}

template <class Element>
void unpack_panels(const Layout& layout, const Element* packed, const WeightView<Element>& w, std::ptrdiff_t first,
                   std::ptrdiff_t last) {
  const std::ptrdiff_t kr = layout.kr, step = layout.nr * kr;
  for_each_run(layout, w.k, packed, first, last,
               [&](const Element* cells, std::ptrdiff_t row, std::ptrdiff_t begin, std::ptrdiff_t end) {
                 const std::ptrdiff_t valid = row < w.n ? std::min(end, w.k) - begin : 0;
                 Element* target = w.data + row * w.stride_n + begin * w.stride_k;
                 for (std::ptrdiff_t i = 0; i < valid; ++i) target[i * w.stride_k] = cells[i / kr * step + i % kr];
               });
}

template <class Element>
WeightView<Element> elements(const WeightView<void>& w) {
  return {static_cast<Element*>(w.data), w.n, w.k, w.stride_n, w.stride_k};
}

// Whole weights of the layout's format, on torch's threads; the panels land in the pages of the threads that wrote
// them. Packing moves bits, so the size of an element is all that it has to know of a format.
inline void pack_weight(const Layout& layout, const WeightView<void>& w, void* packed) {
  const auto pack = [&]<class Element>(Element* panels) {
    for_panels(layout, w.n, [&](std::ptrdiff_t first, std::ptrdiff_t last) {
      pack_panels(layout, elements<const Element>(w), panels, first, last);
    });
  };
  if (element_bytes(layout.format) == 4)
    pack(static_cast<std::uint32_t*>(packed));
  else
    pack(static_cast<std::uint16_t*>(packed));
}

inline void unpack_weight(const Layout& layout, const void* packed, const WeightView<void>& w) {
  const auto unpack = [&]<class Element>(const Element* panels) {
    for_panels(layout, w.n, [&](std::ptrdiff_t first, std::ptrdiff_t last) {
      unpack_panels(layout, panels, elements<Element>(w), first, last);
    });
  };
  if (element_bytes(layout.format) == 4)
    unpack(static_cast<const std::uint32_t*>(packed));
  else
    unpack(static_cast<const std::uint16_t*>(packed));
}

}  // namespace fastlinear
