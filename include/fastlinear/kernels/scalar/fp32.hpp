// fp32 in plain C++.
#pragma once

#include "fastlinear/kernels/scalar/tile.hpp"

namespace fastlinear::scalar {

inline constexpr Kernel kFp32Kernels[] = {
    {"fp32/scalar/4x16", Isa::scalar, Format::fp32, {Format::fp32, 16, 1}, 4, 1, tile<float, 16, 1>},
};

}  // namespace fastlinear::scalar
