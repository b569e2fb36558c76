// gemm() behind a C function, so that tests/library.py can load the library's own sources: changed in one place, or for
// kernels that the installed library does not run here. Serial: no thread pool is attached.
#include "fastlinear/driver/gemm.hpp"

using fastlinear::Format;
using std::ptrdiff_t;

struct Sizes {
  ptrdiff_t threads, k_slices, m, n, k;
  fastlinear::Caches caches;
};

struct Operand {
  char* data;
  ptrdiff_t stride;  // elements from row to row
  Format format;
};

struct Panels {
  const char* data;
  Format format;
  ptrdiff_t nr, kr;
  bool zeros;  // whether it has zero points
};

struct Steps {
  ptrdiff_t count;
  const ptrdiff_t* functions;  // their places in the registry
  const float* params;         // kMaxParams a step
};

// x [m, k], which `rows` quantizes for integer products; panels: W [n, k]; bias [n], or no data; y [m, n], which `out`
// makes integers, where it is of them.
extern "C" [[gnu::visibility("default")]] bool product(const char* kernel, const Sizes* s, const Operand* x,
                                                       const fastlinear::RowQuantizer* rows, const Panels* w,
                                                       const Operand* bias, const Operand* y, const Steps* steps,
                                                       const fastlinear::Affine* out) {
  using namespace fastlinear;
  const Plan plan = make_plan(*find_kernel(kernel), s->threads, s->k_slices, s->caches);
  EpilogueProgram program{};
  program.count = static_cast<std::size_t>(steps->count);
  for (std::size_t i = 0; i < program.count; ++i) {
    EpilogueStep& step = program.steps[i];
    step.function = static_cast<std::uint32_t>(steps->functions[i]);
    step.operand = -1;
    for (std::size_t j = 0; j < kMaxParams; ++j) step.params[j] = steps->params[i * kMaxParams + j];
  }
  program.out = *out;
  Weight weight = weight_at({w->format, w->nr, w->kr}, s->n, s->k, w->data);
  if (!w->zeros) weight.zeros = nullptr;
  const Segment segment{y->data, y->stride, y->format};
  return gemm({s->m,
               s->n,
               s->k,
               {x->data, x->stride, x->format},
               *rows,
               weight,
               {bias->data, bias->format},
               {&segment, 1},
               program,
               nullptr,
               nullptr},
              plan);
}
