// The avx_vnni rows of the library: kernels.
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <iterator>
#include <utility>

#include "fastlinear/contract/isa.hpp"
#include "fastlinear/contract/kernel.hpp"
#include "fastlinear/host/target.hpp"

FL_TARGET_BEGIN("avx2,fma,f16c,avxvnni")

#include "fastlinear/isa/avx_vnni/int8.hpp"

namespace fastlinear {

extern const IsaTable kAvxVnniTable;
const IsaTable kAvxVnniTable{Isa::avx_vnni, {{}, {}, {}, {}, avx_vnni::kInt8Kernels}};

}  // namespace fastlinear

FL_TARGET_END
