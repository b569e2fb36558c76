// The interrupted thread: its registers as they lie in the signal frame, from where they are put back when the handler
// returns. Vector registers are parts of an XSAVE image in the standard form, whose offsets CPUID tells.
#pragma once

#include <cpuid.h>
#include <ucontext.h>

#include <cstddef>
#include <cstdint>
#include <cstring>

namespace emulator {

struct Vector {
  alignas(64) unsigned char bytes[64];
};

class Machine {
 public:
  explicit Machine(ucontext_t* context)
      : gregs_(context->uc_mcontext.gregs), image_(reinterpret_cast<unsigned char*>(context->uc_mcontext.fpregs)) {}

  const unsigned char* rip() const { return reinterpret_cast<const unsigned char*>(gregs_[REG_RIP]); }
  void jump(const unsigned char* to) { gregs_[REG_RIP] = reinterpret_cast<greg_t>(to); }

  // In the order of encodings: rax, rcx, rdx, rbx, rsp, rbp, rsi, rdi, r8 to r15.
  std::int64_t general(unsigned number) const { return gregs_[kGeneral[number]]; }
  void set_general(unsigned number, std::int64_t value) { gregs_[kGeneral[number]] = value; }

  // Tiles of this CPU, where it has them, are in the image: their configuration always, their data once the process
  // asked Linux for them. False where there is no room for a component, and nothing is copied.
  static constexpr unsigned kTileConfig = 17, kTileData = 18;
  bool get(unsigned component, void* to) const {
    if (!room(component)) return false;
    if ((present() >> component & 1) != 0)
      std::memcpy(to, image_ + offset(component), length(component));
    else
      std::memset(to, 0, length(component));
    return true;
  }
  void set(unsigned component, const void* from) {
    if (!room(component)) return;
    std::memcpy(image_ + offset(component), from, length(component));
    set_present(present() | std::uint64_t{1} << component);
  }

  std::uint64_t flags() const { return static_cast<std::uint64_t>(gregs_[REG_EFL]); }
  void set_flags(std::uint64_t flags) { gregs_[REG_EFL] = static_cast<greg_t>(flags); }

  // The first `size` bytes (16, 32, 64) of a register of 512 bits, of which there are 32.
  Vector vector(unsigned number, std::size_t size) const {
    Vector v{};
    for_parts(number, [&](unsigned component, std::size_t at, std::size_t in_vector, std::size_t part) {
      if (in_vector < size && (present() >> component & 1) != 0) std::memcpy(v.bytes + in_vector, image_ + at, part);
    });
    return v;
  }

  // What lies behind the first `size` bytes becomes zero, as VEX and EVEX encodings have it.
  void set_vector(unsigned number, const Vector& v, std::size_t size) {
    for_parts(number, [&](unsigned component, std::size_t at, std::size_t in_vector, std::size_t part) {
      const bool zero = in_vector >= size;
      if ((present() >> component & 1) == 0) {
        if (zero) return;  // a component that is not present is all zeros
        std::memset(image_ + offset(component), 0, length(component));
        set_present(present() | std::uint64_t{1} << component);
      }
      if (zero)
        std::memset(image_ + at, 0, part);
      else
        std::memcpy(image_ + at, v.bytes + in_vector, part);
    });
  }

 private:
  static constexpr int kGeneral[] = {REG_RAX, REG_RCX, REG_RDX, REG_RBX, REG_RSP, REG_RBP, REG_RSI, REG_RDI,
                                     REG_R8,  REG_R9,  REG_R10, REG_R11, REG_R12, REG_R13, REG_R14, REG_R15};
  // Components of the image: XMM0 to 15, the second 16 bytes of YMM0 to 15, the last 32 of ZMM0 to 15, ZMM16 to 31.
  static constexpr unsigned kSse = 1, kYmm = 2, kZmm = 6, kHighZmm = 7;
  static constexpr std::size_t kLegacyXmm = 160, kHeader = 512;
  // What of the image is Linux's, in the legacy region: the components that it has room for.
  static constexpr std::size_t kRoom = 464 + 8;
  static constexpr unsigned kComponents = kTileData + 1;

  struct Layout {
    std::size_t offset[kComponents], length[kComponents];
    Layout() : offset{}, length{} {
      offset[kSse] = kLegacyXmm;
      length[kSse] = 256;
      for (const unsigned component : {kYmm, kZmm, kHighZmm, kTileConfig, kTileData}) {
        unsigned size = 0, at = 0, ecx = 0, edx = 0;
        __cpuid_count(0xd, component, size, at, ecx, edx);
        offset[component] = at;
        length[component] = size;
      }
    }
  };
  static const Layout& layout() {
    static const Layout known;
    return known;
  }
  bool room(unsigned component) const {
    std::uint64_t bits;
    std::memcpy(&bits, image_ + kRoom, sizeof bits);
    return (bits >> component & 1) != 0;
  }

  static std::size_t offset(unsigned component) { return layout().offset[component]; }
  static std::size_t length(unsigned component) { return layout().length[component]; }

  std::uint64_t present() const {
    std::uint64_t bits;
    std::memcpy(&bits, image_ + kHeader, sizeof bits);
    return bits;
  }
  void set_present(std::uint64_t bits) { std::memcpy(image_ + kHeader, &bits, sizeof bits); }

  // visit(component, offset in the image, offset in the register, bytes) for the parts that a register is kept in.
  template <class Visit>
  static void for_parts(unsigned number, const Visit& visit) {
    if (number >= 16) {
      if (length(kHighZmm) > 0) visit(kHighZmm, offset(kHighZmm) + (number - 16) * 64, 0, 64);
      return;
    }
    visit(kSse, offset(kSse) + number * 16, 0, 16);
    visit(kYmm, offset(kYmm) + number * 16, 16, 16);
    if (length(kZmm) > 0) visit(kZmm, offset(kZmm) + number * 32, 32, 32);
  }

  greg_t* gregs_;
  unsigned char* image_;
};

}  // namespace emulator
