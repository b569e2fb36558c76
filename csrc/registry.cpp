#include <cmath>
#include <cstring>
#include <iterator>
#include <string_view>

#include "fastlinear/contract/isa.hpp"
#include "fastlinear/epilogues/all.hpp"

namespace fastlinear {

// clang-format off
namespace scalar { extern const Isa kIsa; }
#if defined(__x86_64__)
namespace avx2 { extern const Isa kIsa; }
namespace avx_vnni { extern const Isa kIsa; }
namespace avx512 { extern const Isa kIsa; }
namespace avx512_vnni { extern const Isa kIsa; }
namespace avx512_bf16 { extern const Isa kIsa; }
namespace avx512_fp16 { extern const Isa kIsa; }
namespace amx { extern const Isa kIsa; }
namespace amx_fp16 { extern const Isa kIsa; }
#endif
// clang-format on

namespace {

static_assert(kFunctions[kIdentity].name == std::string_view("identity"));
static_assert(kFunctions[kRelu].name == std::string_view("relu"));

// In the order in which they are shown, best first; nothing else depends on it.
// clang-format off: a line each
const Isa* const kIsas[] = {
#if defined(__x86_64__)
    &amx_fp16::kIsa,
    &amx::kIsa,
    &avx512_fp16::kIsa,
    &avx512_bf16::kIsa,
    &avx512_vnni::kIsa,
    &avx512::kIsa,
    &avx_vnni::kIsa,
    &avx2::kIsa,
#endif
    &scalar::kIsa,
};
// clang-format on

}  // namespace

const Isa* isa_at(std::size_t i) { return i < std::size(kIsas) ? kIsas[i] : nullptr; }

const Kernel* kernel_at(std::size_t i) {
  for (const Isa* isa : kIsas)
    for (const std::span<const Kernel> kernels : isa->kernels) {
      if (i < kernels.size()) return &kernels[i];
      i -= kernels.size();
    }
  return nullptr;
}

const Kernel* find_kernel(const char* name) {
  for (std::size_t i = 0; const Kernel* kernel = kernel_at(i); ++i)
    if (std::strcmp(kernel->name, name) == 0) return kernel;
  return nullptr;
}

const EpilogueFunction* function_at(std::size_t i) { return i < std::size(kFunctions) ? kFunctions + i : nullptr; }

}  // namespace fastlinear
