// What is asked of a machine, and the answers' form: functions, so that machines we do not own are table-driven tests.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <span>

namespace fastlinear {

struct CpuidRegisters {
  std::uint32_t eax, ebx, ecx, edx;
};

struct Cpu;

// cpuid(leaf, subleaf), xgetbv(0), and what the system says (0 or an errno) when it is asked for tiles, for all threads
// of the process; `context` is handed through. An architecture without CPUID answers in its form: leaf 0 has the
// highest leaf, and what the others have is its own affair, as is how it is read.
struct CpuSource {
  CpuidRegisters (*cpuid)(std::uint32_t leaf, std::uint32_t subleaf, void* context);
  std::uint64_t (*xcr0)(void* context);
  int (*ask_for_tiles)(void* context);
  void* context;
  Cpu (*describe)(const CpuSource& source);
};

struct Cpu {
  char vendor[13];
  char model[49];
  std::uint32_t family, number, stepping;  // as Intel and AMD, or Arm, number them
  std::array<std::size_t, 3> cache;        // L1d, L2, L3 in bytes; 0 where the CPU does not say
};

// One bit of a register.
struct CpuBit {
  std::uint32_t leaf, subleaf;
  std::uint32_t CpuidRegisters::* reg;
  unsigned bit;
};

inline bool has_all(const CpuSource& source, std::span<const CpuBit> bits) {
  const std::uint32_t max_leaf = source.cpuid(0, 0, source.context).eax;
  for (const CpuBit& b : bits) {
    if (b.leaf > max_leaf) return false;
    if (b.subleaf > 0 && b.subleaf > source.cpuid(b.leaf, 0, source.context).eax) return false;  // leaf 7 tells so
    if ((source.cpuid(b.leaf, b.subleaf, source.context).*b.reg >> b.bit & 1) == 0) return false;
  }
  return true;
}

}  // namespace fastlinear
