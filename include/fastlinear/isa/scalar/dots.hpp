// Weights in groups as integers, in plain C++.
#pragma once

#include <array>

#include "fastlinear/generic/dots.hpp"
#include "fastlinear/generic/tile.hpp"
#include "fastlinear/isa/scalar/codes.hpp"
#include "fastlinear/isa/scalar/vec.hpp"

namespace fastlinear::scalar {

extern const Isa kIsa;

struct Dots {
  using Sum = std::int32_t;
  static constexpr std::ptrdiff_t registers = 0;

  static Sum start(std::int32_t) { return 0; }
  static const std::int8_t* row(const std::int8_t* a) { return a; }
  template <std::size_t N>
  static Sum add(Sum c, const std::array<std::int8_t, N>& w, const std::int8_t* a) {
    for (std::size_t i = 0; i < N; ++i) c += w[i] * a[i];
    return c;
  }
  static I32 sums(Sum c) { return I32::set(c); }
};

struct CodeDots : Dots {
  static constexpr Layout layout = Int4::layout;
  using Weights = std::array<std::int8_t, 8>;
  const std::int8_t* table;

  explicit CodeDots(const ScaledGroups& how) : table(how.integers) {}
  Weights weights(const char* p) const {
    Weights w;
    for (std::size_t i = 0; i < w.size(); ++i)
      w[i] = table[Codes::load(p) >> code_shift(static_cast<std::ptrdiff_t>(i)) & 15];
    return w;
  }
};

struct ByteDots : Dots {
  static constexpr Layout layout = Int8InGroups::layout;
  using Weights = std::array<std::int8_t, 4>;

  explicit ByteDots(const ScaledGroups&) {}
  static Weights weights(const char* p) { return __builtin_bit_cast(Weights, Codes::load(p)); }
};

inline constexpr Kernel kDotKernels[] = {
    kernels::row<dots::Tile<F32, CodeDots>, 1, 1>("int4/scalar/dot1x32", kIsa),
    kernels::row<dots::Tile<F32, ByteDots>, 1, 1>("int8g/scalar/dot1x32", kIsa),
};

}  // namespace fastlinear::scalar
