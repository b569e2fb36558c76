// The scalar rows of the library: kernels and epilogue steps.
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <iterator>

#include "fastlinear/epilogue.hpp"
#include "fastlinear/kernel.hpp"
#include "fastlinear/target.hpp"

// clang-format off: the vector type comes first
#include "fastlinear/vec/scalar.hpp"
#include "fastlinear/epilogues/all.hpp"
#include "fastlinear/kernels/scalar/fp32.hpp"
// clang-format on

namespace fastlinear {

extern const IsaTable kScalarTable;
const IsaTable kScalarTable{Isa::scalar, scalar::kFp32Kernels, std::size(scalar::kFp32Kernels),
                            epilogue_steps<scalar::F32>};

}  // namespace fastlinear
