// Carries out, in a handler of SIGILL, what this CPU cannot: AMX, AVX512-FP16, AVX-VNNI, as far as the library uses
// them. So the machine code that ships runs here, in the process as it is, on any thread. The handler counts what it
// carries out and reports what hardware would not.
//
// #UD goes to the handler that was there before, #GP is a SIGSEGV, and a page fault in an operand is one as it always
// is: it dies, or is mended and goes on.
#include <pthread.h>
#include <signal.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <atomic>
#include <cerrno>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <iterator>
#include <mutex>

#include "decode.hpp"
#include "loops.hpp"
#include "machine.hpp"
#include "tiles.hpp"
#include "vectors.hpp"
#include "watch.hpp"

namespace emulator {
namespace {

enum class Operand : std::uint8_t { memory, sib, reg, none, any };  // what ModRM must name; none: exactly c0

struct Operation {
  const char* name;  // or null, where it needs no emulation
  bool evex;
  std::uint8_t map;
  Prefix prefix;
  std::uint8_t opcode;
  Operand operand;
  Outcome (*run)(Machine&, const Instruction&);
};

using enum Prefix;
using S8 = std::int8_t;
using U8 = std::uint8_t;

constexpr Operation kOperations[] = {
    {"ldtilecfg", false, 2, none, 0x49, Operand::memory, tiles::ldtilecfg},
    {"sttilecfg", false, 2, x66, 0x49, Operand::memory, tiles::sttilecfg},
    {"tilerelease", false, 2, none, 0x49, Operand::none, tiles::tilerelease},
    {"tilezero", false, 2, xf2, 0x49, Operand::reg, tiles::tilezero},
    {"tileloadd", false, 2, xf2, 0x4b, Operand::sib, tiles::tileload},
    {"tileloaddt1", false, 2, x66, 0x4b, Operand::sib, tiles::tileload},
    {"tilestored", false, 2, xf3, 0x4b, Operand::sib, tiles::tilestore},
    {"tdpbf16ps", false, 2, xf3, 0x5c, Operand::reg, tiles::tdp_floats<tiles::BFloat>},
    {"tdpfp16ps", false, 2, xf2, 0x5c, Operand::reg, tiles::tdp_floats<tiles::Half>},
    {"tdpbssd", false, 2, xf2, 0x5e, Operand::reg, tiles::tdp_bytes<S8, S8>},
    {"tdpbsud", false, 2, xf3, 0x5e, Operand::reg, tiles::tdp_bytes<S8, U8>},
    {"tdpbusd", false, 2, x66, 0x5e, Operand::reg, tiles::tdp_bytes<U8, S8>},
    {"tdpbuud", false, 2, none, 0x5e, Operand::reg, tiles::tdp_bytes<U8, U8>},
    {"vfmadd132ph", true, 6, x66, 0x98, Operand::any, vectors::fmadd_ph<1, 3, 2>},
    {"vfmadd213ph", true, 6, x66, 0xa8, Operand::any, vectors::fmadd_ph<2, 1, 3>},
    {"vfmadd231ph", true, 6, x66, 0xb8, Operand::any, vectors::fmadd_ph<2, 3, 1>},
    {"vpdpbusd", false, 2, x66, 0x50, Operand::any, vectors::dpbusd},
    {nullptr, true, 1, xf2, 0x6f, Operand::any, vectors::move},   // vmovdqu8, vmovdqu16
    {nullptr, true, 1, xf3, 0x6f, Operand::any, vectors::move},   // vmovdqu32, vmovdqu64
    {nullptr, true, 1, x66, 0x6f, Operand::any, vectors::move},   // vmovdqa32, vmovdqa64
    {nullptr, true, 1, none, 0x10, Operand::any, vectors::move},  // vmovups
    {nullptr, false, 1, xf3, 0x6f, Operand::any, vectors::move},  // vmovdqu
    {nullptr, false, 1, x66, 0x6f, Operand::any, vectors::move},  // vmovdqa
    {nullptr, true, 2, x66, 0x79, Operand::any, vectors::broadcast<2>},
    {nullptr, false, 2, x66, 0x58, Operand::any, vectors::broadcast<4>},
};
constexpr std::size_t kKinds = std::size(kOperations);

std::atomic<std::uint64_t> counts[kKinds];
std::atomic<std::uint64_t> faults{0};
struct sigaction previous;
std::atomic<bool> installed{false};

// Of tile instructions: 64-bit mode, VEX of three bytes, W 0, 128 bits, vvvv unused but in products.
bool fits(const Operation& o, const Instruction& i) {
  if (o.evex != (i.encoding == Encoding::evex) || o.map != i.map || o.prefix != i.prefix || o.opcode != i.opcode)
    return false;
  const bool tile = o.operand != Operand::any;
  const bool product = tile && (o.opcode == 0x5c || o.opcode == 0x5e);
  if (tile && (i.w || i.length != 0 || (i.vvvv != 0 && !product))) return false;
  if (o.name != nullptr && !tile && i.w) return false;
  switch (o.operand) {
    case Operand::memory:
      return i.memory && (i.modrm >> 3 & 7) == 0;
    case Operand::sib:
      return i.memory && i.sib;
    case Operand::reg:
      return !i.memory && (product || i.rm == 0);
    case Operand::none:
      return i.modrm == 0xc0;
    case Operand::any:
      return true;
  }
  return false;
}

const Operation* find(const Instruction& i) {
  for (const Operation& o : kOperations)
    if (fits(o, i)) return &o;
  return nullptr;
}

// As the CPU does it: the signal is pending when the handler returns, and meets the instruction that is to blame.
void raise_protection() {
  siginfo_t info{};
  info.si_signo = SIGSEGV;
  info.si_code = SI_KERNEL;
  sigset_t blocked;
  sigemptyset(&blocked);
  sigaddset(&blocked, SIGSEGV);
  pthread_sigmask(SIG_BLOCK, &blocked, nullptr);  // until then
  syscall(SYS_rt_tgsigqueueinfo, getpid(), gettid(), SIGSEGV, &info);
}

void pass_on(int signal, siginfo_t* info, void* context) {
  // Linux hands all three to handlers that ask for one, too.
  if (previous.sa_handler != SIG_DFL && previous.sa_handler != SIG_IGN)
    return previous.sa_sigaction(signal, info, context);
  installed = false;
  sigaction(SIGILL, &previous, nullptr);  // the instruction faults again, and that is the end
}

void on_sigill(int signal, siginfo_t* info, void* context) {
  const int error = errno;
  Machine machine(static_cast<ucontext_t*>(context));
  ++faults;
  tiles::file().take(machine);
  for (bool first = true;; first = false) {
    Instruction i;
    const Operation* o = decode(machine.rip(), machine, i) ? find(i) : nullptr;
    if (o == nullptr && !first && loops::step(machine)) continue;
    if (o == nullptr || (first && o->name == nullptr)) {
      if (first) pass_on(signal, info, context);
      break;
    }
    const Outcome outcome = o->run(machine, i);
    if (outcome == Outcome::protection) raise_protection();
    if (outcome == Outcome::undefined && first) pass_on(signal, info, context);
    if (outcome != Outcome::done) break;  // if it is not the first, it faults again, as one
    machine.jump(machine.rip() + i.size);
    ++counts[o - kOperations];
  }
  tiles::file().give(machine);
  errno = error;
}

}  // namespace
}  // namespace emulator

using namespace emulator;

extern "C" {

// Handlers that are installed later hide this one: installing again mends that.
[[gnu::visibility("default")]] void emulator_install() {
  static std::once_flag forks;
  std::call_once(forks, [] { pthread_atfork(nullptr, nullptr, [] { tiles::file().clear(); }); });
  struct sigaction wanted{};
  wanted.sa_sigaction = on_sigill;
  wanted.sa_flags = SA_SIGINFO | SA_NODEFER;  // a page fault within is the program's, and so is what it leads to
  struct sigaction before{};
  sigaction(SIGILL, &wanted, &before);
  if (before.sa_sigaction != on_sigill) previous = before;
  installed = true;
}

[[gnu::visibility("default")]] void emulator_remove() {
  if (installed.exchange(false)) sigaction(SIGILL, &previous, nullptr);
}

// Name and count of what was carried out, by number; null past the end, and for what needs no emulation.
[[gnu::visibility("default")]] std::size_t emulator_kinds() { return kKinds; }
[[gnu::visibility("default")]] const char* emulator_kind(std::size_t i) { return kOperations[i].name; }
[[gnu::visibility("default")]] std::uint64_t emulator_count(std::size_t i) { return counts[i]; }
[[gnu::visibility("default")]] std::uint64_t emulator_faults() { return faults; }

// Threads that have tiles which are not in their initial state.
[[gnu::visibility("default")]] std::int64_t emulator_live() { return tiles::live; }

// From now on no tile may be loaded from between these rows, or over their ends. False if there is no place left.
[[gnu::visibility("default")]] bool emulator_watch(const void* data, std::size_t rows, std::size_t row_bytes,
                                                   std::size_t stride, const char* name) {
  Matrix m{static_cast<const unsigned char*>(data), rows, row_bytes, stride, {}};
  std::strncpy(m.name, name, sizeof m.name - 1);
  return watch().add(m);
}
[[gnu::visibility("default")]] const char* emulator_report(std::size_t i) { return watch().text(i); }

// Counts, reports and matrices of old.
[[gnu::visibility("default")]] void emulator_reset() {
  for (auto& count : counts) count = 0;
  faults = 0;
  watch().forget();
}

// Bytes of the instruction at `code`, if it is one that is emulated, else 0.
[[gnu::visibility("default")]] std::size_t emulator_knows(const unsigned char* code) {
  ucontext_t nowhere{};
  Instruction i;
  const Operation* o = decode(code, Machine(&nowhere), i) ? find(i) : nullptr;
  return o != nullptr && o->name != nullptr ? i.size : 0;
}

}  // extern "C"
