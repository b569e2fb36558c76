#include <cmath>
#include <cstring>
#include <iterator>
#include <string_view>

#include "fastlinear/contract/isa.hpp"
#include "fastlinear/epilogues/all.hpp"

namespace fastlinear {

extern const IsaTable kAvx512Fp16Table, kAvx512Bf16Table, kAvx512VnniTable, kAvx512Table, kAvxVnniTable, kAvx2Table,
    kScalarTable;

namespace {

static_assert(kActivations[kIdentity].name == std::string_view("identity"));
static_assert(kActivations[kRelu].name == std::string_view("relu"));

// Best first.
const IsaTable* const kTables[] = {&kAvx512Fp16Table, &kAvx512Bf16Table, &kAvx512VnniTable, &kAvx512Table,
                                   &kAvxVnniTable,    &kAvx2Table,       &kScalarTable};

// The table of `isa`, or of the next lower one that has its own vector type.
const IsaTable& with_vectors(Isa isa) {
  for (const IsaTable* table : kTables)
    if (table->isa <= isa && table->steps != nullptr) return *table;
  return kScalarTable;
}

}  // namespace

const Kernel* kernel_at(std::size_t i) {
  for (const IsaTable* table : kTables)
    for (const KernelList& list : table->kernels) {
      if (i < list.count) return list.first + i;
      i -= list.count;
    }
  return nullptr;
}

const Kernel* find_kernel(const char* name) {
  for (std::size_t i = 0; const Kernel* kernel = kernel_at(i); ++i)
    if (std::strcmp(kernel->name, name) == 0) return kernel;
  return nullptr;
}

const Activation* activation_at(std::size_t i) { return i < std::size(kActivations) ? kActivations + i : nullptr; }

Step find_step(Isa isa, std::size_t i) { return with_vectors(isa).steps[i]; }

const Conversion* find_conversions(Isa isa) { return with_vectors(isa).conversions; }

const Quantization& find_quantization(Isa isa) { return *with_vectors(isa).quantization; }

}  // namespace fastlinear
