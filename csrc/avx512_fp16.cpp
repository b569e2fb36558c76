// The avx512_fp16 row of the library: kernels.
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

FL_TARGET_BEGIN("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,avx512fp16")

#include "fastlinear/isa/avx512_fp16/fp16.hpp"

namespace fastlinear {

namespace avx512 {
extern const Isa kIsa;
}
namespace avx512_bf16 {
extern const Isa kIsa;
}

namespace avx512_fp16 {

constexpr std::span<const Kernel> kKernels[] = {kFp16Kernels};
constexpr CpuBit kNeeds[] = {cpu_bits::kAvx512Fp16};
constexpr const Isa* kAbove[] = {&avx512_bf16::kIsa};

const Isa kIsa{
    .name = "avx512_fp16",
    .base = &avx512::kIsa,
    .needs = kNeeds,
    .saved = cpu_bits::kZmmSaved,
    .above = kAbove,
    .kernels = kKernels,
    .vectors = nullptr,
};

}  // namespace avx512_fp16

}  // namespace fastlinear

FL_TARGET_END
