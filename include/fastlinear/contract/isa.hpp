// The table: every kernel and every activation of the library, and what of it may run here. csrc/registry.cpp holds it.
#pragma once

#include <cstddef>

#include "fastlinear/contract/conversion.hpp"
#include "fastlinear/contract/epilogue.hpp"
#include "fastlinear/contract/kernel.hpp"
#include "fastlinear/contract/quantization.hpp"

namespace fastlinear {

struct KernelList {
  const Kernel* first = nullptr;
  std::size_t count = 0;

  constexpr KernelList() = default;
  template <std::size_t N>
  constexpr KernelList(const Kernel (&kernels)[N]) : first(kernels), count(N) {}
};

// What one ISA contributes: its kernels by the format of the weight, its steps in the order of epilogues/all.hpp, its
// conversions in the order of enum Format, its ways between numbers and integers. An ISA that only adds arithmetic has
// kernels alone; the rest of the next lower one serves.
struct IsaTable {
  Isa isa;
  KernelList kernels[kPackedFormats];
  const Step* steps = nullptr;
  const Conversion* conversions = nullptr;
  const Quantization* quantization = nullptr;
};

// Kernels, best ISA first; nullptr past the end.
const Kernel* kernel_at(std::size_t i);
const Kernel* find_kernel(const char* name);

// Activations; nullptr past the end.
const Activation* activation_at(std::size_t i);

// The first two activations, in whose place dequantizing has a maximum that costs nothing.
inline constexpr std::size_t kIdentity = 0, kRelu = 1;

// The step that applies activation i, the conversions (one a format), and the quantization, for kernels of `isa`.
Step find_step(Isa isa, std::size_t i);
const Conversion* find_conversions(Isa isa);
const Quantization& find_quantization(Isa isa);

}  // namespace fastlinear
