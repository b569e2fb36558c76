// conversion.hpp's functions, written once over a vector type; included inside an ISA's target region.
#pragma once

#include <cstddef>
#include <cstring>

#include "fastlinear/contract/conversion.hpp"
#include "fastlinear/formats/bf16.hpp"
#include "fastlinear/formats/fp16.hpp"
#include "fastlinear/formats/int8.hpp"
#include "fastlinear/generic/groups.hpp"

namespace fastlinear {

// The last, partial vector is moved through a buffer: nothing is read or written beyond n.
template <class V, class From, class To>
void convert_n(const From* in, To* out, std::ptrdiff_t n) {
  std::ptrdiff_t i = 0;
  for (; i + V::width <= n; i += V::width) V::store(out + i, V::load(in + i));
  if (i >= n) return;
  const auto rest = static_cast<std::size_t>(n - i);
  From from[V::width] = {};
  To to[V::width];
  std::memcpy(from, in + i, rest * sizeof(From));
  V::store(to, V::load(from));
  std::memcpy(out + i, to, rest * sizeof(To));
}

template <class V, class Element>
void widen(const void* in, float* out, std::ptrdiff_t n) {
  convert_n<V>(static_cast<const Element*>(in), out, n);
}

template <class V, class Element>
void narrow(const float* in, void* out, std::ptrdiff_t n) {
  convert_n<V>(in, static_cast<Element*>(out), n);
}

template <class V, class Element>
void narrow_rows(const float* in, std::ptrdiff_t ld_in, void* out, std::ptrdiff_t ld_out, std::ptrdiff_t rows,
                 std::ptrdiff_t n) {
  for (std::ptrdiff_t r = 0; r < rows; ++r) convert_n<V>(in + r * ld_in, static_cast<Element*>(out) + r * ld_out, n);
}

// nr is a multiple of every vector's width.
template <class V, class Element>
void widen_panel(const ConvertArgs& args) {
  const std::ptrdiff_t nr = args.layout.nr, k = args.k;
  const void* const panel = args.panel;
  void* const to = args.out;
  const auto* in = static_cast<const Element*>(panel);
  auto* out = static_cast<float*>(to);
  if constexpr (Element::kr == 1) {
    convert_n<V>(in, out, nr * k);
  } else {
    for (std::ptrdiff_t g = 0; g < k; g += 2)
      for (std::ptrdiff_t j = 0; j < nr; j += V::width) {
        V even, odd;
        V::load_pairs(in + g * nr + 2 * j, even, odd);
        V::store(out + g * nr + j, even);
        if (g + 1 < k) V::store(out + (g + 1) * nr + j, odd);
      }
  }
}

template <class V>
void pair_panel(const ConvertArgs& args) {
  const std::ptrdiff_t nr = args.layout.nr, k = args.k;
  const void* const panel = args.panel;
  void* const to = args.out;
  const auto* in = static_cast<const Int8*>(panel);
  auto* out = static_cast<Bf16*>(to);
  for (std::ptrdiff_t g = 0; g < k; g += 2)
    for (std::ptrdiff_t j = 0; j < nr; j += V::width) {
      const V odd = g + 1 < k ? V::load(in + (g + 1) * nr + j) : V::set(0.0f);
      V::store_pairs(out + g * nr + 2 * j, V::load(in + g * nr + j), odd);
    }
}

// Two rows of halves -> pairs; sixteen at a time, so that compilers see vectors.
template <class V>
void pair_halves(const ConvertArgs& args) {
  const std::ptrdiff_t nr = args.layout.nr, k = args.k;
  const void* const panel = args.panel;
  void* const to = args.out;
  constexpr std::ptrdiff_t width = 16;
  for (std::ptrdiff_t g = 0; g < k; g += 2)
    for (std::ptrdiff_t j = 0; j < nr; j += width) {
      std::uint16_t even[width], odd[width] = {};
      std::uint32_t pairs[width];
      std::memcpy(even, static_cast<const Fp16*>(panel) + g * nr + j, sizeof even);
      if (g != k - 1) std::memcpy(odd, static_cast<const Fp16*>(panel) + (g + 1) * nr + j, sizeof odd);
      for (std::ptrdiff_t i = 0; i < width; ++i) pairs[i] = std::uint32_t{odd[i]} << 16 | even[i];
      std::memcpy(static_cast<Fp16*>(to) + g * nr + 2 * j, pairs, sizeof pairs);
    }
}

// Null for the vectors of ISAs that do not multiply bf16.
template <class V>
inline constexpr ConvertPanel pairing = [] {
  if constexpr (requires { &V::store_pairs; })
    return pair_panel<V>;
  else
    return nullptr;
}();

// In the order of enum Format. Codes, Bytes and Halves, of int4, int8g and fp8: as generic/groups.hpp wants them.
template <class V, class Codes, class Bytes, class Halves>
inline constexpr Conversion conversions[] = {
    {nullptr, nullptr, {}, nullptr},
    {widen<V, Bf16>, narrow<V, Bf16>, {widen_panel<V, Bf16>}, narrow_rows<V, Bf16>},
    {widen<V, Fp16>, narrow<V, Fp16>, {widen_panel<V, Fp16>, nullptr, pair_halves<V>}, narrow_rows<V, Fp16>},
    {nullptr, nullptr, {widen_panel<V, Int8>, pairing<V>}, nullptr},
    {nullptr, nullptr, {}, nullptr},
    {nullptr, nullptr, {}, nullptr},
    {nullptr, nullptr, {}, nullptr},
    {nullptr, nullptr, {}, nullptr},
    {nullptr,
     nullptr,
     {groups::widen_panel<V, Codes>, groups::pairing<V, Codes>},
     nullptr,
     groups::byte_panel<V, Codes>},
    {nullptr, nullptr, {groups::widen_panel<V, Bytes>, groups::pairing<V, Bytes>}, nullptr},
    {nullptr, nullptr, {}, nullptr},
    {nullptr, nullptr, {}, nullptr},
    {nullptr, nullptr, {groups::widen_panel<V, Halves>, groups::pairing<V, Halves>}, nullptr},
};

}  // namespace fastlinear
