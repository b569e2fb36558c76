// attention.hpp's rotary embedding, written once over a vector type; included inside an ISA's target region.
#pragma once

#include <cstddef>

#include "fastlinear/contract/attention.hpp"
#include "fastlinear/generic/partial.hpp"

namespace fastlinear {

// Both halves of a head at a time, as each needs the other.
template <class V>
void rotation(const RotationArgs& given) {
  const RotationArgs args = given;  // a copy, which y cannot alias
  const std::ptrdiff_t half = args.size / 2;
  for (std::ptrdiff_t i = 0; i < half; i += V::width) {
    const std::ptrdiff_t valid = half - i;
    const auto at = [&](const float* p) { return load_valid<V>(p + i, valid); };
    const V low = at(args.x), high = at(args.x + half);
    store_valid(args.y + i, low * at(args.cos) - high * at(args.sin), valid);
    store_valid(args.y + half + i, high * at(args.cos + half) + low * at(args.sin + half), valid);
  }
}

}  // namespace fastlinear
