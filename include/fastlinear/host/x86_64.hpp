// How an x86-64 machine is read: CPUID says what the silicon has, XCR0 what the system saves on a context switch. Pure,
// given a source of both.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <cstring>

#include "fastlinear/host/source.hpp"

namespace fastlinear {

namespace cpu_bits {

inline constexpr CpuBit kFma{1, 0, &CpuidRegisters::ecx, 12}, kOsxsave{1, 0, &CpuidRegisters::ecx, 27},
    kAvx{1, 0, &CpuidRegisters::ecx, 28}, kF16c{1, 0, &CpuidRegisters::ecx, 29};
inline constexpr CpuBit kAvx2{7, 0, &CpuidRegisters::ebx, 5}, kAvx512F{7, 0, &CpuidRegisters::ebx, 16},
    kAvx512Dq{7, 0, &CpuidRegisters::ebx, 17}, kAvx512Bw{7, 0, &CpuidRegisters::ebx, 30},
    kAvx512Vl{7, 0, &CpuidRegisters::ebx, 31};
inline constexpr CpuBit kAvx512Vnni{7, 0, &CpuidRegisters::ecx, 11}, kAvx512Fp16{7, 0, &CpuidRegisters::edx, 23};
inline constexpr CpuBit kAmxBf16{7, 0, &CpuidRegisters::edx, 22}, kAmxTile{7, 0, &CpuidRegisters::edx, 24},
    kAmxInt8{7, 0, &CpuidRegisters::edx, 25}, kAmxFp16{7, 1, &CpuidRegisters::eax, 21};
inline constexpr CpuBit kAvxVnni{7, 1, &CpuidRegisters::eax, 4}, kAvx512Bf16{7, 1, &CpuidRegisters::eax, 5};

// Of XCR0: XMM and YMM; and opmasks, ZMM, high ZMM; and the configuration and data of tiles.
inline constexpr std::uint64_t kYmmSaved = 0x06, kZmmSaved = 0xe6, kTilesSaved = 0x600e6;

}  // namespace cpu_bits

// XCR0, which may be read only where the system says so.
inline std::uint64_t saved_registers(const CpuSource& source) {
  return has_all(source, std::array{cpu_bits::kOsxsave}) ? source.xcr0(source.context) : 0;
}

// Whether palette 1 has 8 tiles of 16 rows of 64 bytes, and products take them whole. Reads the leaves that every CPU
// with tiles has.
inline bool has_full_tiles(const CpuSource& source) {
  if (source.cpuid(0, 0, source.context).eax < 0x1e || source.cpuid(0x1d, 0, source.context).eax < 1) return false;
  const CpuidRegisters palette = source.cpuid(0x1d, 1, source.context), unit = source.cpuid(0x1e, 0, source.context);
  const std::uint32_t row_bytes = palette.ebx & 0xffff, tiles = palette.ebx >> 16, rows = palette.ecx & 0xffff;
  const std::uint32_t depth = unit.ebx & 0xff, columns = unit.ebx >> 8 & 0xffff;
  return row_bytes >= 64 && tiles >= 8 && rows >= 16 && depth >= 16 && columns >= 64;
}

namespace cpu_detail {

// Leaf 4 (Intel) and 0x8000001d (AMD) describe one cache a subleaf in the same form.
inline void read_caches(const CpuSource& source, std::uint32_t leaf, Cpu& cpu) {
  for (std::uint32_t i = 0; i < 16; ++i) {
    const CpuidRegisters r = source.cpuid(leaf, i, source.context);
    const std::uint32_t type = r.eax & 31, level = r.eax >> 5 & 7;
    if (type == 0) break;
    if (type == 2 || level < 1 || level > 3) continue;  // 2: instructions
    const std::size_t ways = (r.ebx >> 22) + 1, partitions = (r.ebx >> 12 & 1023) + 1, line = (r.ebx & 4095) + 1;
    cpu.cache[level - 1] = ways * partitions * line * (std::size_t{r.ecx} + 1);
  }
}

}  // namespace cpu_detail

inline Cpu describe_x86_64(const CpuSource& source) {
  using namespace cpu_detail;
  Cpu cpu{};
  const CpuidRegisters id = source.cpuid(0, 0, source.context);
  std::memcpy(cpu.vendor, &id.ebx, 4);
  std::memcpy(cpu.vendor + 4, &id.edx, 4);
  std::memcpy(cpu.vendor + 8, &id.ecx, 4);

  // Leaf 1: the extended family and model count where the short ones are full.
  const std::uint32_t version = id.eax >= 1 ? source.cpuid(1, 0, source.context).eax : 0;
  const std::uint32_t family = version >> 8 & 15, number = version >> 4 & 15;
  cpu.family = family == 15 ? family + (version >> 20 & 255) : family;
  cpu.number = family == 6 || family == 15 ? number | (version >> 16 & 15) << 4 : number;
  cpu.stepping = version & 15;

  const std::uint32_t max_extended = source.cpuid(0x80000000u, 0, source.context).eax;
  if (max_extended >= 0x80000004u) {
    for (std::uint32_t i = 0; i < 3; ++i) {
      const CpuidRegisters r = source.cpuid(0x80000002u + i, 0, source.context);
      std::memcpy(cpu.model + 16 * i, &r, 16);
    }
  }
  if (id.eax >= 4) read_caches(source, 4, cpu);
  if (cpu.cache[0] == 0 && max_extended >= 0x8000001du) read_caches(source, 0x8000001du, cpu);
  return cpu;
}

}  // namespace fastlinear
