// The avx2 row of the library: kernels, epilogue steps, conversions and quantization.
#include <algorithm>
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

FL_TARGET_BEGIN("avx2,fma,f16c")

// clang-format off: the vector type comes first
#include "fastlinear/isa/avx2/vec.hpp"
#include "fastlinear/isa/avx2/codes.hpp"
#include "fastlinear/generic/attention.hpp"
#include "fastlinear/generic/convert.hpp"
#include "fastlinear/generic/few_queries.hpp"
#include "fastlinear/generic/norm.hpp"
#include "fastlinear/generic/quantize.hpp"
#include "fastlinear/generic/rotation.hpp"
#include "fastlinear/epilogues/all.hpp"
#include "fastlinear/isa/avx2/fp32.hpp"
#include "fastlinear/isa/avx2/bf16.hpp"
#include "fastlinear/isa/avx2/fp16.hpp"
#include "fastlinear/isa/avx2/w8f.hpp"
#include "fastlinear/isa/avx2/int8.hpp"
#include "fastlinear/isa/avx2/dots.hpp"
// clang-format on

namespace fastlinear {

namespace scalar {
extern const Isa kIsa;
}

namespace avx2 {

constexpr std::span<const Kernel> kKernels[] = {kFp32Kernels, kBf16Kernels,  kFp16Kernels, kW8fKernels, kInt8Kernels,
                                                kInt4Kernels, kInt8gKernels, kFp8Kernels,  kDotKernels};
constexpr CpuBit kNeeds[] = {cpu_bits::kFma, cpu_bits::kAvx, cpu_bits::kF16c, cpu_bits::kAvx2};
constexpr Vectors kVectors{
    .steps = epilogue_steps<F32>,
    .conversions = conversions<F32, Codes, Bytes, Halves>,
    .quantization = &quantization<F32, I32>,
    .norm = norm<F32>,
    .attention = attentions<F32, 6>,
    .few_queries = few_queries<F32>,
    .rounded_attention = nullptr,
    .rotation = rotation<F32>,
    .expand_scales = expand_scales<F32>,
};

const Isa kIsa{
    .name = "avx2",
    .base = &scalar::kIsa,
    .needs = kNeeds,
    .saved = cpu_bits::kYmmSaved,
    .above = {},
    .kernels = kKernels,
    .vectors = &kVectors,
};

}  // namespace avx2

}  // namespace fastlinear

FL_TARGET_END
