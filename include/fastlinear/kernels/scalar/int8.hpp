// int8 x int8 in plain C++.
#pragma once

#include "fastlinear/formats/int8.hpp"
#include "fastlinear/kernels/scalar/tile.hpp"

namespace fastlinear::scalar {

inline constexpr Kernel kInt8Kernels[] = {
    {"int8/scalar/4x8",
     Isa::scalar,
     Format::uint8,
     {Format::int8, 8, Int8::dot_kr},
     4,
     1,
     tile<std::int8_t, 8, Int8::dot_kr, std::uint8_t, std::int32_t>,
     Format::int32},
};

}  // namespace fastlinear::scalar
