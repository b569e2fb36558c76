// The avx512_bf16 rows of the library: kernels.
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <iterator>
#include <utility>

#include "fastlinear/contract/isa.hpp"
#include "fastlinear/contract/kernel.hpp"
#include "fastlinear/host/target.hpp"

FL_TARGET_BEGIN("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,avx512bf16")

#include "fastlinear/isa/avx512_bf16/bf16.hpp"

namespace fastlinear {

extern const IsaTable kAvx512Bf16Table;
const IsaTable kAvx512Bf16Table{Isa::avx512_bf16, {{}, avx512_bf16::kBf16Kernels}};

}  // namespace fastlinear

FL_TARGET_END
