// What the driver is asked for: y = epilogue(x W^T), with all that it takes.
#pragma once

#include "fastlinear/contract/epilogue.hpp"
#include "fastlinear/contract/quantization.hpp"
#include "fastlinear/driver/integer_rows.hpp"
#include "fastlinear/driver/rows.hpp"
#include "fastlinear/weight/weight.hpp"

namespace fastlinear {

struct Bias {
  const void* data;  // n elements, or null
  Format format;
};

struct Output {
  char* data;
  std::ptrdiff_t stride;  // elements
  Format format;
};

// What a step of the epilogue reads beside the sums: element (row, column) lies at row * row_stride + column *
// column_stride, so that strides of 0 make a row, a column or a single number of it. It may be y itself.
struct Operand {
  const char* data;
  std::ptrdiff_t row_stride, column_stride;  // elements; column_stride is 0 or 1
  Format format;                             // a floating one
};

struct Problem {
  std::ptrdiff_t m, n, k;
  Rows x;  // of any format that the plan's kernel reads, or that can be widened or quantized to it
  RowQuantizer quantizer;
  Weight weight;  // in a layout that the plan's kernel reads
  Bias bias;
  Output y;
  EpilogueProgram epilogue;
  const Operand* operands = nullptr;  // as many as the epilogue names
  std::ptrdiff_t first_row = 0;       // of the operands
};

}  // namespace fastlinear
