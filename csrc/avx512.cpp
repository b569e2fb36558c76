// The avx512 rows of the library: kernels and epilogue steps.
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <iterator>

#include "fastlinear/epilogue.hpp"
#include "fastlinear/kernel.hpp"
#include "fastlinear/target.hpp"

FL_TARGET_BEGIN("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma")

// clang-format off: the vector type comes first
#include "fastlinear/vec/avx512.hpp"
#include "fastlinear/epilogues/all.hpp"
#include "fastlinear/kernels/avx512/fp32.hpp"
// clang-format on

namespace fastlinear {

extern const IsaTable kAvx512Table;
const IsaTable kAvx512Table{Isa::avx512, avx512::kFp32Kernels, std::size(avx512::kFp32Kernels),
                            epilogue_steps<avx512::F32>};

}  // namespace fastlinear

FL_TARGET_END
