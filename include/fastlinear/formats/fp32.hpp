// fp32: a weight element is its own number.
#pragma once

#include "fastlinear/kernel.hpp"

namespace fastlinear {

struct Fp32 {
  using Element = float;
  static constexpr Format format = Format::fp32;
};

}  // namespace fastlinear
