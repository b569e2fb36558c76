// The end of a tile while it is in L1: from the kernel's sums to what is stored in y.
#pragma once

#include <algorithm>
#include <cstring>

#include "fastlinear/contract/isa.hpp"
#include "fastlinear/driver/grid.hpp"
#include "fastlinear/driver/problem.hpp"

namespace fastlinear {

namespace gemm_detail {

struct Job {
  const Problem& p;
  const Plan& plan;
  const Vectors& vectors;
  const float* bias;           // n of them, or null
  const RowScale* row_scales;  // of integer rows
  std::size_t absorbed;        // 1 if dequantizing does the first step of the epilogue as well, by `floor`
  float floor;                 // 0 for ReLU, else -infinity
  Grid grid;
  float* partial;  // with K slices: the tiles of all units; otherwise null, tiles are finished where they are made

  std::ptrdiff_t tile_floats() const { return plan.kernel->mr * plan.kernel->columns(); }

  float* partial_tiles(const Unit& u) const {
    const Range tiles = grid.row_tiles_of(u);
    const std::ptrdiff_t before = (u.slice * grid.row_tiles + tiles.begin) * grid.groups + u.group * tiles.size();
    return partial + before * tile_floats();
  }
};

// The numbers that the sums of int8 weights mean, with the bias: s.in -> s.out.
inline void dequantize_tile(const Job& job, const StepArgs& s, std::ptrdiff_t first_row, std::ptrdiff_t column) {
  const Weight& w = job.p.weight;
  DequantizeArgs args{s.in, s.ld_in, s.out, s.ld_out, s.rows, s.cols, w.scales + column, s.bias, job.floor};
  if (job.row_scales == nullptr) return job.vectors.quantization->scale_columns(args);
  args.sums = w.sums + column;
  args.zeros = w.zeros == nullptr ? nullptr : w.zeros + column;
  args.row_scales = job.row_scales + first_row;
  job.vectors.quantization->dequantize(args);
}

// A row of numbers -> the integers of y.
inline void quantize_output(const Problem& p, const Quantization& quantization, const float* row, std::ptrdiff_t n,
                            char* y) {
  quantization.any.uint8(row, n, p.epilogue.out, y);
  if (p.y.format == Format::int8) integer_rows_detail::add_middle(y, n);
}

// The operand of a step: read in place where it lies as a step reads it, else laid out beside the tile.
inline void set_operand(const Job& job, const EpilogueStep& step, std::ptrdiff_t first_row, std::ptrdiff_t column,
                        StepArgs& s) {
  if (step.operand < 0) return;
  const Operand& from = job.p.operands[step.operand];
  const auto at = [&](std::ptrdiff_t row) {
    const std::ptrdiff_t element = (job.p.first_row + first_row + row) * from.row_stride + column * from.column_stride;
    return from.data + element * element_bytes(from.format);
  };
  if (from.format == Format::fp32 && from.column_stride == 1) {
    s.operand = reinterpret_cast<const float*>(at(0));
    s.ld_operand = from.row_stride;
    return;
  }
  thread_local Scratch memory;
  float* const rows = memory.floats(job.tile_floats());
  const auto widen = job.vectors.conversions[static_cast<std::size_t>(from.format)].widen;
  const std::ptrdiff_t elements = from.column_stride == 1 ? s.cols : 1;
  for (std::ptrdiff_t r = 0; r < s.rows; ++r) {
    float* const to = rows + r * s.ld_in;
    if (widen == nullptr)
      std::memcpy(to, at(r), static_cast<std::size_t>(elements) * sizeof(float));
    else
      widen(at(r), to, elements);
    if (from.column_stride == 0) std::fill_n(to + 1, s.cols - 1, *to);
  }
  s.operand = rows;
  s.ld_operand = s.ld_in;
}

// Finishes a tile and stores what is valid of it: at once where y is fp32, else in place and then narrowed.
inline void finish_tile(const Job& job, float* tile, std::ptrdiff_t row_tile, std::ptrdiff_t group) {
  const Problem& p = job.p;
  const Range rows = job.grid.rows_of(row_tile);
  const std::ptrdiff_t columns = job.plan.kernel->columns(), column = group * columns;
  const auto y = [&](std::ptrdiff_t row) {
    return p.y.data + ((rows.begin + row) * p.y.stride + column) * element_bytes(p.y.format);
  };
  StepArgs s{tile, columns, tile, columns, rows.size(), std::min(columns, p.n - column), nullptr, nullptr, nullptr, 0};
  const auto to_y = [&](bool last) {
    if (!last || p.y.format != Format::fp32) return;
    s.out = reinterpret_cast<float*>(y(0));
    s.ld_out = p.y.stride;
  };
  s.bias = job.bias == nullptr ? nullptr : job.bias + column;
  std::size_t i = 0;
  if (p.weight.scales != nullptr) {
    i = job.absorbed;
    to_y(i == p.epilogue.count);
    dequantize_tile(job, s, rows.begin, column);
    s.bias = nullptr;
  }
  for (; i < p.epilogue.count; ++i) {
    const EpilogueStep& step = p.epilogue.steps[i];
    s.params = step.params.data();
    set_operand(job, step, rows.begin, column, s);
    to_y(i + 1 == p.epilogue.count);
    job.vectors.steps[step.function](s);
    s.bias = nullptr;
  }
  if (p.y.format == Format::fp32) return;
  for (std::ptrdiff_t r = 0; r < s.rows; ++r)
    if (is_float(p.y.format))
      job.vectors.conversions[static_cast<std::size_t>(p.y.format)].narrow(tile + r * columns, y(r), s.cols);
    else
      quantize_output(p, *job.vectors.quantization, tile + r * columns, s.cols, y(r));
}

}  // namespace gemm_detail

}  // namespace fastlinear
