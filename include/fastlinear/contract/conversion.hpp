// The contract of conversions between formats, which is what the driver needs.
#pragma once

#include <cstddef>

#include "fastlinear/contract/format.hpp"

namespace fastlinear {

// The first k steps of `channels` channels of a packed panel, which are all of it but where panels have groups -> the
// same in a floating format: [k][channels] in fp32, [(k + 1) / 2][channels][2] in bf16 and fp16. Exact, but for weights
// that are scaled in groups, which bf16 rounds to nearest even. Or codes -> the integers that they mean, as int8g.
// `out` has room for all k of the last group.
struct ConvertArgs {
  const void* panel;  // where the group of the first k begins
  const Layout& layout;
  std::ptrdiff_t first, channels, k;
  void* out;
  const ScaledGroups* groups;
};
using ConvertPanel = void (*)(const ConvertArgs&);

// Scales of so many groups that kernels do not read, of nr channels, as fp32 [group][nr].
using ExpandScales = void (*)(const ScaledGroups& how, const char* from, std::ptrdiff_t groups, std::ptrdiff_t nr,
                              float* out);

// The functions of one ISA and one format; null where there is nothing to do (fp32) or no use for it. `n` elements at
// any address, side by side.
struct Conversion {
  void (*widen)(const void* in, float* out, std::ptrdiff_t n);   // exact
  void (*narrow)(const float* in, void* out, std::ptrdiff_t n);  // to nearest, ties to even; NaN stays NaN
  ConvertPanel panel_to[3];                                      // fp32, bf16, fp16
  // `narrow` of `rows` rows, ld_in and ld_out elements apart.
  void (*narrow_rows)(const float* in, std::ptrdiff_t ld_in, void* out, std::ptrdiff_t ld_out, std::ptrdiff_t rows,
                      std::ptrdiff_t n);
  ConvertPanel panel_to_bytes = nullptr;  // int8g

  ConvertPanel panel_in(Format format) const {
    return format == Format::int8g ? panel_to_bytes : panel_to[static_cast<std::size_t>(format)];
  }
};

}  // namespace fastlinear
