// The arithmetic of blocks that everybody shares.
#pragma once

#include <cstddef>

namespace fastlinear {

constexpr std::ptrdiff_t ceil_div(std::ptrdiff_t a, std::ptrdiff_t b) { return (a + b - 1) / b; }
// To steps that are powers of two.
constexpr std::ptrdiff_t round_up(std::ptrdiff_t a, std::ptrdiff_t step) { return (a + step - 1) & -step; }

}  // namespace fastlinear
