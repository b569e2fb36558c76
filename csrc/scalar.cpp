// The scalar rows of the library: kernels, epilogue steps, conversions and quantization.
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <iterator>
#include <utility>

#include "fastlinear/kernel.hpp"
#include "fastlinear/registry.hpp"
#include "fastlinear/target.hpp"

// clang-format off: the vector type comes first
#include "fastlinear/vec/scalar.hpp"
#include "fastlinear/vec/convert.hpp"
#include "fastlinear/vec/quantize.hpp"
#include "fastlinear/epilogues/all.hpp"
#include "fastlinear/kernels/scalar/fp32.hpp"
#include "fastlinear/kernels/scalar/bf16.hpp"
#include "fastlinear/kernels/scalar/fp16.hpp"
#include "fastlinear/kernels/scalar/int8wo.hpp"
#include "fastlinear/kernels/scalar/int8.hpp"
// clang-format on

namespace fastlinear {

extern const IsaTable kScalarTable;
const IsaTable kScalarTable{
    Isa::scalar,
    {scalar::kFp32Kernels, scalar::kBf16Kernels, scalar::kFp16Kernels, scalar::kInt8woKernels, scalar::kInt8Kernels},
    epilogue_steps<scalar::F32>,
    conversions<scalar::F32>,
    &quantization<scalar::F32, scalar::I32>};

}  // namespace fastlinear
