// Packing of formats whose elements are whole bytes, which have nothing between their groups: it moves bits, and the
// size of an element is all that it has to know.
//
//   panel p, group g, channel j, element i   holds   W[p * nr + j, g * kr + i]
#pragma once

#include <algorithm>
#include <cstddef>

#include "fastlinear/contract/arith.hpp"
#include "fastlinear/contract/format.hpp"

namespace fastlinear {

// Calls visit(cells, row, begin, end) for runs of [begin, end) in K of each row of panels [first, last), where element
// k lies at cells(k); rows past n and elements past k are padding. Runs are a few cache lines long: a row is read as a
// stream, and what is written of it stays in L1 until its neighbors have filled the lines.
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

template <class Element>
void pack_elements(const Layout& layout, const WeightView<void>& w, void* packed, std::ptrdiff_t first,
                   std::ptrdiff_t last) {
  const auto* data = static_cast<const Element*>(w.data);
  const std::ptrdiff_t kr = layout.kr, step = layout.nr * kr;
  for_each_run(layout, w.k, static_cast<Element*>(packed), first, last,
               [&](Element* cells, std::ptrdiff_t row, std::ptrdiff_t begin, std::ptrdiff_t end) {
                 const std::ptrdiff_t valid = row < w.n ? std::min(end, w.k) : begin;
                 const Element* source = data + row * w.stride_n + begin * w.stride_k;
                 for (std::ptrdiff_t g = 0; g < (end - begin) / kr; ++g)
                   for (std::ptrdiff_t i = 0; i < kr; ++i)
                     cells[g * step + i] = begin + g * kr + i < valid ? source[(g * kr + i) * w.stride_k] : Element{};
               });
}

template <class Element>
void unpack_elements(const Layout& layout, const void* packed, const WeightView<void>& w, std::ptrdiff_t first,
                     std::ptrdiff_t last) {
  auto* data = static_cast<Element*>(w.data);
  const std::ptrdiff_t kr = layout.kr, step = layout.nr * kr;
  for_each_run(layout, w.k, static_cast<const Element*>(packed), first, last,
               [&](const Element* cells, std::ptrdiff_t row, std::ptrdiff_t begin, std::ptrdiff_t end) {
                 const std::ptrdiff_t valid = row < w.n ? std::min(end, w.k) - begin : 0;
                 Element* target = data + row * w.stride_n + begin * w.stride_k;
                 for (std::ptrdiff_t i = 0; i < valid; ++i) target[i * w.stride_k] = cells[i / kr * step + i % kr];
               });
}

}  // namespace fastlinear
