// Programs that use tiles as programs do, by the compiler's intrinsics, and meet a page fault on the way.
#include <immintrin.h>
#include <setjmp.h>
#include <signal.h>
#include <sys/mman.h>

#include <cstddef>
#include <cstdint>
#include <cstring>

namespace {

struct Config {
  std::uint8_t palette = 1, start_row = 0, reserved[14] = {};
  std::uint16_t colsb[16] = {};
  std::uint8_t rows[16] = {};
};

Config full() {
  Config c;
  for (int t = 0; t < 8; ++t) {
    c.colsb[t] = 64;
    c.rows[t] = 16;
  }
  return c;
}

void* page;
int page_faults, start_row;
sigjmp_buf back;
bool mends;

[[gnu::target("amx-tile")]] void on_page_fault(int, siginfo_t*, void*) {
  ++page_faults;
  Config now;
  _tile_storeconfig(&now);
  start_row = now.start_row;
  if (!mends) siglongjmp(back, 1);
  mprotect(page, 4096, PROT_READ | PROT_WRITE);
}

}  // namespace

extern "C" {

// c [32, 32] += a [32, 2 * pairs] b, whose panel of 32 columns lies in pairs of k: two by two tiles, one load each.
[[gnu::visibility("default"), gnu::target("amx-tile,amx-bf16")]] void multiply_bf16(const std::uint16_t* a,
                                                                                    const std::uint16_t* b, float* c,
                                                                                    std::size_t pairs) {
  const Config config = full();
  _tile_loadconfig(&config);
  const std::size_t lda = 4 * pairs;
  _tile_loadd(0, c, 128);
  _tile_loadd(1, c + 16, 128);
  _tile_loadd(2, c + 16 * 32, 128);
  _tile_loadd(3, c + 16 * 32 + 16, 128);
  for (std::size_t k = 0; k < pairs; k += 16) {
    _tile_loadd(6, b + k * 64, 128);
    _tile_loadd(4, a + 2 * k, lda);
    _tile_dpbf16ps(0, 4, 6);
    _tile_stream_loadd(7, b + k * 64 + 32, 128);
    _tile_dpbf16ps(1, 4, 7);
    _tile_loadd(5, a + 2 * k + 16 * 2 * pairs, lda);
    _tile_dpbf16ps(2, 5, 6);
    _tile_dpbf16ps(3, 5, 7);
  }
  _tile_stored(0, c, 128);
  _tile_stored(1, c + 16, 128);
  _tile_stored(2, c + 16 * 32, 128);
  _tile_stored(3, c + 16 * 32 + 16, 128);
  _tile_release();
}

// Loads a tile at `from`, whose row `bad` and all after it lie on a forbidden page, and stores it at `to`. On the fault
// the handler mends the page, or jumps out and the load is begun again. Returns the faults, and in `row` the start_row
// that the handler saw.
[[gnu::visibility("default"), gnu::target("amx-tile")]] int load_across(void* forbidden, const void* from, void* to,
                                                                        bool mend, int* row) {
  struct sigaction wanted{}, before;
  wanted.sa_sigaction = on_page_fault;
  wanted.sa_flags = SA_SIGINFO | SA_NODEFER;
  sigaction(SIGSEGV, &wanted, &before);
  page = forbidden;
  page_faults = 0;
  mends = mend;
  mprotect(page, 4096, PROT_NONE);
  const Config config = full();
  _tile_loadconfig(&config);
  if (sigsetjmp(back, 1) != 0) mprotect(page, 4096, PROT_READ | PROT_WRITE);
  _tile_loadd(0, from, 64);
  _tile_stored(0, to, 64);
  _tile_release();
  sigaction(SIGSEGV, &before, nullptr);
  *row = start_row;
  return page_faults;
}

// A handler of SIGILL that is content with anything.
[[gnu::visibility("default")]] void skip_five_bytes(int, siginfo_t*, void* context) {
  static_cast<ucontext_t*>(context)->uc_mcontext.gregs[REG_RIP] += 5;
}

}  // extern "C"
