// The avx_vnni row of the library: kernels.
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

FL_TARGET_BEGIN("avx2,fma,f16c,avxvnni")

#include "fastlinear/isa/avx_vnni/dots.hpp"
#include "fastlinear/isa/avx_vnni/int8.hpp"

namespace fastlinear {

namespace avx2 {
extern const Isa kIsa;
}

namespace avx_vnni {

constexpr std::span<const Kernel> kKernels[] = {kInt8Kernels, kDotKernels};
constexpr CpuBit kNeeds[] = {cpu_bits::kAvxVnni};

const Isa kIsa{
    .name = "avx_vnni",
    .base = &avx2::kIsa,
    .needs = kNeeds,
    .saved = cpu_bits::kYmmSaved,
    .above = {},
    .kernels = kKernels,
    .vectors = nullptr,
};

}  // namespace avx_vnni

}  // namespace fastlinear

FL_TARGET_END
