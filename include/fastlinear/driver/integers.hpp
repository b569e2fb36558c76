// Rows that become integers outside of a product: those of x, as the prologue makes them, or the channels of a weight;
// threads share them.
#pragma once

#include <new>

#include "fastlinear/contract/isa.hpp"
#include "fastlinear/driver/problem.hpp"
#include "fastlinear/driver/prologue.hpp"
#include "fastlinear/host/parallel.hpp"

namespace fastlinear {

struct IntegersProblem {
  std::ptrdiff_t m, k;
  Rows x;
  const RowQuantizer* how;  // of x = scale * (u - zero); null: of a weight = scale * integers
  std::int8_t* integers;    // m rows of k, one behind the other: those of the weight, or u - 128
  float* scales;
  std::int32_t* zeros;  // of u; null for a weight
};

// With fewer numbers than this (about 10 us) a second thread is not worth waking.
inline constexpr std::ptrdiff_t kSerialIntegers = 32 << 10;

// False when memory ran out; the integers are then undefined.
inline bool to_integers(const IntegersProblem& p, const Vectors& vectors, std::ptrdiff_t threads) try {
  if (p.m == 0 || p.k == 0) return true;
  const Quantization& quantization = *vectors.quantization;
  const auto make = [&](std::ptrdiff_t r) {
    using namespace prologue_detail;
    const char* const row = p.x.at(r, 0);
    std::int8_t* const to = p.integers + r * p.k;
    if (p.how == nullptr) {
      p.scales[r] = quantization.channel(numbers(row, p.x.format, p.k, nullptr, vectors), p.k, to);
      return;
    }
    const float* const x = numbers(row, p.x.format, p.k, p.how->smooth, vectors);
    const RowScale scale = quantize_row(quantization, *p.how, quantization.forms[0], x, p.k, to);
    flip_bytes(reinterpret_cast<char*>(to), p.k, info(Format::int8).flip);
    p.scales[r] = scale.scale;
    p.zeros[r] = scale.zero;
  };
  return share_out(p.m, p.m * p.k < kSerialIntegers ? 1 : threads, [&] { return make; });
} catch (const std::bad_alloc&) {
  return false;
}

}  // namespace fastlinear
