// The avx512 rows of the library: kernels, epilogue steps, conversions and quantization.
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <iterator>
#include <utility>

#include "fastlinear/contract/isa.hpp"
#include "fastlinear/contract/kernel.hpp"
#include "fastlinear/host/target.hpp"

FL_TARGET_BEGIN("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma")

// clang-format off: the vector type comes first
#include "fastlinear/isa/avx512/vec.hpp"
#include "fastlinear/generic/convert.hpp"
#include "fastlinear/generic/quantize.hpp"
#include "fastlinear/epilogues/all.hpp"
#include "fastlinear/isa/avx512/fp32.hpp"
#include "fastlinear/isa/avx512/bf16.hpp"
#include "fastlinear/isa/avx512/fp16.hpp"
#include "fastlinear/isa/avx512/int8wo.hpp"
#include "fastlinear/isa/avx512/int8.hpp"
// clang-format on

namespace fastlinear {

extern const IsaTable kAvx512Table;
const IsaTable kAvx512Table{
    Isa::avx512,
    {avx512::kFp32Kernels, avx512::kBf16Kernels, avx512::kFp16Kernels, avx512::kInt8woKernels, avx512::kInt8Kernels},
    epilogue_steps<avx512::F32>,
    conversions<avx512::F32>,
    &quantization<avx512::F32, avx512::I32>};

}  // namespace fastlinear

FL_TARGET_END
