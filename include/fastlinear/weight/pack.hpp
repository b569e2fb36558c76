// Canonical weight [N, K] -> panels, and back. Both are exact copies; the last panel is padded with zeros.
//
//   panel p, group g, channel j, element i   holds   W[p * nr + j, g * kr + i]
//
// so one k step of a kernel (kr elements of nr channels) is one contiguous run of nr * kr elements. Behind the panels
// of int8 weights stand the channels' scales, and for integer products the sums of their weights and their zero points,
// each for as many channels as the panels have.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>

#include "fastlinear/host/parallel.hpp"
#include "fastlinear/weight/weight.hpp"

namespace fastlinear {

// Any strides, in elements, so that a transposed weight (GPT-2's Conv1D) packs without a copy.
template <class Element>
struct WeightView {
  Element* data;
  std::ptrdiff_t n, k, stride_n, stride_k;
};

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

// Calls work(null pointer to an unsigned integer of the size of an element): packing moves bits, and the size is all
// that it has to know of a format.
template <class Work>
void with_element(Format format, const Work& work) {
  if (element_bytes(format) == 4)
    work(static_cast<std::uint32_t*>(nullptr));
  else if (element_bytes(format) == 2)
    work(static_cast<std::uint16_t*>(nullptr));
  else
    work(static_cast<std::uint8_t*>(nullptr));
}

// Whole weights of the layout's format, on torch's threads; the panels land in the pages of the threads that wrote
// them.
inline void pack_weight(const Layout& layout, const WeightView<void>& w, void* packed) {
  with_element(layout.format, [&]<class Element>(Element*) {
    for_panels(layout, w.n, [&](std::ptrdiff_t first, std::ptrdiff_t last) {
      pack_panels(layout, elements<const Element>(w), static_cast<Element*>(packed), first, last);
    });
  });
}

inline void unpack_weight(const Layout& layout, const void* packed, const WeightView<void>& w) {
  with_element(layout.format, [&]<class Element>(Element*) {
    for_panels(layout, w.n, [&](std::ptrdiff_t first, std::ptrdiff_t last) {
      unpack_panels(layout, static_cast<const Element*>(packed), elements<Element>(w), first, last);
    });
  });
}

// What stands behind the panels of int8 weights: the scales [n], for integer products the sums of the rows of `w` and
// the zero points [n] (or null: all 0); channels past n have 0.
inline void pack_channels(const Layout& layout, const WeightView<void>& w, const float* scales,
                          const std::int32_t* zeros, char* packed) {
  const Weight at = weight_at(layout, w.n, w.k, packed);
  std::memset(packed + panels_bytes(layout, w.n, w.k), 0,
              static_cast<std::size_t>(packed_bytes(layout, w.n, w.k) - panels_bytes(layout, w.n, w.k)));
  if (at.scales != nullptr) std::copy_n(scales, w.n, const_cast<float*>(at.scales));
  if (at.sums == nullptr) return;
  if (zeros != nullptr) std::copy_n(zeros, w.n, const_cast<std::int32_t*>(at.zeros));
  const auto view = elements<const std::int8_t>(w);
  thread_pool().run(w.n, [&](std::ptrdiff_t n) {
    std::int32_t sum = 0;
    for (std::ptrdiff_t k = 0; k < w.k; ++k) sum += view.data[n * w.stride_n + k * w.stride_k];
    const_cast<std::int32_t*>(at.sums)[n] = sum;
  });
}

}  // namespace fastlinear
