// The amx rows of the library, and with them AMX-FP16, which younger CPUs have beside: kernels.
#include <algorithm>
#include <bit>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <iterator>
#include <limits>
#include <span>
#include <utility>

#include "fastlinear/contract/isa.hpp"
#include "fastlinear/host/target.hpp"

FL_TARGET_BEGIN("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,amx-tile,amx-bf16,amx-int8")

#include "fastlinear/isa/amx/bf16.hpp"
#include "fastlinear/isa/amx/dots.hpp"
#include "fastlinear/isa/amx/fp16.hpp"
#include "fastlinear/isa/amx/int8.hpp"

namespace fastlinear {

namespace avx512 {
extern const Isa kIsa;
}
namespace avx512_fp16 {
extern const Isa kIsa;
}

namespace amx {

constexpr std::span<const Kernel> kKernels[] = {kBf16Kernels, kInt8Kernels, kDotKernels};
constexpr CpuBit kNeeds[] = {cpu_bits::kAmxTile, cpu_bits::kAmxBf16, cpu_bits::kAmxInt8};
constexpr const Isa* kAbove[] = {&avx512_fp16::kIsa};

const Isa kIsa{
    .name = "amx",
    .base = &avx512::kIsa,
    .needs = kNeeds,
    .saved = cpu_bits::kTilesSaved,
    .above = kAbove,
    .kernels = kKernels,
    .vectors = nullptr,
    .tiles = true,
};

}  // namespace amx

namespace amx_fp16 {

constexpr std::span<const Kernel> kKernels[] = {kFp16Kernels};
constexpr CpuBit kNeeds[] = {cpu_bits::kAmxFp16};

const Isa kIsa{
    .name = "amx_fp16",
    .base = &amx::kIsa,
    .needs = kNeeds,
    .saved = cpu_bits::kTilesSaved,
    .above = {},
    .kernels = kKernels,
    .vectors = nullptr,
    .tiles = true,
};

}  // namespace amx_fp16

}  // namespace fastlinear

FL_TARGET_END
