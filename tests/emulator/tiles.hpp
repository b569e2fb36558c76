// AMX as the manual has it: configuration, tile file, loads and products.
//
//   LDTILECFG faults on anything reserved and zeroes all tiles; palette 0 is the initial state
//   loads read rows start_row.. of colsb bytes and zero the rest; a page fault leaves start_row at its row, from where
//   the load goes on when it is repeated
//   TDPBF16PS and TDPFP16PS keep two fp32 sums a column, of even and of odd k, by fused multiply-adds from +0 on; the
//   two are added, then the tile: round to nearest even, denormal inputs and results are zeros, MXCSR plays no part
//   TDPB??D add four products at a time to int32 and wrap
#pragma once

#include <immintrin.h>

#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstring>

#include "decode.hpp"
#include "machine.hpp"
#include "watch.hpp"

namespace emulator {

enum class Outcome : std::uint8_t { done, undefined, protection };  // the last two: #UD, #GP

namespace tiles {

inline constexpr unsigned kTiles = 8, kRows = 16, kColumns = 64;  // bytes a column; of palette 1

struct Config {
  std::uint8_t palette, start_row, reserved_a[14];
  std::uint16_t colsb[16];
  std::uint8_t rows[16];
};
static_assert(sizeof(Config) == 64);

// Threads whose tiles are not in their initial state.
inline std::atomic<std::int64_t> live{0};

// One a thread, and no more a secret to other threads than the real one. A fault is a call that the kernel makes for us
// from a known place, so ordinary thread-local storage will do.
//
// A CPU that has tiles and lacks what faulted configures and loads its own, and those are worked on: `take` before,
// `give` after. Where the process did not ask for them, all but configuring faults, and their data are here.
class File {
 public:
  ~File() { release(); }

  Config config{};
  alignas(64) unsigned char data[kTiles][kRows][kColumns]{};

  bool configured() const { return config.palette != 0; }

  void configure(const Config& wanted) {
    live += (wanted.palette != 0) - counted_;
    counted_ = wanted.palette != 0;
    config = wanted;
    clear();
  }
  void take(const Machine& machine) {
    Config theirs;
    if (!machine.get(Machine::kTileConfig, &theirs)) return;
    if (std::memcmp(&theirs, &config, sizeof config) != 0) clear();
    config = theirs;
    machine.get(Machine::kTileData, data);
  }
  void give(Machine& machine) const {
    if (!configured()) return;
    machine.set(Machine::kTileConfig, &config);
    machine.set(Machine::kTileData, data);
  }
  void release() { configure({}); }
  void clear() { std::memset(data, 0, sizeof data); }

  bool usable(unsigned tile) const {
    if (!configured()) watch().report("tmm%u is used without a configuration", tile);
    return configured() && tile < kTiles && config.rows[tile] > 0 && config.colsb[tile] % 4 == 0;
  }

 private:
  bool counted_ = false;  // in `live`, which knows nothing of what the CPU itself configures
};

inline File& file() {
  thread_local File own;
  return own;
}

inline bool valid(const Config& c) {
  if (c.palette > 1) return false;
  const auto* bytes = reinterpret_cast<const unsigned char*>(&c);
  for (unsigned i = 2; i < 16; ++i)
    if (bytes[i] != 0) return false;
  for (unsigned t = 0; t < 16; ++t) {
    const bool exists = t < kTiles;
    if (c.colsb[t] > (exists ? kColumns : 0) || c.rows[t] > (exists ? kRows : 0)) return false;
    if ((c.colsb[t] == 0) != (c.rows[t] == 0)) return false;
  }
  return true;
}

inline Outcome ldtilecfg(Machine&, const Instruction& i) {
  Config wanted;
  std::memcpy(&wanted, i.address(1), sizeof wanted);
  if (wanted.palette == 0) {
    file().release();
    return Outcome::done;
  }
  if (!valid(wanted)) return Outcome::protection;
  file().configure(wanted);
  return Outcome::done;
}

inline Outcome sttilecfg(Machine&, const Instruction& i) {
  std::memcpy(const_cast<unsigned char*>(i.address(1)), &file().config, sizeof(Config));
  return Outcome::done;
}

inline Outcome tilerelease(Machine&, const Instruction&) {
  file().release();
  return Outcome::done;
}

inline Outcome tilezero(Machine&, const Instruction& i) {
  File& f = file();
  if (!f.usable(i.reg)) return Outcome::undefined;
  std::memset(f.data[i.reg], 0, sizeof f.data[i.reg]);
  f.config.start_row = 0;
  return Outcome::done;
}

// Row r of a memory operand; without an index all rows are the same.
inline unsigned char* row_at(const Instruction& i, unsigned r) {
  return const_cast<unsigned char*>(
      reinterpret_cast<const unsigned char*>(i.base + i.disp8 + static_cast<std::int64_t>(r) * i.index));
}

inline Outcome tileload(Machine&, const Instruction& i) {
  File& f = file();
  if (!f.usable(i.reg) || f.config.start_row >= f.config.rows[i.reg]) return Outcome::undefined;
  auto& tile = f.data[i.reg];
  const unsigned rows = f.config.rows[i.reg], bytes = f.config.colsb[i.reg];
  for (unsigned r = f.config.start_row; r < rows; ++r) {
    f.config.start_row = static_cast<std::uint8_t>(r);
    std::atomic_signal_fence(std::memory_order_seq_cst);  // a handler of the page fault may look
    watch().check_load(row_at(i, r), bytes);
    std::memcpy(tile[r], row_at(i, r), bytes);
    std::memset(tile[r] + bytes, 0, kColumns - bytes);
  }
  std::memset(tile[rows], 0, (kRows - rows) * kColumns);
  f.config.start_row = 0;
  return Outcome::done;
}

inline Outcome tilestore(Machine&, const Instruction& i) {
  File& f = file();
  if (!f.usable(i.reg) || f.config.start_row >= f.config.rows[i.reg]) return Outcome::undefined;
  for (unsigned r = f.config.start_row; r < f.config.rows[i.reg]; ++r) {
    f.config.start_row = static_cast<std::uint8_t>(r);
    std::atomic_signal_fence(std::memory_order_seq_cst);
    std::memcpy(row_at(i, r), f.data[i.reg][r], f.config.colsb[i.reg]);
  }
  f.config.start_row = 0;
  return Outcome::done;
}

// Whether the shapes of d += a * b fit; fills in the number of columns, of dwords of K.
inline bool fit(const File& f, unsigned d, unsigned a, unsigned b, unsigned& columns, unsigned& depth) {
  if (!f.usable(d) || !f.usable(a) || !f.usable(b) || d == a || d == b || a == b) return false;
  const Config& c = f.config;
  columns = c.colsb[d] / 4u;
  depth = c.colsb[a] / 4u;
  return c.colsb[d] == c.colsb[b] && c.rows[d] == c.rows[a] && depth == c.rows[b];
}

// Zeroes what lies beyond the rows and columns of a tile that was computed.
inline void trim(File& f, unsigned d) {
  for (unsigned r = 0; r < kRows; ++r) {
    const unsigned kept = r < f.config.rows[d] ? f.config.colsb[d] : 0;
    std::memset(f.data[d][r] + kept, 0, kColumns - kept);
  }
  f.config.start_row = 0;
}

template <class T>
T element(const unsigned char* row, unsigned i) {
  T value;
  std::memcpy(&value, row + i * sizeof(T), sizeof(T));
  return value;
}

struct BFloat {
  std::uint16_t bits;
};
struct Half {
  std::uint16_t bits;
};
[[gnu::target("avx2,fma,f16c")]] inline float widen(BFloat x) {
  return __builtin_bit_cast(float, std::uint32_t{x.bits} << 16);
}
// F16C looks at no mode: denormals of fp16 are normal numbers of fp32.
[[gnu::target("avx2,fma,f16c")]] inline float widen(Half x) { return _cvtsh_ss(x.bits); }

// In a function of its own, so that no arithmetic moves across the change of MXCSR.
template <class T>
[[gnu::target("avx2,fma,f16c"), gnu::noinline]] void multiply_floats(unsigned char (&d)[kRows][kColumns],
                                                                     const unsigned char (&a)[kRows][kColumns],
                                                                     const unsigned char (&b)[kRows][kColumns],
                                                                     unsigned rows, unsigned columns, unsigned depth) {
  alignas(64) float weights[2][kRows][16];
  for (unsigned k = 0; k < depth; ++k)
    for (unsigned n = 0; n < columns; ++n)
      for (unsigned odd = 0; odd < 2; ++odd) weights[odd][k][n] = widen(element<T>(b[k], 2 * n + odd));
  for (unsigned m = 0; m < rows; ++m) {
    alignas(64) float sums[2][16]{};
    for (unsigned k = 0; k < depth; ++k)
      for (unsigned odd = 0; odd < 2; ++odd) {
        const float x = widen(element<T>(a[m], 2 * k + odd));
        for (unsigned n = 0; n < columns; ++n) sums[odd][n] = __builtin_fmaf(x, weights[odd][k][n], sums[odd][n]);
      }
    for (unsigned n = 0; n < columns; ++n) {
      const float sum = element<float>(d[m], n) + (sums[0][n] + sums[1][n]);
      std::memcpy(d[m] + 4 * n, &sum, 4);
    }
  }
}

template <class T>
Outcome tdp_floats(Machine&, const Instruction& i) {
  File& f = file();
  unsigned columns, depth;
  if (!fit(f, i.reg, i.rm, i.vvvv, columns, depth)) return Outcome::undefined;
  constexpr unsigned kNearestFlushAllMasked = 0x9fc0;
  const unsigned before = _mm_getcsr();
  _mm_setcsr(kNearestFlushAllMasked);
  multiply_floats<T>(f.data[i.reg], f.data[i.rm], f.data[i.vvvv], f.config.rows[i.reg], columns, depth);
  _mm_setcsr(before);
  trim(f, i.reg);
  return Outcome::done;
}

// All 16 columns: those that there are not are trimmed.
template <class A, class B>
[[gnu::target("avx2")]] void multiply_bytes(unsigned char (&d)[kRows][kColumns],
                                            const unsigned char (&a)[kRows][kColumns],
                                            const unsigned char (&b)[kRows][kColumns], unsigned rows, unsigned depth) {
  alignas(64) std::int32_t weights[4 * kRows][16];
  for (unsigned k = 0; k < 4 * depth; ++k)
    for (unsigned n = 0; n < 16; ++n) weights[k][n] = element<B>(b[k / 4], 4 * n + k % 4);
  for (unsigned m = 0; m < rows; ++m) {
    alignas(64) std::uint32_t sums[16];
    std::memcpy(sums, d[m], sizeof sums);
    for (unsigned k = 0; k < 4 * depth; ++k) {
      const std::int32_t x = element<A>(a[m], k);
      for (unsigned n = 0; n < 16; ++n) sums[n] += static_cast<std::uint32_t>(x * weights[k][n]);
    }
    std::memcpy(d[m], sums, sizeof sums);
  }
}

template <class A, class B>
Outcome tdp_bytes(Machine&, const Instruction& i) {
  File& f = file();
  unsigned columns, depth;
  if (!fit(f, i.reg, i.rm, i.vvvv, columns, depth)) return Outcome::undefined;
  multiply_bytes<A, B>(f.data[i.reg], f.data[i.rm], f.data[i.vvvv], f.config.rows[i.reg], depth);
  trim(f, i.reg);
  return Outcome::done;
}

}  // namespace tiles

}  // namespace emulator
