// This machine, by the architecture that the library is built for. All that depends on one, but for the kernels, is
// here and in target.hpp.
#pragma once

#if defined(__x86_64__)
#include <cpuid.h>
#include <emmintrin.h>
#include <sys/syscall.h>
#elif defined(__aarch64__)
#include <sys/auxv.h>
#else
#error "fastlinear is for x86-64 and aarch64"
#endif
#include <unistd.h>

#include <cerrno>
#include <cstddef>
#include <cstdint>

#include "fastlinear/host/aarch64.hpp"
#include "fastlinear/host/source.hpp"
#include "fastlinear/host/x86_64.hpp"

namespace fastlinear {

inline Cpu detect_cpu(const CpuSource& source) { return source.describe(source); }

#if defined(__x86_64__)

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
          [](void*) {
            constexpr long kRequest = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM of asm/prctl.h
            return syscall(SYS_arch_prctl, kRequest, kTileData) == 0 ? 0 : errno;
          },
          nullptr, describe_x86_64};
}

#else

// As above. A line is at least as long as CTR_EL0 says in words of four bytes.
inline void flush(const char* data, std::size_t bytes) {
  std::uint64_t types = 0;
  __asm__ volatile("mrs %0, ctr_el0" : "=r"(types));
  const std::size_t line = std::size_t{4} << (types >> 16 & 15);
  for (std::size_t i = 0; i < bytes; i += line) __asm__ volatile("dc civac, %0" : : "r"(data + i) : "memory");
  __asm__ volatile("dsb sy" : : : "memory");
}

inline CpuSource this_cpu() {
  return {[](std::uint32_t leaf, std::uint32_t, void*) {
            const auto halves = [](unsigned long entry) {
              return CpuidRegisters{static_cast<std::uint32_t>(entry), static_cast<std::uint32_t>(entry >> 32), 0, 0};
            };
            const auto cache = [](int name) {
              return static_cast<std::uint32_t>(sysconf(name) > 0 ? sysconf(name) : 0);
            };
            std::uint64_t midr = 0;
            switch (leaf) {
              case 0:
                return CpuidRegisters{kCaches, 0, 0, 0};
              case kHwcap:
              case kHwcap2:
                return halves(getauxval(leaf));
              case kMidr:  // the system reads it for a process, where it says so
                if ((getauxval(kHwcap) >> cpu_bits::kMidrReadable.bit & 1) != 0)
                  __asm__("mrs %0, midr_el1" : "=r"(midr));
                return halves(midr);
              case kCaches:
                return CpuidRegisters{cache(_SC_LEVEL1_DCACHE_SIZE), cache(_SC_LEVEL2_CACHE_SIZE),
                                      cache(_SC_LEVEL3_CACHE_SIZE), 0};
              default:
                return CpuidRegisters{};
            }
          },
          [](void*) { return std::uint64_t{0}; }, [](void*) { return EINVAL; }, nullptr, describe_aarch64};
}

#endif

}  // namespace fastlinear
