// What the driver is asked for: y = epilogue(x W^T), with all that it takes.
#pragma once

#include <array>

#include "fastlinear/contract/epilogue.hpp"
#include "fastlinear/contract/quantization.hpp"
#include "fastlinear/driver/integer_rows.hpp"
#include "fastlinear/driver/rows.hpp"
#include "fastlinear/weight/weight.hpp"

namespace fastlinear {

struct EpilogueProgram {
  static constexpr std::size_t kMaxSteps = 4;
  std::array<Step, kMaxSteps> steps;
  std::array<std::array<float, kMaxParams>, kMaxSteps> params;
  std::size_t count;  // at least one: "identity" adds the bias and stores
  Affine out;         // where y is uint8 or int8 (which lies 128 lower)
};

struct Bias {
  const void* data;  // n elements, or null
  Format format;
};

struct Output {
  char* data;
  std::ptrdiff_t stride;  // elements
  Format format;
};

struct Problem {
  std::ptrdiff_t m, n, k;
  Rows x;  // of any format that the plan's kernel reads, or that can be widened or quantized to it
  RowQuantizer quantizer;
  Weight weight;  // in a layout that the plan's kernel reads
  Bias bias;
  Output y;
  EpilogueProgram epilogue;
};

}  // namespace fastlinear
