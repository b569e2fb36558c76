// The table: every kernel and every activation of the library, and what of it may run here. csrc/registry.cpp holds it.
#pragma once

#include "fastlinear/cpu.hpp"
#include "fastlinear/epilogue.hpp"

namespace fastlinear {

// Kernels, best ISA first; nullptr past the end.
const Kernel* kernel_at(std::size_t i);
const Kernel* find_kernel(const char* name);

// Activations; nullptr past the end. "identity" is the first.
const Activation* activation_at(std::size_t i);

// The step that applies activation i with the registers of `isa`.
Step find_step(Isa isa, std::size_t i);

}  // namespace fastlinear
