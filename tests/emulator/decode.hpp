// Bytes at the fault -> an instruction in VEX or EVEX encoding, with the addresses of its operands.
#pragma once

#include <cstdint>
#include <cstring>

#include "machine.hpp"

namespace emulator {

enum class Encoding : std::uint8_t { vex2, vex3, evex };
enum class Prefix : std::uint8_t { none, x66, xf3, xf2 };  // as the field pp has them

struct Instruction {
  Encoding encoding;
  std::uint8_t map, opcode, modrm;
  Prefix prefix;
  bool w;
  unsigned length;         // 0, 1, 2: of 16, 32, 64 bytes
  unsigned reg, vvvv, rm;  // numbers of registers; vvvv is 0 where it is not used
  bool memory, sib;        // whether ModRM names memory, and has a byte for base, index and scale
  std::int64_t base;       // of the address: base register or the next instruction, and a displacement of 32 bits
  std::int64_t index;      // register << scale, or 0
  std::int64_t disp8;      // counted in operands where the encoding is EVEX
  bool broadcast, zeroing;
  unsigned mask;
  std::size_t size;  // bytes

  // The address of a memory operand of n bytes.
  const unsigned char* address(std::int64_t n) const {
    const std::int64_t scaled = encoding == Encoding::evex ? disp8 * n : disp8;
    return reinterpret_cast<const unsigned char*>(base + index + scaled);
  }
  std::size_t vector_bytes() const { return std::size_t{16} << length; }
};

// The operand of a ModRM byte at `at`: fills in rm, and what tells its address. `bits`: X and B of the prefix, which
// extend index and base. Returns where the instruction goes on.
inline const unsigned char* decode_operand(const unsigned char* at, const Machine& machine, unsigned x, unsigned b,
                                           Instruction& i) {
  const auto displacement = [&](std::size_t bytes) {
    std::int64_t value;
    if (bytes == 1) {
      value = static_cast<std::int8_t>(*at);
    } else {
      std::int32_t wide;
      std::memcpy(&wide, at, 4);
      value = wide;
    }
    at += bytes;
    return value;
  };
  i.modrm = *at++;
  const unsigned mode = i.modrm >> 6, low = i.modrm & 7;
  i.memory = mode != 3;
  i.rm = low | b << 3;
  if (!i.memory) return at;
  i.sib = low == 4;
  unsigned base = low;
  if (i.sib) {
    const unsigned sib = *at++, index = (sib >> 3 & 7) | x << 3;
    base = sib & 7;
    if (index != 4)
      i.index = static_cast<std::int64_t>(static_cast<std::uint64_t>(machine.general(index)) << (sib >> 6));
  }
  const bool none = mode == 0 && base == 5;  // no base; without a SIB byte, relative to the next instruction
  if (none) i.base = displacement(4);
  if (none && !i.sib) i.base += reinterpret_cast<std::int64_t>(at);
  if (!none) i.base = machine.general(base | b << 3);
  if (mode == 1) i.disp8 = displacement(1);
  if (mode == 2) i.base += displacement(4);
  return at;
}

// False if the bytes are of neither encoding. Reads no byte beyond the instruction. None of the instructions known here
// has an immediate.
inline bool decode(const unsigned char* const begin, const Machine& machine, Instruction& i) {
  i = {};
  const unsigned char* at = begin;
  const unsigned first = *at++;
  unsigned x = 0, b = 0, r = 0;
  if (first == 0xc5) {
    const unsigned p = *at++;
    i.encoding = Encoding::vex2;
    i.map = 1;
    r = ~p >> 7 & 1;
    i.vvvv = ~p >> 3 & 15;
    i.length = p >> 2 & 1;
    i.prefix = static_cast<Prefix>(p & 3);
  } else if (first == 0xc4) {
    const unsigned p = *at++, q = *at++;
    i.encoding = Encoding::vex3;
    i.map = p & 31;
    r = ~p >> 7 & 1;
    x = ~p >> 6 & 1;
    b = ~p >> 5 & 1;
    i.w = q >> 7;
    i.vvvv = ~q >> 3 & 15;
    i.length = q >> 2 & 1;
    i.prefix = static_cast<Prefix>(q & 3);
  } else if (first == 0x62) {
    const unsigned p = *at++, q = *at++, s = *at++;
    if ((p & 8) != 0 || (q & 4) == 0) return false;
    i.encoding = Encoding::evex;
    i.map = p & 7;
    r = (~p >> 7 & 1) | (~p >> 4 & 1) << 1;
    x = ~p >> 6 & 1;
    b = ~p >> 5 & 1;
    i.w = q >> 7;
    i.vvvv = (~q >> 3 & 15) | (~s >> 3 & 1) << 4;
    i.prefix = static_cast<Prefix>(q & 3);
    i.zeroing = s >> 7;
    i.length = s >> 5 & 3;
    i.broadcast = s >> 4 & 1;
    i.mask = s & 7;
  } else {
    return false;
  }
  i.opcode = *at++;
  at = decode_operand(at, machine, x, b, i);
  i.reg = (i.modrm >> 3 & 7) | r << 3;
  if (!i.memory && i.encoding == Encoding::evex) i.rm |= x << 4;
  i.size = static_cast<std::size_t>(at - begin);
  return true;
}

}  // namespace emulator
