// The avx512_vnni row of the library: kernels.
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

FL_TARGET_BEGIN("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,avx512vnni")

#include "fastlinear/isa/avx512_vnni/dots.hpp"
#include "fastlinear/isa/avx512_vnni/int8.hpp"

namespace fastlinear {

namespace avx512 {
extern const Isa kIsa;
}

namespace avx512_vnni {

constexpr std::span<const Kernel> kKernels[] = {kInt8Kernels, kDotKernels};
constexpr CpuBit kNeeds[] = {cpu_bits::kAvx512Vnni};

const Isa kIsa{
    .name = "avx512_vnni",
    .base = &avx512::kIsa,
    .needs = kNeeds,
    .saved = cpu_bits::kZmmSaved,
    .above = {},
    .kernels = kKernels,
    .vectors = nullptr,
};

}  // namespace avx512_vnni

}  // namespace fastlinear

FL_TARGET_END
