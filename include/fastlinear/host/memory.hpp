// Memory: what a thread keeps from call to call, and what packed weights lie in: 2 MB pages of our own, and no storage
// of torch's, which torch may move (a tensor that goes to another process takes its storage into shared memory, in
// place).
#pragma once

#include <sys/mman.h>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <iterator>
#include <map>
#include <new>
#include <utility>

namespace fastlinear {

// Memory that one thread keeps from call to call. 64-byte aligned; only ever grows.
class Scratch {
 public:
  Scratch() = default;
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  ~Scratch() { std::free(data_); }

  float* floats(std::ptrdiff_t count) { return reinterpret_cast<float*>(bytes(count * std::ptrdiff_t{sizeof(float)})); }

  std::byte* bytes(std::ptrdiff_t count) {
    const std::size_t bytes = (static_cast<std::size_t>(count) + 63) / 64 * 64;
    if (bytes > capacity_) {
      std::free(data_);
      capacity_ = 0;
      data_ = std::aligned_alloc(64, bytes);
      if (data_ == nullptr) throw std::bad_alloc();
      capacity_ = bytes;
    }
    return static_cast<std::byte*>(data_);
  }

 private:
  void* data_ = nullptr;
  std::size_t capacity_ = 0;
};

// A weight that comes from memory is read 1.5 times as fast with 2 MB pages: 4 KB pages cost a TLB miss every 64 lines.
inline constexpr std::size_t kHugePage = 2 << 20;

// Packs lie one behind the other in chunks, since most are too small to fill a page; one larger than a chunk has a
// mapping to itself. A pack that is freed leaves a hole for later ones; pages that lie in the hole as a whole go back
// to the system, and so does a chunk that is all hole. So a pack keeps no more than the pages that it touches. But the
// last page that was freed stays, with its chunk, until it is used or the next one is freed: a small weight that is
// packed again and again would wait for a fresh page each time, whose zeros cost 100 us.
//
// Nothing here locks: every call comes from Python under the GIL, which whoever forks holds, too.
class PackMemory {
 public:
  // `bytes` bytes at a multiple of 64, with any contents; std::bad_alloc where the system has none.
  char* take(std::size_t bytes) {
    bytes = size_of(bytes);
    if (bytes > kChunk) return map(bytes, kHugePage);
    auto hole = holes_.begin();
    while (hole != holes_.end() && hole->second < bytes) ++hole;
    if (hole == holes_.end()) hole = holes_.emplace(map(kChunk, kChunk), kChunk).first;
    const auto [begin, size] = *hole;
    if (kept_ != nullptr && begin < kept_ + kHugePage && kept_ < begin + bytes) kept_ = nullptr;
    if (size > bytes) holes_.emplace(begin + bytes, size - bytes);
    holes_.erase(hole);
    return begin;
  }

  void give_back(char* data, std::size_t bytes) {
    bytes = size_of(bytes);
    if (bytes > kChunk) {
      munmap(data, bytes);
      return;
    }
    auto hole = holes_.emplace(data, bytes).first;
    const auto next = std::next(hole);
    if (next != holes_.end() && reaches(hole->first, hole->second, next->first)) {
      hole->second += next->second;
      holes_.erase(next);
    }
    if (hole != holes_.begin()) {
      const auto last = std::prev(hole);
      if (reaches(last->first, last->second, hole->first)) {
        last->second += hole->second;
        holes_.erase(hole);
        hole = last;
      }
    }
    // Of the pages that `data` lies in, the others have gone before.
    const auto [begin, size] = *hole;
    char* const first = std::max(page(begin + kHugePage - 1), page(data));
    char* const end = std::min(page(begin + size), page(data + bytes + kHugePage - 1));
    if (first >= end) return;
    if (first + kHugePage < end)
      madvise(first + kHugePage, static_cast<std::size_t>(end - first) - kHugePage, MADV_DONTNEED);
    char* const before = std::exchange(kept_, first);
    if (before != nullptr && before != first) release(before);
  }

 private:
  static constexpr std::size_t kChunk = 32 << 20;  // and at a multiple of that, so that addresses tell the chunk

  // What is taken for so many bytes: whole lines of the cache, or whole pages.
  static std::size_t size_of(std::size_t bytes) {
    const std::size_t unit = bytes > kChunk ? kHugePage : 64;
    return bytes == 0 ? unit : (bytes + unit - 1) / unit * unit;
  }

  // A page in a hole goes back, and its chunk with it if that is all hole.
  void release(char* kept) {
    const auto hole = std::prev(holes_.upper_bound(kept));
    const auto [begin, size] = *hole;
    if (size < kChunk || (begin <= kept_ && kept_ < begin + size)) {
      madvise(kept, kHugePage, MADV_DONTNEED);
    } else {
      munmap(begin, size);
      holes_.erase(hole);
    }
  }

  static char* page(char* at) { return at - reinterpret_cast<std::uintptr_t>(at) % kHugePage; }

  static bool reaches(const char* hole, std::size_t size, const char* next) {
    return hole + size == next && reinterpret_cast<std::uintptr_t>(next) % kChunk != 0;
  }

  // New pages at a multiple of `unit`. Those of 2 MB are only advice, and given when a page is first touched.
  static char* map(std::size_t bytes, std::size_t unit) {
    void* const all = mmap(nullptr, bytes + unit, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (all == MAP_FAILED) throw std::bad_alloc();
    char* const begin = static_cast<char*>(all);
    const std::size_t skip = (unit - reinterpret_cast<std::uintptr_t>(begin) % unit) % unit;
    if (skip > 0) munmap(begin, skip);
    if (skip < unit) munmap(begin + skip + bytes, unit - skip);
    madvise(begin + skip, bytes, MADV_HUGEPAGE);
    return begin + skip;
  }

  std::map<char*, std::size_t> holes_;  // by where they begin; none reaches into another chunk
  char* kept_ = nullptr;                // a page that lies in a hole, and still is memory
};

}  // namespace fastlinear
