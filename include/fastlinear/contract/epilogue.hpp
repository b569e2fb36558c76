// The contract of the epilogue: what happens to a tile of raw sums while it is in L1.
//
// An epilogue is a short program of steps, each a function of the table by its number (epilogues/all.hpp), its
// parameters, and for a function of two operands which of those that come with the call, or a number that stands for
// it. It is data: the same for every ISA, whose own functions the driver looks up. A gate, which may be the first step
// only, takes the channels of the weight in turns: some whose sums it lets through some others, which halves the
// columns. The first step adds the bias, the last one stores to y what is valid of the tile (in place as well where y
// is not fp32: the driver converts it then). All other steps work in place on the tile, whose rows are padded and
// 64-byte aligned; y is neither, so a step writes exactly `rows` x `cols` elements of `out`.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>

#include "fastlinear/contract/quantization.hpp"

namespace fastlinear {

inline constexpr std::size_t kMaxParams = 2;

struct EpilogueFunction {
  const char* name;
  std::size_t params;
  float defaults[kMaxParams];
  std::size_t operands;  // beside the sums: 0 for an activation, 1 for "add" and the like
  bool gate;             // half of the columns go in, times the function of the other half
};

// The numbers of those that dequantizing does on the way where they come first: nothing, a maximum, a residual.
inline constexpr std::size_t kIdentity = 0, kRelu = 1, kAdd = 2;

struct EpilogueStep {
  std::uint32_t function;
  std::int32_t operand;  // the place of its operand among those of the call; -1 where that is the first parameter
  std::array<float, kMaxParams> params;
};

struct EpilogueProgram {
  static constexpr std::size_t kMaxSteps = 8, kMaxOperands = kMaxSteps;
  std::array<EpilogueStep, kMaxSteps> steps;
  std::size_t count;  // at least one: "identity" adds the bias and stores
  bool gated;         // the first step is a gate
  Affine out;         // where y is uint8 or int8 (which lies 128 lower)
};

struct StepArgs {
  const float* in;  // rows x cols, padded with readable floats to a multiple of 16 columns
  std::ptrdiff_t ld_in;
  float* out;  // may equal `in`
  std::ptrdiff_t ld_out;
  std::ptrdiff_t rows, cols;
  const float* bias;     // `cols` of them, added before the function; or null
  const float* params;   // kMaxParams of them
  const float* operand;  // rows x cols, of which no more may be read, or one number a row
  std::ptrdiff_t ld_operand;
  bool one_a_row = false;
  // Of a gate: so many columns of sums to apply its function to lie before as many that go through them, which have a
  // bias of their own; `bias` and this are in the order of y.
  std::ptrdiff_t gate = 0;
  const float* bias_through = nullptr;
};

using Step = void (*)(const StepArgs&);

}  // namespace fastlinear
