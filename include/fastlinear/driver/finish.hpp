// The end of a tile while it is in L1: from the kernel's sums to what is stored in y.
#pragma once

#include <algorithm>
#include <cstring>

#include "fastlinear/driver/job.hpp"

namespace fastlinear {

namespace finish_detail {

// The numbers that the sums of int8 weights mean, with the bias: s.in -> s.out; with the operand, if `adds`.
inline void dequantize_tile(const Job& job, const StepArgs& s, float floor, bool adds, std::ptrdiff_t first_row,
                            std::ptrdiff_t column) {
  const Weight& w = job.p.weight;
  const Quantization& quantization = *job.plan.vectors->quantization;
  DequantizeArgs args{s.in, s.ld_in, s.out, s.ld_out, s.rows, s.cols, w.scales + column, s.bias, floor};
  if (adds) args.added = s.operand, args.ld_added = s.ld_operand;
  if (job.x.scales == nullptr) return quantization.scale_columns(args);
  args.sums = w.sums + column;
  args.zeros = w.zeros == nullptr ? nullptr : w.zeros + column;
  args.row_scales = job.x.scales + first_row;
  quantization.dequantize(args);
}

// The operand of a step: read in place where it lies as a step reads it, else widened beside the tile, once for all
// rows where they are alike.
inline void set_operand(const Job& job, const EpilogueStep& step, std::ptrdiff_t first_row, std::ptrdiff_t column,
                        StepArgs& s) {
  s.operand = s.params, s.ld_operand = 0, s.one_a_row = true;
  if (step.operand < 0) return;
  const Operand& from = job.p.operands[step.operand];
  const auto at = [&](std::ptrdiff_t row) {
    const std::ptrdiff_t element = (job.part.begin + first_row + row) * from.row_stride + column * from.column_stride;
    return from.data + element * element_bytes(from.format);
  };
  s.one_a_row = from.column_stride == 0;
  const auto widen = job.plan.vectors->conversions[static_cast<std::size_t>(from.format)].widen;
  if (widen == nullptr) {  // fp32 already
    s.operand = reinterpret_cast<const float*>(at(0));
    s.ld_operand = from.row_stride;
    return;
  }
  thread_local Scratch memory;
  float* const wide = memory.floats(s.rows * s.ld_in);
  s.operand = wide;
  s.ld_operand = from.row_stride == 0 ? 0 : s.one_a_row ? 1 : s.ld_in;
  for (std::ptrdiff_t r = 0; r < (from.row_stride == 0 ? 1 : s.rows); ++r)
    widen(at(r), wide + r * s.ld_operand, s.one_a_row ? 1 : s.cols);
}

// A row of numbers -> y, in y's format.
inline void store_row(const Job& job, const float* row, std::ptrdiff_t n, Format format, char* y) {
  const FormatInfo& to = info(format);
  if (to.floating) {
    const auto narrow = job.plan.vectors->conversions[static_cast<std::size_t>(format)].narrow;
    if (narrow != nullptr) return narrow(row, y, n);
    std::memcpy(y, row, static_cast<std::size_t>(n) * sizeof(float));
    return;
  }
  job.plan.vectors->quantization->forms[0].any(row, n, job.p.epilogue.out, y);
  if (to.flip != 0) prologue_detail::flip_bytes(y, n, to.flip);
}

// Sums with the bias, in the order of the parameter, to where the problem wants them kept.
inline void keep_sums(const Job& job, StepArgs s, std::ptrdiff_t first_row, std::ptrdiff_t column) {
  const Problem& p = job.p;
  float* const to = p.sums + (job.part.begin + first_row) * p.n;
  if (!p.epilogue.gated) {
    s.params = p.epilogue.steps[0].params.data();
    s.ld_out = p.n;
    s.out = to + column;
    return job.plan.vectors->steps[kIdentity](s);
  }
  for (std::ptrdiff_t c = 0; c < s.cols; ++c) {  // of a panel the gates' half comes first
    const std::ptrdiff_t first = c / (2 * s.gate) * (2 * s.gate), width = std::min(s.gate, (s.cols - first) / 2);
    const std::ptrdiff_t half = (c - first) / width;
    const std::ptrdiff_t channel = half * (p.n / 2) + (column + first) / 2 + (c - first) % width;
    const float bias = job.bias == nullptr ? 0.0f : job.bias[channel];
    for (std::ptrdiff_t r = 0; r < s.rows; ++r) to[r * p.n + channel] = s.in[r * s.ld_in + c] + bias;
  }
}

}  // namespace finish_detail

// What a group of panels makes of the columns of y. A gate makes one column of two sums.
struct TileColumns {
  std::ptrdiff_t first_sum, sums;  // in the order of the panels
  std::ptrdiff_t first, count;     // in y
  std::size_t segment;             // the one that they begin in
  bool one_segment;                // whether they end in it, too

  TileColumns(const Job& job, std::ptrdiff_t group) {
    const Problem& p = job.p;
    const std::ptrdiff_t halves = p.epilogue.gated ? 2 : 1;
    first_sum = group * job.plan.kernel->columns();
    sums = std::min(job.plan.kernel->columns(), p.n - first_sum);
    first = first_sum / halves, count = sums / halves;
    segment = 0;
    while (segment + 1 < p.y.size() && p.y[segment + 1].first <= first) ++segment;
    one_segment = segment + 1 == p.y.size() || p.y[segment + 1].first >= first + count;
  }
};

// The lines that a tile will be finished with, which are fetched while its sums are made: rows of y are far apart, and
// each line that is not there would be waited for; so are those of the first operand that has a number for each. None
// where the tile does not go to rows side by side of one segment.
inline Lines lines_of(const Job& job, const Range& rows, const TileColumns& columns) {
  const Problem& p = job.p;
  if (!columns.one_segment || p.y_index != nullptr) return {};
  const Segment& y = p.y[columns.segment];
  const std::ptrdiff_t row = job.part.begin + rows.begin;
  const auto part = [&](const char* data, std::ptrdiff_t stride, std::ptrdiff_t column, Format format) {
    const std::ptrdiff_t element = element_bytes(format);
    return Lines::Part{data + (row * stride + column) * element, stride * element, columns.count * element};
  };
  Lines lines{rows.size(), part(y.data, y.stride, columns.first - y.first, y.format)};
  for (std::size_t i = 0; i < p.epilogue.count; ++i) {
    if (p.epilogue.steps[i].operand < 0) continue;
    const Operand& from = p.operands[p.epilogue.steps[i].operand];
    if (from.row_stride == 0 || from.column_stride == 0) continue;
    lines.beside = part(from.data, from.row_stride, columns.first, from.format);
    break;
  }
  return lines;
}

// Finishes a tile and stores what is valid of it: at once where its part of y is one fp32 matrix, else in place, and
// then row by row what each segment has of it.
inline void finish_tile(const Job& job, std::byte* tile, const Range& rows, const TileColumns& columns) {
  using namespace finish_detail;
  const Problem& p = job.p;
  const std::ptrdiff_t ld = job.plan.kernel->columns(), halves = p.epilogue.gated ? 2 : 1;
  const std::ptrdiff_t column = columns.first, cols = columns.count;
  const std::size_t first = columns.segment;
  const auto y_at = [&](const Segment& to, std::ptrdiff_t row, std::ptrdiff_t at) {
    const std::ptrdiff_t r = job.part.begin + rows.begin + row;
    const std::ptrdiff_t place = p.y_index == nullptr ? r : static_cast<std::ptrdiff_t>(p.y_index[r]);
    return to.data + (place * to.stride + at - to.first) * element_bytes(to.format);
  };
  const bool at_once = columns.one_segment && p.y[first].format == kNumbers && p.y_index == nullptr;

  auto* const numbers = reinterpret_cast<float*>(tile);
  StepArgs s{numbers, ld,      numbers, ld, rows.size(), columns.sums,
             nullptr, nullptr, nullptr, 0,  false,       p.weight.layout.nr / 2,
             nullptr};
  const auto to_y = [&](bool last) {
    if (!last || !at_once) return;
    s.out = reinterpret_cast<float*>(y_at(p.y[first], 0, column));
    s.ld_out = p.y[first].stride;
  };
  if (job.bias != nullptr && !p.epilogue.gated) s.bias = job.bias + columns.first_sum;
  std::size_t i = 0;
  if (p.weight.scales != nullptr) {  // with the first step, where dequantizing does that on the way
    const EpilogueStep& step = p.epilogue.steps[0];
    const bool relu = step.function == kRelu && p.sums == nullptr;
    bool adds = step.function == kAdd && step.operand >= 0 && p.sums == nullptr;
    if (adds) set_operand(job, step, rows.begin, column, s);
    adds = adds && !s.one_a_row;
    i = relu || adds || (step.function == kIdentity && p.sums == nullptr);
    to_y(i == p.epilogue.count);
    dequantize_tile(job, s, relu ? 0.0f : -kInfinity, adds, rows.begin, columns.first_sum);
    s.bias = nullptr;
  }
  if (p.sums != nullptr) keep_sums(job, s, rows.begin, columns.first_sum);
  if (job.bias != nullptr && p.epilogue.gated) {  // as the parameter has it: those of all gates first
    s.bias = job.bias + column;
    s.bias_through = s.bias + p.n / 2;
  }
  for (; i < p.epilogue.count; ++i) {
    const EpilogueStep& step = p.epilogue.steps[i];
    s.params = step.params.data();
    set_operand(job, step, rows.begin, column, s);
    to_y(i + 1 == p.epilogue.count);
    job.plan.vectors->steps[step.function](s);
    s.bias = nullptr;
    s.cols = cols;
  }
  if (at_once) return;
  if (columns.one_segment && p.y_index == nullptr && is_float(p.y[first].format))  // of 16 bits then
    return job.plan.vectors->conversions[static_cast<std::size_t>(p.y[first].format)].narrow_rows(
        numbers, ld, y_at(p.y[first], 0, column), p.y[first].stride, s.rows, cols);
  for (std::size_t g = first; g < p.y.size() && p.y[g].first < column + cols; ++g) {
    const std::ptrdiff_t begin = std::max(column, p.y[g].first);
    const std::ptrdiff_t end = std::min(column + cols, g + 1 < p.y.size() ? p.y[g + 1].first : p.n / halves);
    for (std::ptrdiff_t r = 0; r < s.rows; ++r)
      store_row(job, numbers + r * ld + begin - column, end - begin, p.y[g].format, y_at(p.y[g], r, begin));
  }
}

}  // namespace fastlinear
