// The contract of the epilogue: what happens to a tile of raw sums while it is in L1.
//
// An epilogue is a short program of steps. The first step adds the bias, every step applies one unary function, the
// last step stores to y what is valid of the tile (in place as well where y is 16-bit: the driver narrows it then). All
// other steps work in place on the tile, whose rows are padded and 64-byte aligned; y is neither, so a step writes
// exactly `rows` x `cols` elements of `out`.
#pragma once

#include <cstddef>

namespace fastlinear {

inline constexpr std::size_t kMaxParams = 2;

struct Activation {
  const char* name;
  std::size_t params;
  float defaults[kMaxParams];
};

struct StepArgs {
  const float* in;  // rows x cols, padded with readable floats to a multiple of 16 columns
  std::ptrdiff_t ld_in;
  float* out;  // may equal `in`
  std::ptrdiff_t ld_out;
  std::ptrdiff_t rows, cols;
  const float* bias;    // `cols` of them, added before the function; or null
  const float* params;  // kMaxParams of them
};

using Step = void (*)(const StepArgs&);

}  // namespace fastlinear
