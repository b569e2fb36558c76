// The avx512_vnni rows of the library: kernels.
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <iterator>
#include <utility>

#include "fastlinear/contract/isa.hpp"
#include "fastlinear/contract/kernel.hpp"
#include "fastlinear/host/target.hpp"

FL_TARGET_BEGIN("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,avx512vnni")

#include "fastlinear/isa/avx512_vnni/int8.hpp"

namespace fastlinear {

extern const IsaTable kAvx512VnniTable;
const IsaTable kAvx512VnniTable{Isa::avx512_vnni, {{}, {}, {}, {}, avx512_vnni::kInt8Kernels}};

}  // namespace fastlinear

FL_TARGET_END
