// One step of an epilogue over a tile: (in + bias) -> F -> out, F one of the structs in epilogues/.
#pragma once

#include <algorithm>
#include <cstddef>

#include "fastlinear/contract/epilogue.hpp"
#include "fastlinear/generic/partial.hpp"
#include "fastlinear/generic/several.hpp"

namespace fastlinear::epilogues {

// Of two operands is a function that says so: `static constexpr std::size_t operands = 1`.
template <class F>
inline constexpr std::size_t operands_of = 0;
template <class F>
  requires(F::operands > 0)
inline constexpr std::size_t operands_of<F> = F::operands;

// A gate is a function that says so: `static constexpr bool gate = true`.
template <class F>
inline constexpr bool is_gate = false;
template <class F>
  requires(F::gate)
inline constexpr bool is_gate<F> = true;

// Has do_rows.operator()<n>(r) do the n rows from r on, until all are done.
template <class V, class DoRows>
[[gnu::always_inline]] inline void each_rows(std::ptrdiff_t rows, DoRows do_rows) {
  constexpr int n = V::rows_in_step;
  std::ptrdiff_t r = 0;
  for (; r + n <= rows; r += n) do_rows.template operator()<n>(r);
  for (; r < rows; ++r) do_rows.template operator()<1>(r);
}

// All rows of the columns [c, c + V::width), of which the first `valid` (or more than V::width) exist in `out`. The
// column of the bias stays in a register for all rows, as do F's constants.
template <class V, class F, bool OneARow>
[[gnu::always_inline]] inline void step_columns(const StepArgs& s, const float* params, std::ptrdiff_t c,
                                                std::ptrdiff_t valid) {
  const V bias = load_bias<V>(s.bias, c, valid);
  each_rows<V>(s.rows, [&]<int N>(std::ptrdiff_t first) __attribute__((always_inline)) {
    using Rows = Several<V, N>;
    const Rows x = Rows::each([&](int r) { return V::load(s.in + (first + r) * s.ld_in + c) + bias; });
    Rows y;
    if constexpr (operands_of<F> == 0) {
      y = F::template apply<Rows>(x, params);
    } else {
      const Rows operand = Rows::each([&](int r) {
        const float* const row = s.operand + (first + r) * s.ld_operand;
        return OneARow ? V::set(*row) : load_valid<V>(row + c, valid);
      });
      y = F::template apply<Rows>(x, operand, params);
    }
#pragma GCC unroll 8
    for (int r = 0; r < N; ++r) store_valid(s.out + (first + r) * s.ld_out + c, y.of[r], valid);
  });
}

// All rows of `width` columns at most V::width: of the gate from column c, of what it lets through behind it.
template <class V, class F>
[[gnu::always_inline]] inline void gate_columns(const StepArgs& s, const float* params, std::ptrdiff_t c,
                                                std::ptrdiff_t through, std::ptrdiff_t out, std::ptrdiff_t valid) {
  const V bias = load_bias<V>(s.bias, out, valid), bias_through = load_bias<V>(s.bias_through, out, valid);
  each_rows<V>(s.rows, [&]<int N>(std::ptrdiff_t first) __attribute__((always_inline)) {
    using Rows = Several<V, N>;
    const float* const in = s.in + first * s.ld_in;
    const Rows gate = Rows::each([&](int r) { return V::load(in + r * s.ld_in + c) + bias; });
    const Rows x = Rows::each([&](int r) { return load_valid<V>(in + r * s.ld_in + through, valid) + bias_through; });
    const Rows y = F::template apply<Rows>(gate, params) * F::template through<Rows>(x, params);
#pragma GCC unroll 8
    for (int r = 0; r < N; ++r) store_valid(s.out + (first + r) * s.ld_out + out, y.of[r], valid);
  });
}

template <class V, class F>
void step(const StepArgs& args) {
  // Copies: `out` cannot alias them, so the loops keep them in registers.
  const StepArgs s = args;
  float params[kMaxParams];
  for (std::size_t i = 0; i < kMaxParams; ++i) params[i] = s.params[i];
  if constexpr (is_gate<F>) {
    for (std::ptrdiff_t first = 0; first < s.cols; first += 2 * s.gate) {
      const std::ptrdiff_t width = std::min(s.gate, (s.cols - first) / 2);
      for (std::ptrdiff_t c = 0; c < width; c += V::width)
        gate_columns<V, F>(s, params, first + c, first + width + c, first / 2 + c, width - c);
    }
  } else {
    const auto all_columns = [&]<bool OneARow>() __attribute__((always_inline)) {
      for (std::ptrdiff_t c = 0; c < s.cols; c += V::width) step_columns<V, F, OneARow>(s, params, c, s.cols - c);
    };
    if (operands_of<F> > 0 && s.one_a_row)
      all_columns.template operator()<operands_of<F> != 0>();
    else
      all_columns.template operator()<false>();
  }
}

}  // namespace fastlinear::epilogues
