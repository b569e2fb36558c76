// The arithmetic of blocks that everybody shares.
#pragma once

#include <cstddef>

namespace fastlinear {

constexpr std::ptrdiff_t ceil_div(std::ptrdiff_t a, std::ptrdiff_t b) { return (a + b - 1) / b; }
constexpr std::ptrdiff_t round_up(std::ptrdiff_t a, std::ptrdiff_t step) { return ceil_div(a, step) * step; }

}  // namespace fastlinear
