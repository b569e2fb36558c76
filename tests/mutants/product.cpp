// gemm() behind a C function, so that tests/test_mutants.py can load the library's own sources, changed in one place.
// Serial: no thread pool is attached.
#include "fastlinear/gemm.hpp"
#include "fastlinear/registry.hpp"

using std::ptrdiff_t;

// x [m, k], rows stride_x apart; packed: W [n, k] in the kernel's layout; y [m, n], rows stride_y apart. `activations`
// are `steps` indices of the registry; params has kMaxParams values a step.
extern "C" [[gnu::visibility("default")]] bool product(const char* kernel, ptrdiff_t threads, ptrdiff_t k_slices,
                                                       ptrdiff_t m, ptrdiff_t n, ptrdiff_t k, const float* x,
                                                       ptrdiff_t stride_x, const char* packed, const float* bias,
                                                       float* y, ptrdiff_t stride_y, std::size_t steps,
                                                       const std::size_t* activations, const float* params) {
  using namespace fastlinear;
  const Plan plan{find_kernel(kernel), threads, k_slices};
  EpilogueProgram program{};
  program.count = steps;
  for (std::size_t i = 0; i < steps; ++i) {
    program.steps[i] = find_step(plan.kernel->isa, activations[i]);
    for (std::size_t j = 0; j < kMaxParams; ++j) program.params[i][j] = params[i * kMaxParams + j];
  }
  return gemm({m, n, k, {x, stride_x}, packed, bias, y, stride_y, program}, plan);
}
