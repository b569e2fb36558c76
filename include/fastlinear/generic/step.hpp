// One step of an epilogue over a tile: (in + bias) -> F -> out, F one of the structs in epilogues/.
#pragma once

#include <cstddef>

#include "fastlinear/contract/epilogue.hpp"
#include "fastlinear/generic/partial.hpp"

namespace fastlinear::epilogues {

// Of two operands is a function that says so: `static constexpr std::size_t operands = 1`.
template <class F>
inline constexpr std::size_t operands_of = 0;
template <class F>
  requires(F::operands > 0)
inline constexpr std::size_t operands_of<F> = F::operands;

// All rows of the columns [c, c + V::width), of which the first `valid` (or more than V::width) exist in `out`. The
// column of the bias stays in a register for all rows, as do F's constants.
template <class V, class F>
[[gnu::always_inline]] inline void step_columns(const StepArgs& s, const float* params, std::ptrdiff_t c,
                                                std::ptrdiff_t valid) {
  const V bias = load_bias<V>(s.bias, c, valid);
  for (std::ptrdiff_t r = 0; r < s.rows; ++r) {
    const V x = V::load(s.in + r * s.ld_in + c) + bias;
    V y;
    if constexpr (operands_of<F> == 0)
      y = F::template apply<V>(x, params);
    else
      y = F::template apply<V>(x, load_valid<V>(s.operand + r * s.ld_operand + c, valid), params);
    store_valid(s.out + r * s.ld_out + c, y, valid);
  }
}

template <class V, class F>
void step(const StepArgs& args) {
  // Copies: `out` cannot alias them, so the loops keep them in registers.
  const StepArgs s = args;
  float params[kMaxParams];
  for (std::size_t i = 0; i < kMaxParams; ++i) params[i] = s.params[i];
  for (std::ptrdiff_t c = 0; c < s.cols; c += V::width) step_columns<V, F>(s, params, c, s.cols - c);
}

}  // namespace fastlinear::epilogues
