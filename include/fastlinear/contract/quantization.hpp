// The contract between numbers and integers, which is what the driver needs of int8. The formulas
// are those of fastlinear/spec/int8.py, step by step in fp32 and never fused, so that all ISAs give the same bits.
#pragma once

#include <cstddef>
#include <cstdint>
#include <limits>

#include "fastlinear/contract/format.hpp"

namespace fastlinear {

inline constexpr float kInfinity = std::numeric_limits<float>::infinity();

// How one row of x became integers: x = scale * (u - zero). A scale of NaN makes the row of y NaN.
struct RowScale {
  float scale;
  std::int32_t zero;
  std::int32_t sum;  // of (u - zero), where the weight has zero points
};

struct Extremes {
  float least, greatest;  // of the row and 0
  bool finite;            // no infinity, no NaN; the extremes mean nothing otherwise
};

// u = round(clamp(x * inverse, low, high)) + zero
struct Affine {
  float inverse, low, high;
  std::int32_t zero;
};

struct DequantizeArgs {
  const void* in;  // sums of the kernel, int32 or fp32, rows x cols; `in` and `out` as in StepArgs
  std::ptrdiff_t ld_in;
  float* out;
  std::ptrdiff_t ld_out;
  std::ptrdiff_t rows, cols;
  const float* scales;                   // of the columns; readable as far as `in` is
  const float* bias = nullptr;           // `cols` of them, or null
  float floor = -kInfinity;              // of y: 0 for ReLU; a NaN passes
  const std::int32_t* sums = nullptr;    // of the columns of W
  const std::int32_t* zeros = nullptr;   // of the columns, or null where all are 0
  const RowScale* row_scales = nullptr;  // of the rows
  const float* added = nullptr;          // rows x cols, after all else, of which no more may be read; or null
  std::ptrdiff_t ld_added = 0;
};

// x -> integers; false if there is a NaN among x, which becomes the lowest one.
using Quantize = bool (*)(const float* x, std::ptrdiff_t n, const Affine& affine, void* out);

// One row of x, made int8 by groups of `size` numbers: x = scale * u, each group by its own largest magnitude, or all
// by `scale` where that is not negative. What is beside them: contract/kernel.hpp, RowGroups; scales are multiplied by
// `unit`, in which the weights count.
struct GroupedRow {
  const float* x;
  std::ptrdiff_t n, size;
  float scale, unit;
  std::int8_t* out;
  float* scales;
  std::int32_t* starts;
  float* totals;
};

inline constexpr std::ptrdiff_t kStarts = 5, kEnds = 16;

// How weights become codes in groups: what fastlinear/spec/grouping.py asks of its Coding.
struct CodeSearch {
  std::ptrdiff_t group;
  Format scales;          // and offsets: fp32, bf16 or fp16
  bool offsets, coded;    // coded: by a table of 16 numbers; else they are integers of 8 bits
  bool even;              // rounding finds the nearest of the numbers
  float low, high;        // of the numbers
  float more;             // how much more fp32 tells than scales, but for two roundings
  float shrunk[kStarts];  // scales to begin with, over plain ones
  struct End {
    float number, upper;
  } extremes[kEnds];  // numbers to which the extremes of a group may have been taken
  std::ptrdiff_t ends;
  float numbers[16], between[15];  // of a table that is not even: each, and the middles of neighbors
  std::uint8_t order[16];          // its codes in the order of their numbers
};

// One row of a weight, and where its codes go, and the scales and offsets of its groups; a scale is NaN, and its codes
// are nothing, where the group has an infinity or a NaN.
struct CodedRow {
  const float* w;
  std::ptrdiff_t k;
  const CodeSearch* how;
  float* scratch;  // code_scratch(how.group) of them
  std::uint8_t* codes;
  char *scales, *offsets;
};

// The group, its padding, what it stands for, three sums, four spellings by numbers and by codes.
constexpr std::ptrdiff_t code_scratch(std::ptrdiff_t group) { return 11 * group; }

// A form of integer rows that kernels read.
struct RowForm {
  Format rows;
  bool centered;         // the zero point is subtracted from them; else it stands beside them
  Quantize any, finite;  // the latter for x without NaN, and faster
};

// The functions of one ISA; `n` elements side by side at any address.
struct Quantization {
  Extremes (*extremes)(const float* x, std::ptrdiff_t n);
  Extremes (*magnitude)(const float* x, std::ptrdiff_t n);  // -a and a, where a is the larger of the extremes
  RowForm forms[3];                                         // uint8, int16; int8, which `by_groups` makes
  void (*by_groups)(const GroupedRow& row);
  // A channel of a weight = scale * integers; its scale, NaN where it has an infinity or a NaN.
  float (*channel)(const float* w, std::ptrdiff_t n, std::int8_t* integers);
  void (*codes)(const CodedRow& row);
  // y = max((float(sum - zero_x * sums - zero_w * sum_x) * scale_w) * scale_x + bias, floor) + added, of int32 sums
  void (*dequantize)(const DequantizeArgs& args);
  // y = max(sum * scale_w + bias, floor) + added, of fp32 sums
  void (*scale_columns)(const DequantizeArgs& args);
};

}  // namespace fastlinear
