// csrc/avx_vnni.cpp for CPUs without AVX-VNNI: the kernels themselves, with the one instruction that they write as text
// in the arithmetic of AVX2.
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <iterator>
#include <utility>

#include "fastlinear/contract/isa.hpp"
#include "fastlinear/contract/kernel.hpp"
#include "fastlinear/host/target.hpp"

FL_TARGET_BEGIN("avx2,fma,f16c")

#include "fastlinear/generic/tile.hpp"

namespace fastlinear::avx_vnni {

// vpdpbusd: c + the four products of unsigned x and signed w in each lane.
inline __m256i dot(__m256i x, __m256i w, __m256i c) {
  for (int shift = 0; shift < 32; shift += 8) {
    const __m256i u = _mm256_and_si256(_mm256_srli_epi32(x, shift), _mm256_set1_epi32(255));
    const __m256i s = _mm256_srai_epi32(_mm256_slli_epi32(w, 24 - shift), 24);
    c = _mm256_add_epi32(c, _mm256_mullo_epi32(u, s));
  }
  return c;
}

}  // namespace fastlinear::avx_vnni

// What the text is; tests/test_int8.py compares it with that of AVX512-VNNI.
#define asm(...) c = dot(x, w, c)
#include "fastlinear/isa/avx_vnni/int8.hpp"
#undef asm

namespace fastlinear {

extern const IsaTable kAvxVnniTable;
const IsaTable kAvxVnniTable{Isa::avx_vnni, {{}, {}, {}, {}, avx_vnni::kInt8Kernels}};

}  // namespace fastlinear

FL_TARGET_END
