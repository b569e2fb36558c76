// Rows that become integers outside of a product: those of x, as the prologue makes them, or the channels of a weight,
// which may become codes in groups; threads share them.
#pragma once

#include <new>
#include <vector>

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

struct CodesProblem {
  std::ptrdiff_t m, k;
  Rows x;
  CodeSearch how;
  std::uint8_t* codes;     // m rows of k, one behind the other
  char *scales, *offsets;  // m rows, a number for each group
};

// The same of a search for scales, which takes some 5 ns a number.
inline constexpr std::ptrdiff_t kSerialCodes = 2 << 10;

inline bool to_codes(const CodesProblem& p, const Vectors& vectors, std::ptrdiff_t threads) try {
  if (p.m == 0 || p.k == 0) return true;
  const std::ptrdiff_t groups = ceil_div(p.k, p.how.group), bytes = groups * (p.how.scales == Format::fp32 ? 4 : 2);
  return share_out(p.m, p.m * p.k < kSerialCodes ? 1 : threads, [&] {
    return [&, scratch =
                   std::vector<float>(static_cast<std::size_t>(code_scratch(p.how.group)))](std::ptrdiff_t r) mutable {
      const float* const w = prologue_detail::numbers(p.x.at(r, 0), p.x.format, p.k, nullptr, vectors);
      char* const offsets = p.offsets == nullptr ? nullptr : p.offsets + r * bytes;
      vectors.quantization->codes({w, p.k, &p.how, scratch.data(), p.codes + r * p.k, p.scales + r * bytes, offsets});
    };
  });
} catch (const std::bad_alloc&) {
  return false;
}

}  // namespace fastlinear
