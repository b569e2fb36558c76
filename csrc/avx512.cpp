// The avx512 row of the library: kernels, epilogue steps, conversions and quantization.
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

FL_TARGET_BEGIN("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma")

// clang-format off: the vector type comes first
#include "fastlinear/isa/avx512/vec.hpp"
#include "fastlinear/isa/avx512/codes.hpp"
#include "fastlinear/generic/attention.hpp"
#include "fastlinear/generic/convert.hpp"
#include "fastlinear/generic/few_queries.hpp"
#include "fastlinear/generic/norm.hpp"
#include "fastlinear/generic/quantize.hpp"
#include "fastlinear/generic/rotation.hpp"
#include "fastlinear/generic/rounded_attention.hpp"
#include "fastlinear/epilogues/all.hpp"
#include "fastlinear/isa/avx512/fp32.hpp"
#include "fastlinear/isa/avx512/bf16.hpp"
#include "fastlinear/isa/avx512/fp16.hpp"
#include "fastlinear/isa/avx512/w8f.hpp"
#include "fastlinear/isa/avx512/int8.hpp"
// clang-format on

namespace fastlinear {

namespace avx2 {
extern const Isa kIsa;
}
namespace avx_vnni {
extern const Isa kIsa;
}

namespace avx512 {

constexpr std::span<const Kernel> kKernels[] = {kFp32Kernels, kBf16Kernels, kFp16Kernels,  kW8fKernels,
                                                kInt8Kernels, kInt4Kernels, kInt8gKernels, kFp8Kernels};
constexpr CpuBit kNeeds[] = {cpu_bits::kAvx512F, cpu_bits::kAvx512Dq, cpu_bits::kAvx512Bw, cpu_bits::kAvx512Vl};
constexpr const Isa* kAbove[] = {&avx_vnni::kIsa};
constexpr Vectors kVectors{
    .steps = epilogue_steps<F32>,
    .conversions = conversions<F32, Codes, Bytes, Halves>,
    .quantization = &quantization<F32, I32>,
    .norm = norm<F32>,
    .attention = attentions<F32, 14>,
    .few_queries = few_queries<F32>,
    .rounded_attention = &rounded_attention<F32>,
    .rotation = rotation<F32>,
    .expand_scales = expand_scales<F32>,
};

const Isa kIsa{
    .name = "avx512",
    .base = &avx2::kIsa,
    .needs = kNeeds,
    .saved = cpu_bits::kZmmSaved,
    .above = kAbove,
    .kernels = kKernels,
    .vectors = &kVectors,
};

}  // namespace avx512

}  // namespace fastlinear

FL_TARGET_END
