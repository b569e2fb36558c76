// AVX512-FP16 and AVX-VNNI, as far as the library has them, and the instructions that stand between these in its loops:
// a fault costs some 10 us, so a run of instructions that are known here is carried out in one.
#pragma once

#include <immintrin.h>

#include <cmath>
#include <cstdint>
#include <cstring>

#include "decode.hpp"
#include "machine.hpp"
#include "tiles.hpp"

namespace emulator::vectors {

// The last operand: a register or memory, or one element of memory in all places.
inline Vector operand(const Machine& machine, const Instruction& i, std::size_t element) {
  const std::size_t bytes = i.vector_bytes();
  if (!i.memory) return machine.vector(i.rm, bytes);
  Vector v{};
  if (!i.broadcast) {
    std::memcpy(v.bytes, i.address(static_cast<std::int64_t>(bytes)), bytes);
    return v;
  }
  unsigned char one[8];
  std::memcpy(one, i.address(static_cast<std::int64_t>(element)), element);
  for (std::size_t at = 0; at < bytes; at += element) std::memcpy(v.bytes + at, one, element);
  return v;
}

// ---- AVX512-FP16
// -----------------------------------------------------------------------------------------------------

// x * y + z, rounded once to nearest even: in double it is exact, or the smaller addend, 42 bits below the larger, is
// too small to bring an fp16 number (or a product's 22 bits) near to where its rounding changes. So it is cut off to
// float, made odd where that lost something, and rounded to fp16, which sees what was lost.
// Masks of all lanes, for GCC 12's sake, which warns of undefined ones.
[[gnu::target("avx512f,avx512dq,avx512vl,avx2,fma,f16c")]] inline __m512d widen(__m128i x) {
  return _mm512_maskz_cvtps_pd(0xff, _mm256_cvtph_ps(x));
}
[[gnu::target("avx512f,avx512dq,avx512vl,avx2,fma,f16c")]] inline __m128i fused(__m128i x, __m128i y, __m128i z) {
  const __m512d sum = _mm512_fmadd_pd(widen(x), widen(y), widen(z));
  const __m256 cut = _mm512_maskz_cvt_roundpd_ps(0xff, sum, _MM_FROUND_TO_ZERO | _MM_FROUND_NO_EXC);
  const __mmask8 lossy = _mm512_cmp_pd_mask(_mm512_maskz_cvtps_pd(0xff, cut), sum, _CMP_NEQ_OQ);
  const __m256i bits = _mm256_castps_si256(cut);
  const __m256i odd = _mm256_mask_or_epi32(bits, lossy, bits, _mm256_set1_epi32(1));
  return _mm256_cvtps_ph(_mm256_castsi256_ps(odd), _MM_FROUND_TO_NEAREST_INT);
}

inline bool is_nan(std::uint16_t h) { return (h & 0x7fff) > 0x7c00; }

// Of several NaN the result is the first of the factors, then the addend, made quiet.
inline void choose_nan(const Vector& x, const Vector& y, const Vector& z, Vector& result, std::size_t bytes) {
  for (std::size_t at = 0; at < bytes; at += 2) {
    std::uint16_t of[3];
    const unsigned char* from[3] = {x.bytes, y.bytes, z.bytes};
    for (unsigned k = 0; k < 3; ++k) std::memcpy(&of[k], from[k] + at, 2);
    for (const std::uint16_t h : of)
      if (is_nan(h)) {
        const auto quiet = static_cast<std::uint16_t>(h | 0x200);
        std::memcpy(result.bytes + at, &quiet, 2);
        break;
      }
  }
}

// vfmadd132ph, 213, 231: the operands, counted from the result on, that are multiplied and added.
template <unsigned X, unsigned Y, unsigned Z>
[[gnu::target("avx512f,avx512dq,avx512vl,avx2,fma,f16c")]] Outcome fmadd_ph(Machine& machine, const Instruction& i) {
  if (i.mask != 0 || i.zeroing || i.length > 2 || (i.broadcast && !i.memory)) return Outcome::undefined;
  const std::size_t bytes = i.vector_bytes();
  const Vector of[3] = {machine.vector(i.reg, bytes), machine.vector(i.vvvv, bytes), operand(machine, i, 2)};
  Vector result{};
  bool nan = false;
  for (std::size_t at = 0; at < bytes; at += 16) {
    const auto part = [&](unsigned k) {
      return _mm_load_si128(reinterpret_cast<const __m128i*>(of[k - 1].bytes + at));
    };
    const __m128i sum = fused(part(X), part(Y), part(Z));
    _mm_store_si128(reinterpret_cast<__m128i*>(result.bytes + at), sum);
    const __m128i magnitude = _mm_and_si128(sum, _mm_set1_epi16(0x7fff));
    nan |= _mm_movemask_epi8(_mm_cmpgt_epi16(magnitude, _mm_set1_epi16(0x7c00))) != 0;
  }
  if (nan) choose_nan(of[X - 1], of[Y - 1], of[Z - 1], result, bytes);
  machine.set_vector(i.reg, result, bytes);
  return Outcome::done;
}

// ---- AVX-VNNI
// --------------------------------------------------------------------------------------------------------

inline Outcome dpbusd(Machine& machine, const Instruction& i) {
  const std::size_t bytes = i.vector_bytes();
  const Vector x = machine.vector(i.vvvv, bytes), w = operand(machine, i, 4);
  Vector sums = machine.vector(i.reg, bytes);
  for (std::size_t at = 0; at < bytes; at += 4) {
    std::uint32_t sum;
    std::memcpy(&sum, sums.bytes + at, 4);
    for (std::size_t k = at; k < at + 4; ++k)
      sum += static_cast<std::uint32_t>(x.bytes[k] * static_cast<std::int8_t>(w.bytes[k]));
    std::memcpy(sums.bytes + at, &sum, 4);
  }
  machine.set_vector(i.reg, sums, bytes);
  return Outcome::done;
}

// ---- what stands between
// ---------------------------------------------------------------------------------------------

// Loads and moves of whole registers.
inline Outcome move(Machine& machine, const Instruction& i) {
  if (i.mask != 0) return Outcome::undefined;
  machine.set_vector(i.reg, operand(machine, i, 0), i.vector_bytes());
  return Outcome::done;
}

template <std::size_t Element>
Outcome broadcast(Machine& machine, const Instruction& i) {
  if (i.mask != 0) return Outcome::undefined;
  unsigned char one[Element];
  if (i.memory)
    std::memcpy(one, i.address(Element), Element);
  else
    std::memcpy(one, machine.vector(i.rm, 16).bytes, Element);
  Vector v{};
  for (std::size_t at = 0; at < i.vector_bytes(); at += Element) std::memcpy(v.bytes + at, one, Element);
  machine.set_vector(i.reg, v, i.vector_bytes());
  return Outcome::done;
}

}  // namespace emulator::vectors
