// fp16 weights, widened one by one, in plain C++.
#pragma once

#include "fastlinear/formats/fp16.hpp"
#include "fastlinear/kernels/scalar/tile.hpp"

namespace fastlinear::scalar {

inline constexpr Kernel kFp16Kernels[] = {
    {"fp16/scalar/4x16", Isa::scalar, Format::fp32, {Format::fp16, 16, Fp16::kr}, 4, 1, tile<Fp16, 16, Fp16::kr>},
};

}  // namespace fastlinear::scalar
