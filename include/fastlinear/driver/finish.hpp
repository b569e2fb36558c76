// The end of a tile while it is in L1: from the kernel's sums to what is stored in y.
#pragma once

#include <algorithm>
#include <cstring>

#include "fastlinear/driver/job.hpp"

namespace fastlinear {

namespace finish_detail {

// What a step reads beside the sums, from the first row on and for the columns of a group of panels.
struct TileOperand {
  const char* data;
  std::ptrdiff_t row_bytes, ld;
  bool one_row, one_a_row;
  decltype(Conversion::widen) widen;  // null where it is fp32 already

  TileOperand() = default;
  TileOperand(const Job& job, const Operand& from, std::ptrdiff_t column)
      : row_bytes(from.row_stride * element_bytes(from.format)),
        ld(from.row_stride),
        one_row(from.row_stride == 0),
        one_a_row(from.column_stride == 0),
        widen(job.plan.vectors->conversions[static_cast<std::size_t>(from.format)].widen) {
    const std::ptrdiff_t element = job.part.begin * from.row_stride + column * from.column_stride;
    data = from.data + element * element_bytes(from.format);
  }

  // Read in place where it lies as a step reads it, else widened beside the tile, once for all rows where they are
  // alike.
  void set(std::ptrdiff_t first_row, StepArgs& s) const {
    const char* const at = data + first_row * row_bytes;
    s.one_a_row = one_a_row;
    if (widen == nullptr) {
      s.operand = reinterpret_cast<const float*>(at);
      s.ld_operand = ld;
      return;
    }
    thread_local Scratch memory;
    float* const wide = memory.floats(s.rows * s.ld_in);
    s.operand = wide;
    s.ld_operand = one_row ? 0 : one_a_row ? 1 : s.ld_in;
    for (std::ptrdiff_t r = 0; r < (one_row ? 1 : s.rows); ++r)
      widen(at + r * row_bytes, wide + r * s.ld_operand, one_a_row ? 1 : s.cols);
  }
};

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

// How the tiles of a group of panels are finished: what follows from the group alone is found once for all of them,
// since a tile may be a hundred numbers. A gate makes one column of y of two sums.
class Finish {
 public:
  Finish(const Job& job, std::ptrdiff_t group)
      : job_(job), p_(job.p), ld_(job.plan.kernel->columns()), first_sum_(group * job.plan.kernel->columns()) {
    const std::ptrdiff_t halves = p_.epilogue.gated ? 2 : 1;
    sums_ = std::min(ld_, p_.n - first_sum_);
    column_ = first_sum_ / halves, columns_ = sums_ / halves;
    while (segment_ + 1 < p_.y.size() && p_.y[segment_ + 1].first <= column_) ++segment_;
    const bool one_segment = segment_ + 1 == p_.y.size() || p_.y[segment_ + 1].first >= column_ + columns_;
    side_by_side_ = one_segment && p_.y_index == nullptr;
    at_once_ = side_by_side_ && p_.y[segment_].format == kNumbers;
    for (std::size_t i = 0; i < p_.epilogue.count; ++i) {
      const std::int32_t operand = p_.epilogue.steps[i].operand;
      if (operand >= 0) operands_[i] = finish_detail::TileOperand(job_, p_.operands[operand], column_);
    }
    if (p_.weight.scales != nullptr && p_.sums == nullptr) {
      const EpilogueStep& step = p_.epilogue.steps[0];
      relu_ = step.function == kRelu;
      adds_ = step.function == kAdd && step.operand >= 0 && !operands_[0].one_a_row;
      first_step_ = relu_ || adds_ || step.function == kIdentity ? 1 : 0;
    }
    if (side_by_side_) set_lines();
  }

  // The lines that a tile will be finished with, which are fetched while its sums are made: rows of y are far apart,
  // and each line that is not there would be waited for; so are those of the first operand that has a number for each.
  // None where the tile does not go to rows side by side of one segment.
  Lines lines(const Range& rows) const {
    Lines lines = lines_;
    lines.rows = side_by_side_ ? rows.size() : 0;
    lines.y.from += rows.begin * lines.y.stride;
    lines.beside.from += rows.begin * lines.beside.stride;
    return lines;
  }

  // Finishes a tile and stores what is valid of it: at once where its part of y is one fp32 matrix, else in place, and
  // then row by row what each segment has of it.
  void tile(std::byte* sums, const Range& rows) const {
    auto* const numbers = reinterpret_cast<float*>(sums);
    const std::size_t count = p_.epilogue.count;
    StepArgs s{numbers, ld_,     numbers, ld_, rows.size(), sums_,
               nullptr, nullptr, nullptr, 0,   false,       p_.weight.layout.nr / 2,
               nullptr};
    const auto to_y = [&](bool last) {
      if (!last || !at_once_) return;
      s.out = reinterpret_cast<float*>(y_at(p_.y[segment_], rows.begin, column_));
      s.ld_out = p_.y[segment_].stride;
    };
    if (job_.bias != nullptr && !p_.epilogue.gated) s.bias = job_.bias + first_sum_;
    if (p_.weight.scales != nullptr) {
      to_y(first_step_ == count);
      dequantize(s, rows);
      s.bias = nullptr;
    }
    if (p_.sums != nullptr) finish_detail::keep_sums(job_, s, rows.begin, first_sum_);
    if (job_.bias != nullptr && p_.epilogue.gated) {  // as the parameter has it: those of all gates first
      s.bias = job_.bias + column_;
      s.bias_through = s.bias + p_.n / 2;
    }
    for (std::size_t i = first_step_; i < count; ++i) {
      const EpilogueStep& step = p_.epilogue.steps[i];
      s.params = s.operand = step.params.data();
      s.ld_operand = 0, s.one_a_row = true;
      if (step.operand >= 0) operands_[i].set(rows.begin, s);
      to_y(i + 1 == count);
      job_.plan.vectors->steps[step.function](s);
      s.bias = nullptr;
      s.cols = columns_;
    }
    if (!at_once_) store(numbers, rows);
  }

 private:
  void set_lines() {
    const auto part = [&](const char* data, std::ptrdiff_t stride, std::ptrdiff_t column, Format format) {
      const std::ptrdiff_t element = element_bytes(format);
      return Lines::Part{data + (job_.part.begin * stride + column) * element, stride * element, columns_ * element};
    };
    const Segment& y = p_.y[segment_];
    lines_.y = part(y.data, y.stride, column_ - y.first, y.format);
    for (std::size_t i = 0; i < p_.epilogue.count; ++i) {
      if (p_.epilogue.steps[i].operand < 0) continue;
      const Operand& from = p_.operands[p_.epilogue.steps[i].operand];
      if (from.row_stride == 0 || from.column_stride == 0) continue;
      lines_.beside = part(from.data, from.row_stride, column_, from.format);
      return;
    }
  }

  // The numbers that the sums of int8 weights mean, with the bias: s.in -> s.out; with the first step, or without.
  void dequantize(StepArgs& s, const Range& rows) const {
    const Weight& w = p_.weight;
    const Quantization& quantization = *job_.plan.vectors->quantization;
    const float floor = relu_ ? 0.0f : -kInfinity;
    DequantizeArgs args{s.in, s.ld_in, s.out, s.ld_out, s.rows, s.cols, w.scales + first_sum_, s.bias, floor};
    if (adds_) {
      operands_[0].set(rows.begin, s);
      args.added = s.operand, args.ld_added = s.ld_operand;
    }
    if (job_.x.scales == nullptr) return quantization.scale_columns(args);
    args.sums = w.sums + first_sum_;
    args.zeros = w.zeros == nullptr ? nullptr : w.zeros + first_sum_;
    args.row_scales = job_.x.scales + rows.begin;
    quantization.dequantize(args);
  }

  void store(const float* numbers, const Range& rows) const {
    if (side_by_side_ && is_float(p_.y[segment_].format))  // of 16 bits then
      return job_.plan.vectors->conversions[static_cast<std::size_t>(p_.y[segment_].format)].narrow_rows(
          numbers, ld_, y_at(p_.y[segment_], rows.begin, column_), p_.y[segment_].stride, rows.size(), columns_);
    const std::ptrdiff_t all = p_.epilogue.gated ? p_.n / 2 : p_.n;
    for (std::size_t g = segment_; g < p_.y.size() && p_.y[g].first < column_ + columns_; ++g) {
      const std::ptrdiff_t begin = std::max(column_, p_.y[g].first);
      const std::ptrdiff_t end = std::min(column_ + columns_, g + 1 < p_.y.size() ? p_.y[g + 1].first : all);
      for (std::ptrdiff_t r = 0; r < rows.size(); ++r)
        finish_detail::store_row(job_, numbers + r * ld_ + begin - column_, end - begin, p_.y[g].format,
                                 y_at(p_.y[g], rows.begin + r, begin));
    }
  }

  char* y_at(const Segment& to, std::ptrdiff_t row, std::ptrdiff_t column) const {
    const std::ptrdiff_t r = job_.part.begin + row;
    const std::ptrdiff_t place = p_.y_index == nullptr ? r : static_cast<std::ptrdiff_t>(p_.y_index[r]);
    return to.data + (place * to.stride + column - to.first) * element_bytes(to.format);
  }

  const Job& job_;
  const Problem& p_;
  std::ptrdiff_t ld_, first_sum_, sums_;  // columns of a tile; of W, in the order of the panels
  std::ptrdiff_t column_, columns_;       // of y
  std::size_t segment_ = 0;               // the one that they begin in
  bool side_by_side_, at_once_;           // whether they end in it, too, and rows follow one another; and are fp32
  bool relu_ = false, adds_ = false;      // what dequantizing does on the way, if sums are not kept before
  std::size_t first_step_ = 0;            // 1 where that is the first step of the epilogue
  finish_detail::TileOperand operands_[EpilogueProgram::kMaxSteps];
  Lines lines_{};
};

}  // namespace fastlinear
