// The contract of norms, which is what the driver needs: LayerNorm, where `centered`, and RMSNorm of one row in fp32,
// in the order of fastlinear/spec/norms.py. Statistics are fp32 sums of many partial ones; the variance is that of what
// the mean leaves, in a second pass over a row that is in L1.
#pragma once

#include <cstddef>

namespace fastlinear {

struct NormArgs {
  const float* x;         // n numbers, as in all below, at any address
  const float* residual;  // added to x before all else; or null
  float* sum;             // x + residual, kept: needed with a residual, and may be x or y
  float* y;               // may be x
  std::ptrdiff_t n;
  const float* weight;  // or null for 1
  const float* bias;    // or null for 0
  float offset;         // of the weight: Gemma's is 1
  float eps;
  bool centered;
};

using Norm = void (*)(const NormArgs&);

}  // namespace fastlinear
