// The avx512_fp16 rows of the library: kernels.
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <iterator>
#include <utility>

#include "fastlinear/contract/isa.hpp"
#include "fastlinear/contract/kernel.hpp"
#include "fastlinear/host/target.hpp"

FL_TARGET_BEGIN("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,avx512fp16")

#include "fastlinear/isa/avx512_fp16/fp16.hpp"

namespace fastlinear {

extern const IsaTable kAvx512Fp16Table;
const IsaTable kAvx512Fp16Table{Isa::avx512_fp16, {{}, {}, avx512_fp16::kFp16Kernels}};

}  // namespace fastlinear

FL_TARGET_END
