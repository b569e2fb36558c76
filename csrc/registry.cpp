#include "fastlinear/registry.hpp"

#include <cmath>
#include <cstring>
#include <iterator>

#include "fastlinear/epilogues/all.hpp"

namespace fastlinear {

extern const IsaTable kAvx512Table, kAvx2Table, kScalarTable;

namespace {

const IsaTable* const kTables[] = {&kAvx512Table, &kAvx2Table, &kScalarTable};

}  // namespace

const Kernel* kernel_at(std::size_t i) {
  for (const IsaTable* table : kTables) {
    if (i < table->kernel_count) return table->kernels + i;
    i -= table->kernel_count;
  }
  return nullptr;
}

const Kernel* find_kernel(const char* name) {
  for (std::size_t i = 0; const Kernel* kernel = kernel_at(i); ++i)
    if (std::strcmp(kernel->name, name) == 0) return kernel;
  return nullptr;
}

const Activation* activation_at(std::size_t i) { return i < std::size(kActivations) ? kActivations + i : nullptr; }

Step find_step(Isa isa, std::size_t i) {
  for (const IsaTable* table : kTables)
    if (table->isa == isa) return table->steps[i];
  return nullptr;
}

}  // namespace fastlinear
