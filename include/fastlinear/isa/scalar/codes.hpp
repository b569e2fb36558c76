// Weights in groups, of 4 bits, of 8, and fp8, in plain C++.
#pragma once

#include <cstring>

#include "fastlinear/generic/groups.hpp"
#include "fastlinear/generic/tile.hpp"
#include "fastlinear/isa/scalar/vec.hpp"

namespace fastlinear::scalar {

extern const Isa kIsa;

struct Codes {
  struct Integers {
    const std::int8_t* table;

    explicit Integers(const ScaledGroups& how) : table(how.integers) {}
    void unpack(const char* codes, char* low, char* high) const {
      for (std::ptrdiff_t i = 0; i < 4; ++i) {
        low[i] = static_cast<char>(table[codes[i] & 15]);
        high[i] = static_cast<char>(table[codes[i] >> 4 & 15]);
      }
    }
  };
  using Lanes = std::uint32_t;
  static constexpr Layout layout = Int4::layout;
  static constexpr std::ptrdiff_t bytes = 4, vectors = 1;
  static constexpr float unit = 1.0f;
  const float* table;

  explicit Codes(const float* numbers) : table(numbers) {}
  static Lanes load(const char* p) {
    Lanes lanes;
    std::memcpy(&lanes, p, sizeof lanes);
    return lanes;
  }
  static double multiply_add(const float* x, double w, double c) { return c + *x * w; }
  static double add(const float* x, double c) { return c + *x; }
  F32 value(Lanes lanes, std::ptrdiff_t i) const { return F32::set(table[lanes >> code_shift(i) & 15]); }
};

struct Bytes : Codes {
  static constexpr Layout layout = Int8InGroups::layout;
  using Codes::Codes;
  F32 value(Lanes lanes, std::ptrdiff_t i) const {
    return F32::set(static_cast<std::int8_t>(static_cast<std::uint8_t>(lanes >> 8 * i)));
  }
};

struct Halves : Codes {
  using Lanes = std::uint16_t;
  static constexpr Layout layout = Fp8::layout;
  static constexpr std::ptrdiff_t bytes = Fp8::kr;
  using Codes::Codes;
  static Lanes load(const char* p) {
    Lanes lanes;
    std::memcpy(&lanes, p, sizeof lanes);
    return lanes;
  }
  F32 value(Lanes lanes, std::ptrdiff_t i) const {
    return F32::set(to_float(Fp8{static_cast<std::uint8_t>(lanes >> 8 * i)}));
  }
};

inline constexpr Kernel kFp8Kernels[] = {
    kernels::row<groups::Tile<F32, Halves>, 1, 1>("fp8/scalar/1x32", kIsa),
};

inline constexpr Kernel kInt8gKernels[] = {
    kernels::row<groups::Tile<F32, Bytes>, 1, 1>("int8g/scalar/1x32", kIsa),
};

inline constexpr Kernel kInt4Kernels[] = {
    kernels::row<groups::Tile<F32, Codes>, 1, 1>("int4/scalar/1x32", kIsa),
};

}  // namespace fastlinear::scalar
