// Row operations: y = norm(x + residual), for all rows of x; threads share them.
#pragma once

#include <cstring>
#include <new>

#include "fastlinear/contract/isa.hpp"
#include "fastlinear/driver/problem.hpp"
#include "fastlinear/host/memory.hpp"
#include "fastlinear/host/parallel.hpp"

namespace fastlinear {

// Rows that are written: row r lies at data + stride * r.
struct OutRows {
  char* data;
  std::ptrdiff_t stride;  // elements
  Format format;

  char* at(std::ptrdiff_t row) const { return data + row * stride * element_bytes(format); }
};

// y = norm(x + residual), [m, n]. Each may have a floating format of its own.
struct NormProblem {
  std::ptrdiff_t m, n;
  Rows x, residual;  // whose data may be null
  OutRows sum;       // x + residual, rounded once; its data may be null
  OutRows y;
  Bias weight, bias;  // n numbers each, or null
  float offset, eps;
  bool centered;
};

// What makes the rows of one problem, one by one and on any thread.
class Normalizer {
 public:
  Normalizer(const NormProblem& p, const Vectors& vectors)
      : p_(p), vectors_(vectors), weight_(wide(p.weight, 0)), bias_(wide(p.bias, 1)) {}

  void make(std::ptrdiff_t r) const {
    float* const numbers = p_.y.format == kNumbers ? reinterpret_cast<float*>(p_.y.at(r)) : scratch(2).floats(p_.n);
    const bool keeps = p_.sum.data != nullptr;
    float* sum = numbers;
    if (keeps) sum = p_.sum.format == kNumbers ? reinterpret_cast<float*>(p_.sum.at(r)) : scratch(3).floats(p_.n);
    vectors_.norm(
        {row(p_.x, r, 4), row(p_.residual, r, 5), sum, numbers, p_.n, weight_, bias_, p_.offset, p_.eps, p_.centered});
    if (keeps && p_.sum.format != kNumbers) conversion(p_.sum.format).narrow(sum, p_.sum.at(r), p_.n);
    if (p_.y.format != kNumbers) conversion(p_.y.format).narrow(numbers, p_.y.at(r), p_.n);
  }

 private:
  static Scratch& scratch(std::size_t which) {
    thread_local Scratch memory[6];
    return memory[which];
  }

  const Conversion& conversion(Format format) const { return vectors_.conversions[static_cast<std::size_t>(format)]; }

  // Memory that the calling thread keeps; the others read it meanwhile.
  const float* wide(const Bias& given, std::size_t which) const {
    if (given.data == nullptr || given.format == kNumbers) return static_cast<const float*>(given.data);
    float* const numbers = scratch(which).floats(p_.n);
    conversion(given.format).widen(given.data, numbers, p_.n);
    return numbers;
  }

  // In fp32: in place, or in memory of this thread.
  const float* row(const Rows& rows, std::ptrdiff_t r, std::size_t which) const {
    if (rows.data == nullptr || rows.format == kNumbers)
      return rows.data == nullptr ? nullptr : reinterpret_cast<const float*>(rows.at(r, 0));
    float* const numbers = scratch(which).floats(p_.n);
    conversion(rows.format).widen(rows.at(r, 0), numbers, p_.n);
    return numbers;
  }

  const NormProblem& p_;
  const Vectors& vectors_;
  const float *weight_, *bias_;
};

// With fewer numbers than this (about 10 us) a second thread is not worth waking.
inline constexpr std::ptrdiff_t kSerialNorm = 64 << 10;

// False when memory ran out; y is then undefined.
inline bool normalize(const NormProblem& p, const Vectors& vectors, std::ptrdiff_t threads) try {
  if (p.m == 0 || p.n == 0) return true;
  const Normalizer rows(p, vectors);
  return share_out(p.m, p.m * p.n < kSerialNorm ? 1 : threads,
                   [&] { return [&rows](std::ptrdiff_t r) { rows.make(r); }; });
} catch (const std::bad_alloc&) {
  return false;
}

}  // namespace fastlinear
