// One value at a time, for the epilogue, in plain C++ for the x86-64 baseline.
//
// The baseline has no FMA instruction and std::fma would be a slow call, but an SSE2 double costs what a float costs:
// the value is held as a double from load to store, which covers everything the functions need an FMA for.
//
// The verbs, which mean the same in isa/avx2/vec.hpp and isa/avx512/vec.hpp, lane by lane:
//   load, store    `width` elements of any format at any address; store_n only the first n < width, floats
//   load_six       `width` times integer i of the 8 that three words hold (formats/scales.hpp), `stride` words apart
//   load_pairs     `width` pairs: their first and their second elements; store_pairs (AVX-512 only) the reverse
//   max, min       the second operand if either is NaN, so max(bound, x) passes a NaN of x on
//   select_gt      a > b ? x : y
//   select_nan     is a NaN? x : y
//   round          to the nearest integer, ties to even
//   scale          x * 2^n for an integral |n| <= 252; the store rounds once, in the denormal range too
//   fma, fused     a * b + c; the latter is rounded once, to fp32, on every ISA
//   rounded        as fp32 holds it
//   total          the sum of the lanes
//   transpose      of `width` vectors, which are the rows of a square
//   least, greatest, all_zero   of the lanes, none of them NaN for the first two
// and of I32, `width` int32, which wrap around:
//   max_magnitude  the larger of them and of the bits of |x|
//   nearest        the nearest integers, ties to even
//   store          to uint8, int8 and int16, which hold them
#pragma once

#include <cstddef>
#include <cstdint>

#include "fastlinear/formats/bf16.hpp"
#include "fastlinear/formats/fp16.hpp"
#include "fastlinear/formats/int8.hpp"
#include "fastlinear/formats/scales.hpp"

namespace fastlinear::scalar {

struct F32 {
  static constexpr std::ptrdiff_t width = 1;
  static constexpr int rows_in_step = 4;  // for how many rows at once a function of an epilogue is computed
  double v;

  static F32 set(float x) { return {x}; }
  static F32 load(const float* p) { return {*p}; }
  static void store(float* p, F32 x) { *p = static_cast<float>(x.v); }
  static void store_n(float* p, F32 x, std::ptrdiff_t) { store(p, x); }

  template <class Element>
  static F32 load(const Element* p) {
    return {to_float(*p)};
  }
  template <class Element>
  static void store(Element* p, F32 x) {
    from_float(static_cast<float>(x.v), *p);
  }
  static F32 load_six(const std::uint16_t* p, std::ptrdiff_t stride, std::ptrdiff_t i) {
    return {static_cast<double>(unpack_six(p[0], p[stride], p[2 * stride], i))};
  }
  static void load_pairs(const Bf16* p, F32& even, F32& odd) { even = load(p), odd = load(p + 1); }
};

inline F32 operator+(F32 a, F32 b) { return {a.v + b.v}; }
inline F32 operator-(F32 a, F32 b) { return {a.v - b.v}; }
inline F32 operator*(F32 a, F32 b) { return {a.v * b.v}; }
inline F32 operator/(F32 a, F32 b) { return {a.v / b.v}; }
inline F32 operator-(F32 a) { return {-a.v}; }
inline F32 fma(F32 a, F32 b, F32 c) { return {a.v * b.v + c.v}; }
inline F32 max(F32 a, F32 b) { return {a.v > b.v ? a.v : b.v}; }
inline F32 min(F32 a, F32 b) { return {a.v < b.v ? a.v : b.v}; }
inline F32 abs(F32 a) { return {__builtin_fabs(a.v)}; }
inline F32 select_gt(F32 a, F32 b, F32 x, F32 y) { return {a.v > b.v ? x.v : y.v}; }
inline F32 select_nan(F32 a, F32 x, F32 y) { return {a.v != a.v ? x.v : y.v}; }

// 1.5 * 2^52 has unit spacing: adding it rounds to an integer, and leaves that integer in the low bits.
inline constexpr double kUnitSpacing = 0x1.8p52;
inline F32 round(F32 a) { return {(a.v + kUnitSpacing) - kUnitSpacing}; }
inline F32 scale(F32 x, F32 n) {
  const auto bits = __builtin_bit_cast(std::uint64_t, n.v + (kUnitSpacing + 1023));
  return {x.v * __builtin_bit_cast(double, bits << 52)};
}

inline F32 fused(F32 a, F32 b, F32 c) {
  return {__builtin_fmaf(static_cast<float>(a.v), static_cast<float>(b.v), static_cast<float>(c.v))};
}
inline F32 rounded(F32 a) { return {static_cast<float>(a.v)}; }
inline float total(F32 a) { return static_cast<float>(a.v); }
inline float least(F32 a) { return static_cast<float>(a.v); }
inline float greatest(F32 a) { return static_cast<float>(a.v); }
inline bool all_zero(F32 a) { return a.v == 0.0; }
inline void transpose(F32 (&)[1]) {}

struct I32 {
  std::uint32_t v;

  static I32 set(std::int32_t x) { return {static_cast<std::uint32_t>(x)}; }
  static I32 load(const void* p) {
    std::uint32_t v;
    __builtin_memcpy(&v, p, sizeof v);
    return {v};
  }
  template <class Integer>
  static void store(Integer* p, I32 x) {
    *p = static_cast<Integer>(x.v);
  }
};

inline I32 max_magnitude(I32 a, F32 x) {
  const auto bits = __builtin_bit_cast(std::uint32_t, static_cast<float>(abs(x).v));
  return {a.v > bits ? a.v : bits};
}
inline std::int32_t greatest(I32 a) { return static_cast<std::int32_t>(a.v); }
inline I32 nearest(F32 a) { return I32::set(static_cast<std::int32_t>(round(a).v)); }
inline I32 operator+(I32 a, I32 b) { return {a.v + b.v}; }
inline I32 operator-(I32 a, I32 b) { return {a.v - b.v}; }
inline I32 operator*(I32 a, I32 b) { return {a.v * b.v}; }
inline F32 to_float(I32 a) { return {static_cast<float>(static_cast<std::int32_t>(a.v))}; }

}  // namespace fastlinear::scalar
