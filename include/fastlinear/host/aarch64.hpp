// How an aarch64 machine is read: the system says what it has and saves, in the auxiliary vector of a process. Pure,
// given a source of it.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstring>

#include "fastlinear/host/source.hpp"

namespace fastlinear {

// The leaves of its source: two entries of the auxiliary vector by their numbers (AT_HWCAP, AT_HWCAP2), the lower half
// in eax, the upper one in ebx; MIDR_EL1 in eax; bytes of L1d, L2 and L3 in eax, ebx and ecx.
inline constexpr std::uint32_t kHwcap = 16, kHwcap2 = 26, kMidr = 100, kCaches = 101;

namespace cpu_bits {

inline constexpr CpuBit kAsimd{kHwcap, 0, &CpuidRegisters::eax, 1}, kMidrReadable{kHwcap, 0, &CpuidRegisters::eax, 11};
inline constexpr CpuBit kAsimdHalf{kHwcap, 0, &CpuidRegisters::eax, 10}, kDotprod{kHwcap, 0, &CpuidRegisters::eax, 20};
inline constexpr CpuBit kSve{kHwcap, 0, &CpuidRegisters::eax, 22};
inline constexpr CpuBit kI8mm{kHwcap2, 0, &CpuidRegisters::eax, 13}, kBf16{kHwcap2, 0, &CpuidRegisters::eax, 14};

}  // namespace cpu_bits

inline Cpu describe_aarch64(const CpuSource& source) {
  Cpu cpu{};
  std::strcpy(cpu.vendor, "aarch64");
  const std::uint32_t midr = source.cpuid(kMidr, 0, source.context).eax;
  cpu.family = midr >> 24;         // who made it: 0x41 is Arm, 0x61 Apple
  cpu.number = midr >> 4 & 0xfff;  // which part
  cpu.stepping = (midr >> 20 & 15) << 4 | (midr & 15);
  std::snprintf(cpu.model, sizeof cpu.model, "implementer 0x%02x, part 0x%03x", cpu.family, cpu.number);
  const CpuidRegisters caches = source.cpuid(kCaches, 0, source.context);
  cpu.cache = {caches.eax, caches.ebx, caches.ecx};
  return cpu;
}

}  // namespace fastlinear
