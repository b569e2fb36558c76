// The integer instructions that compilers close inner loops with: additions, comparisons, addresses, jumps, prefetches.
// None of them needs emulation; but as long as they are known, a loop costs one fault and not one a pass.
#pragma once

#include <cstdint>
#include <cstring>

#include "decode.hpp"
#include "machine.hpp"

namespace emulator::loops {

inline constexpr std::uint64_t kCarry = 1, kParity = 1 << 2, kAdjust = 1 << 4, kZero = 1 << 6, kSign = 1 << 7,
                               kOverflow = 1 << 11;
inline constexpr std::uint64_t kAll = kCarry | kParity | kAdjust | kZero | kSign | kOverflow;

// a + b or a - b in `bits` bits, with the flags that the CPU would set.
inline std::uint64_t add(Machine& machine, std::uint64_t a, std::uint64_t b, bool subtract, unsigned bits) {
  const std::uint64_t mask = bits == 64 ? ~std::uint64_t{0} : 0xffffffff, top = std::uint64_t{1} << (bits - 1);
  a &= mask;
  b &= mask;
  const std::uint64_t result = (subtract ? a - b : a + b) & mask;
  std::uint64_t flags = machine.flags() & ~kAll;
  if (subtract ? a < b : result < a) flags |= kCarry;
  if (result == 0) flags |= kZero;
  if ((result & top) != 0) flags |= kSign;
  if (((subtract ? (a ^ b) & (a ^ result) : ~(a ^ b) & (a ^ result)) & top) != 0) flags |= kOverflow;
  if (((a ^ b ^ result) & 16) != 0) flags |= kAdjust;
  if (__builtin_parity(static_cast<unsigned>(result & 255)) == 0) flags |= kParity;
  machine.set_flags(flags);
  return result;
}

// The condition of jcc, by the low four bits of its opcode.
inline bool holds(unsigned condition, std::uint64_t flags) {
  const auto set = [&](std::uint64_t bit) { return (flags & bit) != 0; };
  const bool less = set(kSign) != set(kOverflow);
  const bool of[8] = {set(kOverflow), set(kCarry),  set(kZero), set(kCarry) || set(kZero),
                      set(kSign),     set(kParity), less,       less || set(kZero)};
  return of[condition >> 1] != ((condition & 1) != 0);
}

// Carries out the instruction at RIP and moves on, if it is one of those.
inline bool step(Machine& machine) {
  const unsigned char* at = machine.rip();
  while (*at == 0x66 || *at == 0x2e) ++at;  // prefixes that fill up a nop, and mean something else elsewhere
  if (at != machine.rip() && at[0] != 0x90 && (at[0] != 0x0f || at[1] != 0x1f)) return false;
  const unsigned rex = (*at & 0xf0) == 0x40 ? *at++ : 0, b = rex & 1, x = rex >> 1 & 1, r = rex >> 2 & 1;
  const unsigned bits = (rex & 8) != 0 ? 64 : 32, opcode = *at++;
  Instruction i{};
  const auto operand = [&] {
    at = decode_operand(at, machine, x, b, i);
    i.reg = (i.modrm >> 3 & 7) | r << 3;
  };
  const auto set = [&](unsigned number, std::uint64_t value) {
    machine.set_general(number, static_cast<std::int64_t>(bits == 64 ? value : value & 0xffffffff));
  };
  const auto immediate = [&](std::size_t bytes) {
    std::int32_t wide = static_cast<std::int8_t>(*at);
    if (bytes == 4) std::memcpy(&wide, at, 4);
    at += bytes;
    return std::int64_t{wide};
  };
  const auto arithmetic = [&](unsigned operation, unsigned to, std::int64_t value) {  // /0 add, /5 sub, /7 cmp
    const std::uint64_t result = add(machine, static_cast<std::uint64_t>(machine.general(to)),
                                     static_cast<std::uint64_t>(value), operation != 0, bits);
    if (operation != 7) set(to, result);
  };
  switch (opcode) {
    case 0x01:
    case 0x29:
    case 0x39:
    case 0x03:
    case 0x2b:
    case 0x3b: {
      operand();
      if (i.memory) return false;
      const bool to_reg = (opcode & 2) != 0;
      arithmetic(opcode >> 3 & 7, to_reg ? i.reg : i.rm, machine.general(to_reg ? i.rm : i.reg));
      break;
    }
    case 0x81:
    case 0x83: {
      operand();
      const unsigned operation = i.modrm >> 3 & 7;
      if (i.memory || (operation != 0 && operation != 5 && operation != 7)) return false;
      arithmetic(operation, i.rm, immediate(opcode == 0x83 ? 1 : 4));
      break;
    }
    case 0x90:
      break;
    case 0x89:
    case 0x8b: {
      operand();
      if (i.memory && opcode == 0x89) return false;
      std::uint64_t value = 0;
      if (i.memory)
        std::memcpy(&value, i.address(1), bits / 8);
      else
        value = static_cast<std::uint64_t>(machine.general(opcode == 0x89 ? i.reg : i.rm));
      set(opcode == 0x89 ? i.rm : i.reg, value);
      break;
    }
    case 0x8d:
      operand();
      if (!i.memory) return false;
      set(i.reg, reinterpret_cast<std::uint64_t>(i.address(1)));
      break;
    case 0x0f: {
      const unsigned second = *at++;
      if (second == 0x18 || second == 0x0d || second == 0x1f) {  // prefetches and nops
        operand();
        if (!i.memory) return false;
        break;
      }
      if ((second & 0xf0) != 0x80) return false;
      const std::int64_t distance = immediate(4);
      if (holds(second & 15, machine.flags())) at += distance;
      break;
    }
    default: {
      if ((opcode & 0xf0) != 0x70) return false;
      const std::int64_t distance = immediate(1);
      if (holds(opcode & 15, machine.flags())) at += distance;
    }
  }
  machine.jump(at);
  return true;
}

}  // namespace emulator::loops
