// Rotary embedding, and the cache of keys and values that what is rotated goes to.
#pragma once

#include <cstddef>
#include <cstring>
#include <new>

#include "fastlinear/driver/heads.hpp"
#include "fastlinear/host/memory.hpp"
#include "fastlinear/host/parallel.hpp"

namespace fastlinear {

// Rows of q and k are rotated, those of q to `rotated`; those of k and v are written to the cache from row `at` on,
// after as many rows of the cache, which is then dense, as `dropped` have left it at its front.
struct CacheProblem {
  std::ptrdiff_t batches, heads, kv_heads, rows, size, at, dropped;
  Heads q, k, v, rotated, keys, values;  // all of one floating format
  Heads cos, sin;                        // of it, too; strides of heads are 0
};

// What does so for one problem on one thread.
class Rotator {
 public:
  Rotator(const CacheProblem& p, const Vectors& vectors) : p_(p), vectors_(vectors) {}

  // Row r of batch b.
  void make(std::ptrdiff_t b, std::ptrdiff_t r) const {
    thread_local Scratch memory[4];
    const bool wide = p_.q.format == kNumbers;
    const auto numbers = [&](const Heads& heads, std::ptrdiff_t h, std::size_t which) {
      const char* const data = heads.at(b, h, r);
      if (wide) return reinterpret_cast<const float*>(data);
      float* const to = memory[which].floats(p_.size);
      conversion().widen(data, to, p_.size);
      return static_cast<const float*>(to);
    };
    const float *const cos = numbers(p_.cos, 0, 0), *const sin = numbers(p_.sin, 0, 1);
    const auto rotate = [&](const Heads& from, std::ptrdiff_t h, char* to) {
      float* const y = wide ? reinterpret_cast<float*>(to) : memory[3].floats(p_.size);
      vectors_.rotation({numbers(from, h, 2), cos, sin, y, p_.size});
      if (!wide) conversion().narrow(y, to, p_.size);
    };
    for (std::ptrdiff_t h = 0; h < p_.heads; ++h) rotate(p_.q, h, p_.rotated.at(b, h, r));
    const auto nbytes = static_cast<std::size_t>(p_.size * element_bytes(p_.q.format));
    for (std::ptrdiff_t h = 0; h < p_.kv_heads; ++h) {
      rotate(p_.k, h, p_.keys.at(b, h, p_.at + r));
      std::memcpy(p_.values.at(b, h, p_.at + r), p_.v.at(b, h, r), nbytes);
    }
  }

 private:
  const Conversion& conversion() const { return vectors_.conversions[static_cast<std::size_t>(p_.q.format)]; }

  const CacheProblem& p_;
  const Vectors& vectors_;
};

// Of a head of the cache, [at + dropped, size]: its rows move up.
inline void drop(const CacheProblem& p, const Heads& cache, std::ptrdiff_t b, std::ptrdiff_t h) {
  const std::ptrdiff_t nbytes = p.at * p.size * element_bytes(cache.format);
  std::memmove(cache.at(b, h), cache.at(b, h, p.dropped), static_cast<std::size_t>(nbytes));
}

// With fewer numbers than this (about 10 us) a second thread is not worth waking.
inline constexpr std::ptrdiff_t kSerialCache = 64 << 10;

// False when memory ran out.
inline bool store(const CacheProblem& p, const Vectors& vectors, std::ptrdiff_t threads) try {
  const std::ptrdiff_t rows = p.batches * p.rows;
  for (std::ptrdiff_t i = 0; p.dropped > 0 && i < p.batches * p.kv_heads; ++i)
    for (const Heads* cache : {&p.keys, &p.values}) drop(p, *cache, i / p.kv_heads, i % p.kv_heads);
  return share_out(rows, rows * (p.heads + p.kv_heads) * p.size < kSerialCache ? 1 : threads, [&] {
    return [&p, rotator = Rotator(p, vectors)](std::ptrdiff_t i) { rotator.make(i / p.rows, i % p.rows); };
  });
} catch (const std::bad_alloc&) {
  return false;
}

}  // namespace fastlinear
