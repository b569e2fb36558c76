// The avx512_bf16 row of the library: kernels.
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

FL_TARGET_BEGIN("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,avx512bf16")

#include "fastlinear/isa/avx512_bf16/bf16.hpp"

namespace fastlinear {

namespace avx512 {
extern const Isa kIsa;
}
namespace avx512_vnni {
extern const Isa kIsa;
}

namespace avx512_bf16 {

constexpr std::span<const Kernel> kKernels[] = {kBf16Kernels};
constexpr CpuBit kNeeds[] = {cpu_bits::kAvx512Bf16};
constexpr const Isa* kAbove[] = {&avx512_vnni::kIsa};

const Isa kIsa{
    .name = "avx512_bf16",
    .base = &avx512::kIsa,
    .needs = kNeeds,
    .saved = cpu_bits::kZmmSaved,
    .above = kAbove,
    .kernels = kKernels,
    .vectors = nullptr,
};

}  // namespace avx512_bf16

}  // namespace fastlinear

FL_TARGET_END
