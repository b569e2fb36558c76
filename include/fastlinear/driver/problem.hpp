// What the driver is asked for: y = epilogue(x W^T), with all that it takes.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>

#include "fastlinear/contract/epilogue.hpp"
#include "fastlinear/formats/all.hpp"
#include "fastlinear/weight/weight.hpp"

namespace fastlinear {

// Row r lies at `data` + stride * r, or * index[r] where there is an index.
struct Rows {
  const char* data;
  std::ptrdiff_t stride;  // elements
  Format format;
  const std::int64_t* index = nullptr;

  const char* at(std::ptrdiff_t row, std::ptrdiff_t k) const {
    const std::ptrdiff_t place = index == nullptr ? row : static_cast<std::ptrdiff_t>(index[row]);
    return data + (place * stride + k) * element_bytes(format);
  }
};

enum class RowKind : std::uint8_t { symmetric, asymmetric, fixed, groups, rounded, as_they_are };

// How the rows of x become what is multiplied. Integers: by a scale and zero point of each row's own, or by the given
// ones, or by a scale for each of the weight's groups; x that is integers already is taken as of the given scale.
// Rounded: to the nearest number of a floating format, ties to even, whatever the kernel then reads it in.
struct RowQuantizer {
  RowKind kind = RowKind::as_they_are;
  float scale = 0.0f;
  std::int32_t zero = 0;          // of uint8; int8 lies 128 lower
  const float* smooth = nullptr;  // k numbers that x is multiplied by first, readable up to a multiple of 16, or null
  Format format = kNumbers;       // that rows are rounded to

  bool makes_integers() const { return kind < RowKind::rounded; }
};

struct Bias {
  const void* data;  // n elements, or null
  Format format;
};

// The columns of y from `first` to those of the next segment: y need not be one matrix (q, k and v of one product).
struct Segment {
  char* data;
  std::ptrdiff_t stride;  // elements
  Format format;
  std::ptrdiff_t first = 0;
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
  Rows x;  // of any format that the plan's kernel reads, or that can be widened, rounded or quantized to it
  RowQuantizer quantizer;
  Weight weight;  // in a layout that the plan's kernel reads
  Bias bias;
  std::span<const Segment> y;  // at least one, the first of column 0, in order
  EpilogueProgram epilogue;
  const Operand* operands = nullptr;      // as many as the epilogue names
  const std::int64_t* y_index = nullptr;  // row r of the result goes to row y_index[r] of y; no two to the same one
  float* sums = nullptr;                  // m x n: x W^T + b, channels as the bias has them, is kept here; or null
};

}  // namespace fastlinear
