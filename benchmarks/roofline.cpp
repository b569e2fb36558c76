// What the machine can do at most: multiply-adds a second, in fp32 and where it has them of bf16 pairs, and bytes read
// a second from a buffer of a given size.
//
// benchmarks/roofline.py compiles this, loads it and picks what to measure. Every figure is the best of several
// repetitions, each from the first thread's start to the last one's end, so that it is hard to beat.
#include <immintrin.h>
#include <sys/mman.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstddef>
#include <cstring>
#include <initializer_list>
#include <string_view>
#include <thread>
#include <vector>

#include "fastlinear/host/cpu.hpp"

namespace {

namespace bits = fastlinear::cpu_bits;
using std::size_t;

constexpr size_t kChains = 12;      // two ports of latency 4 need 8; 12 and two operands fit the 16 registers of AVX2
constexpr size_t kSteps = 1 << 15;  // about 0.1 ms
constexpr size_t kPatience = 1 << 14;  // spins before a thread lets others run: the one it waits for may have no core
constexpr size_t kLine = 64;
constexpr size_t kGroup = 8 * kLine;  // what one step of a reading loop takes

[[gnu::target("avx2,fma")]] void multiply_add_avx2() {
  __m256 sum[kChains], a = _mm256_set1_ps(0.999f), b = _mm256_set1_ps(1e-3f);
  for (__m256& s : sum) s = b;
  for (size_t i = 0; i < kSteps; ++i)
    for (__m256& s : sum) s = _mm256_fmadd_ps(s, a, b);
  for (__m256& s : sum) asm volatile("" : : "x"(s));
}

[[gnu::target("avx512f")]] void multiply_add_avx512() {
  __m512 sum[kChains], a = _mm512_set1_ps(0.999f), b = _mm512_set1_ps(1e-3f);
  for (__m512& s : sum) s = b;
  for (size_t i = 0; i < kSteps; ++i)
    for (__m512& s : sum) s = _mm512_fmadd_ps(s, a, b);
  for (__m512& s : sum) asm volatile("" : : "v"(s));
}

[[gnu::target("avx512f,avx512bf16")]] void multiply_add_avx512_bf16() {
  __m512 sum[kChains];
  const __m512bh a = (__m512bh)_mm512_set1_epi32(0x3f003f00), b = a;  // pairs of 0.5
  for (__m512& s : sum) s = _mm512_setzero_ps();
  for (size_t i = 0; i < kSteps; ++i)
    for (__m512& s : sum) s = _mm512_dpbf16_ps(s, a, b);
  for (__m512& s : sum) asm volatile("" : : "v"(s));
}

// 4 x 3 is less than what any byte may be: the time does not depend on it.
[[gnu::target("avx512f,avx512vnni")]] void multiply_add_avx512_vnni() {
  __m512i sum[kChains], a = _mm512_set1_epi8(4), b = _mm512_set1_epi8(3);
  for (__m512i& s : sum) s = _mm512_setzero_si512();
  for (size_t i = 0; i < kSteps; ++i)
    for (__m512i& s : sum) s = _mm512_dpbusd_epi32(s, a, b);
  for (__m512i& s : sum) asm volatile("" : : "v"(s));
}

[[gnu::target("avx2,avxvnni")]] void multiply_add_avx_vnni() {
  __m256i sum[kChains], a = _mm256_set1_epi8(4), b = _mm256_set1_epi8(3);
  for (__m256i& s : sum) s = _mm256_setzero_si256();
  for (size_t i = 0; i < kSteps; ++i)
    for (__m256i& s : sum) s = _mm256_dpbusd_avx_epi32(s, a, b);
  for (__m256i& s : sum) asm volatile("" : : "x"(s));
}

// Reads `streams` parts of [data, data + bytes) side by side, as a kernel reads its panels; `ahead` bytes are
// prefetched, 0 for none. Two registers a line on AVX2, one on AVX-512.
template <size_t kStreams>
[[gnu::target("avx2")]] void read_avx2(const char* data, size_t bytes, size_t ahead) {
  __m256 sum[kGroup / 32] = {};
  const size_t part = bytes / kStreams, step = kGroup / kStreams;
  for (size_t i = 0; i < part; i += step)
    for (size_t s = 0; s < kStreams; ++s)
      for (size_t j = 0; j < step; j += 32) {
        const char* p = data + s * part + i + j;
        __m256& mine = sum[(s * step + j) / 32];
        mine = _mm256_add_ps(mine, _mm256_load_ps(reinterpret_cast<const float*>(p)));
        if (ahead && j % kLine == 0) _mm_prefetch(p + ahead, _MM_HINT_T0);
      }
  for (__m256& s : sum) asm volatile("" : : "x"(s));
}

template <size_t kStreams>
[[gnu::target("avx512f")]] void read_avx512(const char* data, size_t bytes, size_t ahead) {
  __m512 sum[kGroup / 64] = {};
  const size_t part = bytes / kStreams, step = kGroup / kStreams;
  for (size_t i = 0; i < part; i += step)
    for (size_t s = 0; s < kStreams; ++s)
      for (size_t j = 0; j < step; j += 64) {
        const char* p = data + s * part + i + j;
        __m512& mine = sum[(s * step + j) / 64];
        mine = _mm512_add_ps(mine, _mm512_load_ps(reinterpret_cast<const float*>(p)));
        if (ahead) _mm_prefetch(p + ahead, _MM_HINT_T0);
      }
  for (__m512& s : sum) asm volatile("" : : "v"(s));
}

struct Probe {
  std::string_view isa;
  bool runs;     // here
  double flops;  // of one multiply_add()
  void (*multiply_add)();
  void (*read_one)(const char* data, size_t bytes, size_t ahead);
  void (*read_four)(const char* data, size_t bytes, size_t ahead);
};

// Whether CPUID shows these and the system saves the registers.
bool has(std::uint64_t saved, std::initializer_list<fastlinear::CpuBit> needs) {
  const fastlinear::CpuSource cpu = fastlinear::this_cpu();
  return (fastlinear::saved_registers(cpu) & saved) == saved && fastlinear::has_all(cpu, {needs.begin(), needs.size()});
}

const Probe kProbes[] = {
    {"avx2", has(bits::kYmmSaved, {bits::kAvx2, bits::kFma}), 2.0 * 8 * kChains * kSteps, multiply_add_avx2,
     read_avx2<1>, read_avx2<4>},
    {"avx512", has(bits::kZmmSaved, {bits::kAvx512F}), 2.0 * 16 * kChains * kSteps, multiply_add_avx512, read_avx512<1>,
     read_avx512<4>},
    {"avx512_bf16", has(bits::kZmmSaved, {bits::kAvx512Bf16}), 2.0 * 32 * kChains * kSteps, multiply_add_avx512_bf16,
     read_avx512<1>, read_avx512<4>},
    {"avx_vnni", has(bits::kYmmSaved, {bits::kAvxVnni}), 2.0 * 32 * kChains * kSteps, multiply_add_avx_vnni,
     read_avx2<1>, read_avx2<4>},
    {"avx512_vnni", has(bits::kZmmSaved, {bits::kAvx512Vnni}), 2.0 * 64 * kChains * kSteps, multiply_add_avx512_vnni,
     read_avx512<1>, read_avx512<4>},
};

const Probe* find(const char* isa) {
  auto wanted = [&](const Probe& probe) { return probe.isa == isa && probe.runs; };
  const Probe* probe = std::find_if(std::begin(kProbes), std::end(kProbes), wanted);
  return probe == std::end(kProbes) ? nullptr : probe;
}

double now() { return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count(); }

// Seconds that all threads together take for work(thread) at least, of `repeats` times. They meet before each,
// spinning: waking up would take as long as the work.
template <class Work>
double fastest(size_t threads, size_t repeats, const Work& work) {
  std::atomic<size_t> arrived{0};
  std::vector<double> start(threads * repeats), end(threads * repeats);
  auto run = [&](size_t thread) {
    for (size_t i = 0; i < repeats; ++i) {
      ++arrived;
      for (size_t spins = 0; arrived < (i + 1) * threads; ++spins)
        spins < kPatience ? _mm_pause() : std::this_thread::yield();
      start[i * threads + thread] = now();
      work(thread);
      end[i * threads + thread] = now();
    }
  };
  std::vector<std::thread> others;
  for (size_t t = 1; t < threads; ++t) others.emplace_back(run, t);
  run(0);
  for (std::thread& t : others) t.join();
  double best = 1e30;
  for (size_t i = 0; i < repeats * threads; i += threads)
    best = std::min(best,
                    *std::max_element(&end[i], &end[i] + threads) - *std::min_element(&start[i], &start[i] + threads));
  return best;
}

// Memory in huge pages where the system grants them, as packed weights are. Kept for the next, mostly equal, request.
const char* buffer(size_t bytes) {
  static char* data = nullptr;
  static size_t capacity = 0;
  if (bytes > capacity) {
    if (data) munmap(data, capacity);
    void* fresh = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    data = fresh == MAP_FAILED ? nullptr : static_cast<char*>(fresh);
    capacity = data ? bytes : 0;
    if (data) {
      madvise(data, bytes, MADV_HUGEPAGE);
      std::memset(data, 1, bytes);  // untouched pages would all be the one page of zeros
    }
  }
  return data;
}

}  // namespace

// Operations a second of all threads, an FMA being two; 0 for an ISA that is not in the table or does not run here.
extern "C" double fma_peak(const char* isa, size_t threads, size_t repeats) {
  const Probe* probe = find(isa);
  if (!probe) return 0;
  return static_cast<double>(threads) * probe->flops /
         fastest(threads, repeats, [&](size_t) { probe->multiply_add(); });
}

// Bytes a second that all threads read, each `passes` times its share of a buffer of about `bytes`; 0 for an ISA that
// is not in the table or does not run here, or where there is no memory.
extern "C" double read_bandwidth(const char* isa, size_t threads, size_t repeats, size_t bytes, size_t passes,
                                 size_t streams, size_t ahead) {
  const Probe* probe = find(isa);
  const size_t share = (bytes / threads + kGroup - 1) / kGroup * kGroup;
  const char* data = buffer(threads * share);
  if (!probe || !data) return 0;
  auto read = streams == 1 ? probe->read_one : probe->read_four;
  double seconds = fastest(threads, repeats, [&](size_t thread) {
    for (size_t i = 0; i < passes; ++i) read(data + thread * share, share, ahead);
  });
  return static_cast<double>(threads * share * passes) / seconds;
}
