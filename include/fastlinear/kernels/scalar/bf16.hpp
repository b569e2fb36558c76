// bf16 weights, widened one by one, in plain C++.
#pragma once

#include "fastlinear/formats/bf16.hpp"
#include "fastlinear/kernels/scalar/tile.hpp"

namespace fastlinear::scalar {

inline constexpr Kernel kBf16Kernels[] = {
    {"bf16/scalar/4x16", Isa::scalar, Format::fp32, {Format::bf16, 16, Bf16::kr}, 4, 1, tile<Bf16, 16, Bf16::kr>},
};

}  // namespace fastlinear::scalar
