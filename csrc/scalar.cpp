// The scalar rows of the library: kernels, epilogue steps, conversions and quantization.
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <iterator>
#include <utility>

#include "fastlinear/contract/isa.hpp"
#include "fastlinear/contract/kernel.hpp"
#include "fastlinear/host/target.hpp"

// clang-format off: the vector type comes first
#include "fastlinear/isa/scalar/vec.hpp"
#include "fastlinear/generic/convert.hpp"
#include "fastlinear/generic/quantize.hpp"
#include "fastlinear/epilogues/all.hpp"
#include "fastlinear/isa/scalar/kernels.hpp"
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
