// What may run here: CPUID says what the silicon has, XCR0 what the system saves on a context switch. Pure, given a
// source of both, so that machines we do not own are table-driven tests.
#pragma once

#include <cpuid.h>
#include <emmintrin.h>

#include <array>
#include <cstddef>
#include <cstdint>
#include <cstring>

namespace fastlinear {

struct CpuidRegisters {
  std::uint32_t eax, ebx, ecx, edx;
};

// cpuid(leaf, subleaf) and xgetbv(0); `context` is handed through.
struct CpuSource {
  CpuidRegisters (*cpuid)(std::uint32_t leaf, std::uint32_t subleaf, void* context);
  std::uint64_t (*xcr0)(void* context);
  void* context;
};

struct Cpu {
  char vendor[13];
  char model[49];
  std::uint32_t family, number, stepping;  // as Intel and AMD number them
  std::array<bool, 7> isa;                 // in the order of enum Isa
  std::array<std::size_t, 3> cache;        // L1d, L2, L3 in bytes; 0 where the CPU does not say
};

namespace cpu_detail {

// One register bit that an ISA needs.
struct Bit {
  std::uint32_t leaf, subleaf;
  std::uint32_t CpuidRegisters::* reg;
  unsigned bit;
};

inline constexpr Bit kOsxsave{1, 0, &CpuidRegisters::ecx, 27};
inline constexpr std::array kAvx2{Bit{1, 0, &CpuidRegisters::ecx, 12},         // FMA
                                  Bit{1, 0, &CpuidRegisters::ecx, 28},         // AVX
                                  Bit{1, 0, &CpuidRegisters::ecx, 29},         // F16C
                                  Bit{7, 0, &CpuidRegisters::ebx, 5}};         // AVX2
inline constexpr std::array kAvx512{Bit{7, 0, &CpuidRegisters::ebx, 16},       // F
                                    Bit{7, 0, &CpuidRegisters::ebx, 17},       // DQ
                                    Bit{7, 0, &CpuidRegisters::ebx, 30},       // BW
                                    Bit{7, 0, &CpuidRegisters::ebx, 31}};      // VL
inline constexpr std::array kAvxVnni{Bit{7, 1, &CpuidRegisters::eax, 4}};      // AVX-VNNI
inline constexpr std::array kAvx512Vnni{Bit{7, 0, &CpuidRegisters::ecx, 11}};  // VNNI
inline constexpr std::array kAvx512Bf16{Bit{7, 1, &CpuidRegisters::eax, 5}};   // BF16
inline constexpr std::array kAvx512Fp16{Bit{7, 0, &CpuidRegisters::edx, 23}};  // FP16
inline constexpr std::uint64_t kYmmState = 0x06, kZmmState = 0xe6;             // XMM+YMM; and opmask, ZMM, high ZMM

template <std::size_t N>
bool has_all(const CpuSource& source, const std::array<Bit, N>& bits) {
  const std::uint32_t max_leaf = source.cpuid(0, 0, source.context).eax;
  for (const Bit& b : bits) {
    if (b.leaf > max_leaf) return false;
    if (b.subleaf > 0 && b.subleaf > source.cpuid(b.leaf, 0, source.context).eax) return false;  // leaf 7 tells so
    if ((source.cpuid(b.leaf, b.subleaf, source.context).*b.reg >> b.bit & 1) == 0) return false;
  }
  return true;
}

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

inline Cpu detect_cpu(const CpuSource& source) {
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

  const std::uint64_t saved = has_all(source, std::array{kOsxsave}) ? source.xcr0(source.context) : 0;
  const bool avx2 = (saved & kYmmState) == kYmmState && has_all(source, kAvx2);
  const bool avx512 = avx2 && (saved & kZmmState) == kZmmState && has_all(source, kAvx512);
  const auto also = [&](bool base, const auto& bits) { return base && has_all(source, bits); };
  cpu.isa = {true,
             avx2,
             also(avx2, kAvxVnni),
             avx512,
             also(avx512, kAvx512Vnni),
             also(avx512, kAvx512Bf16),
             also(avx512, kAvx512Fp16)};
  return cpu;
}

// Drops [data, data + bytes) from every cache level, for measurements with cold weights.
inline void flush(const char* data, std::size_t bytes) {
  for (std::size_t i = 0; i < bytes; i += 64) _mm_clflush(data + i);
  _mm_mfence();
}

inline CpuSource this_cpu() {
  return {[](std::uint32_t leaf, std::uint32_t subleaf, void*) {
            CpuidRegisters r{};
            __cpuid_count(leaf, subleaf, r.eax, r.ebx, r.ecx, r.edx);
            return r;
          },
          [](void*) {
            std::uint32_t low = 0, high = 0;
            __asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
            return std::uint64_t{high} << 32 | low;
          },
          nullptr};
}

}  // namespace fastlinear
