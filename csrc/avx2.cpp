// The avx2 rows of the library: kernels, epilogue steps, conversions and quantization.
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <iterator>
#include <utility>

#include "fastlinear/contract/isa.hpp"
#include "fastlinear/contract/kernel.hpp"
#include "fastlinear/host/target.hpp"

FL_TARGET_BEGIN("avx2,fma,f16c")

// clang-format off: the vector type comes first
#include "fastlinear/isa/avx2/vec.hpp"
#include "fastlinear/generic/convert.hpp"
#include "fastlinear/generic/quantize.hpp"
#include "fastlinear/epilogues/all.hpp"
#include "fastlinear/isa/avx2/fp32.hpp"
#include "fastlinear/isa/avx2/bf16.hpp"
#include "fastlinear/isa/avx2/fp16.hpp"
#include "fastlinear/isa/avx2/int8wo.hpp"
#include "fastlinear/isa/avx2/int8.hpp"
// clang-format on

namespace fastlinear {

extern const IsaTable kAvx2Table;
const IsaTable kAvx2Table{
    Isa::avx2,
    {avx2::kFp32Kernels, avx2::kBf16Kernels, avx2::kFp16Kernels, avx2::kInt8woKernels, avx2::kInt8Kernels},
    epilogue_steps<avx2::F32>,
    conversions<avx2::F32>,
    &quantization<avx2::F32, avx2::I32>};

}  // namespace fastlinear

FL_TARGET_END
