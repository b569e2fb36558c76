// The scalar row of the library: kernels, epilogue steps, conversions and quantization.
#include <algorithm>
#include <array>
#include <bit>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <iterator>
#include <limits>
#include <span>
#include <type_traits>
#include <utility>

#include "fastlinear/contract/isa.hpp"
#include "fastlinear/host/target.hpp"

// clang-format off: the vector type comes first
#include "fastlinear/isa/scalar/vec.hpp"
#include "fastlinear/isa/scalar/codes.hpp"
#include "fastlinear/generic/attention.hpp"
#include "fastlinear/generic/convert.hpp"
#include "fastlinear/generic/few_queries.hpp"
#include "fastlinear/generic/norm.hpp"
#include "fastlinear/generic/quantize.hpp"
#include "fastlinear/generic/rotation.hpp"
#include "fastlinear/epilogues/all.hpp"
#include "fastlinear/isa/scalar/kernels.hpp"
#include "fastlinear/isa/scalar/dots.hpp"
// clang-format on

namespace fastlinear {

namespace scalar {

constexpr std::span<const Kernel> kKernels[] = {kFp32Kernels, kBf16Kernels,  kFp16Kernels, kW8fKernels, kInt8Kernels,
                                                kInt4Kernels, kInt8gKernels, kFp8Kernels,  kDotKernels};
constexpr Vectors kVectors{
    .steps = epilogue_steps<F32>,
    .conversions = conversions<F32, Codes, Bytes, Halves>,
    .quantization = &quantization<F32, I32>,
    .norm = norm<F32>,
    .attention = attentions<F32, 4>,
    .few_queries = few_queries<F32>,
    .rounded_attention = nullptr,
    .rotation = rotation<F32>,
    .expand_scales = expand_scales<F32>,
};

const Isa kIsa{
    .name = "scalar",
    .base = nullptr,
    .needs = {},
    .saved = 0,
    .above = {},
    .kernels = kKernels,
    .vectors = &kVectors,
};

}  // namespace scalar

}  // namespace fastlinear
