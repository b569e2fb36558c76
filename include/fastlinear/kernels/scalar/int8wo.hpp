// int8 weights for fp32 rows, widened one by one, in plain C++.
#pragma once

#include "fastlinear/formats/int8.hpp"
#include "fastlinear/kernels/scalar/tile.hpp"

namespace fastlinear::scalar {

inline constexpr Kernel kInt8woKernels[] = {
    {"int8wo/scalar/4x16", Isa::scalar, Format::fp32, {Format::int8wo, 16, Int8::kr}, 4, 1, tile<Int8, 16, Int8::kr>},
};

}  // namespace fastlinear::scalar
