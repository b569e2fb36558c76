// The avx2 rows of the library: kernels and epilogue steps.
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <iterator>

#include "fastlinear/epilogue.hpp"
#include "fastlinear/kernel.hpp"
#include "fastlinear/target.hpp"

FL_TARGET_BEGIN("avx2,fma")

// clang-format off: the vector type comes first
#include "fastlinear/vec/avx2.hpp"
#include "fastlinear/epilogues/all.hpp"
#include "fastlinear/kernels/avx2/fp32.hpp"
// clang-format on

namespace fastlinear {

extern const IsaTable kAvx2Table;
const IsaTable kAvx2Table{Isa::avx2, avx2::kFp32Kernels, std::size(avx2::kFp32Kernels), epilogue_steps<avx2::F32>};

}  // namespace fastlinear

FL_TARGET_END
