// What an instruction set is to the library: one row, which csrc/<isa>.cpp fills and csrc/registry.cpp lists. Nothing
// counts ISAs and nothing compares their places in a list: one is built on another, and what may run is a set.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>

#include "fastlinear/contract/attention.hpp"
#include "fastlinear/contract/conversion.hpp"
#include "fastlinear/contract/epilogue.hpp"
#include "fastlinear/contract/kernel.hpp"
#include "fastlinear/contract/norm.hpp"
#include "fastlinear/contract/quantization.hpp"
#include "fastlinear/host/cpu.hpp"

namespace fastlinear {

// What an ISA with vectors of its own does with them.
struct Vectors {
  const Step* steps;              // one an epilogue function, in the order of epilogues/all.hpp
  const Conversion* conversions;  // in the order of enum Format
  const Quantization* quantization;
  Norm norm;
  const Attention* attention;                 // in the order of enum Format, floating ones
  const FewQueries* few_queries;              // in the same order
  const RoundedAttention* rounded_attention;  // null where no kernel reads rows of bf16
  Rotation rotation;
  ExpandScales expand_scales;
};

struct Isa {
  const char* name;
  const Isa* base;                // what it is built on, and not offered without; null for plain C++
  std::span<const CpuBit> needs;  // beside those of its base
  std::uint64_t saved;            // the registers, as bits of XCR0, that the system has to save for it
  // ISAs other than its base and what that implies that FASTLINEAR_MAX_ISA = this one leaves allowed.
  std::span<const Isa* const> above;
  std::span<const std::span<const Kernel>> kernels;
  const Vectors* vectors;  // null: an ISA that only adds arithmetic borrows its base's
  bool tiles = false;      // whether it has tiles, which the system gives only to a process that asks
};

inline const Vectors& vectors_of(const Isa& isa) {
  const Isa* own = &isa;
  while (own->vectors == nullptr) own = own->base;
  return *own->vectors;
}

// Why a machine does not offer it, or what it is built on, without asking its system for anything; null where it does.
inline const char* refusal(const CpuSource& source, const Isa& isa) {
  if (const char* why = isa.base == nullptr ? nullptr : refusal(source, *isa.base)) return why;
  if (!has_all(source, isa.needs)) return "CPUID does not show it";
  if ((saved_registers(source) & isa.saved) != isa.saved) return "the system does not save its registers (XCR0)";
  if (isa.tiles && !has_full_tiles(source)) return "CPUID shows tiles of less than 16 rows of 64 bytes";
  return nullptr;
}

// Whether it is `highest`, or among what that implies.
inline bool within(const Isa& highest, const Isa& isa) {
  if (&highest == &isa || (highest.base != nullptr && within(*highest.base, isa))) return true;
  for (const Isa* also : highest.above)
    if (within(*also, isa)) return true;
  return false;
}

// The table, best ISA first; each gives null past its end. csrc/registry.cpp holds it.
const Isa* isa_at(std::size_t i);
const Kernel* kernel_at(std::size_t i);
const Kernel* find_kernel(const char* name);
const EpilogueFunction* function_at(std::size_t i);

}  // namespace fastlinear
