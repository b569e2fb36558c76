// The scalar rows of the library: kernels, epilogue steps and conversions.
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
#include "fastlinear/epilogues/all.hpp"
#include "fastlinear/kernels/scalar/fp32.hpp"
#include "fastlinear/kernels/scalar/bf16.hpp"
#include "fastlinear/kernels/scalar/fp16.hpp"
// clang-format on

namespace fastlinear {

extern const IsaTable kScalarTable;
const IsaTable kScalarTable{Isa::scalar,
                            {scalar::kFp32Kernels, scalar::kBf16Kernels, scalar::kFp16Kernels},
                            epilogue_steps<scalar::F32>,
                            conversions<scalar::F32>};

}  // namespace fastlinear
