// One step of an epilogue over a tile: (in + bias) -> F -> out, F one of the structs in this folder.
#pragma once

#include <cstddef>

#include "fastlinear/contract/epilogue.hpp"
#include "fastlinear/generic/partial.hpp"

namespace fastlinear::epilogues {

// All rows of the columns [c, c + V::width), of which the first `valid` (or more than V::width) exist in `out`. The
// column of the bias stays in a register for all rows, as do F's constants.
template <class V, class F>
[[gnu::always_inline]] inline void step_columns(const StepArgs& s, const float* params, std::ptrdiff_t c,
                                                std::ptrdiff_t valid) {
  const V bias = load_bias<V>(s.bias, c, valid);
  for (std::ptrdiff_t r = 0; r < s.rows; ++r) {
    const V y = F::template apply<V>(V::load(s.in + r * s.ld_in + c) + bias, params);
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
