// Attention of few queries over many keys, as in decoding.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstring>

#include "fastlinear/driver/grid.hpp"
#include "fastlinear/driver/heads.hpp"
#include "fastlinear/host/memory.hpp"
#include "fastlinear/host/parallel.hpp"

namespace fastlinear {

// What answers few queries of one problem on one thread: heads that share k and v at a time, over the keys that are
// seen only, as a cache may be filled in part.
class FewAttender {
 public:
  FewAttender(const AttentionProblem& p, const Vectors& vectors) : p_(p), vectors_(vectors) {}

  // The keys that query i of a head sees lie in here.
  Range seen(std::ptrdiff_t b, std::ptrdiff_t h, std::ptrdiff_t i) {
    Range found{0, p_.causal ? std::min(p_.keys, i + 1) : p_.keys};
    if (p_.mask.data == nullptr || is_float(p_.mask.format)) return found;
    const char* const mask = p_.mask.at(b, h, i);
    while (found.begin < found.end && mask[found.end - 1] == 0) found.end -= skipped(mask + found.end, found.end);
    while (found.begin < found.end && mask[found.begin] == 0) ++found.begin;
    return found;
  }

  // Query i of the heads [begin, end) of batch b.
  void make(std::ptrdiff_t b, Range heads, std::ptrdiff_t i) {
    const std::ptrdiff_t kv = heads.begin / (p_.heads / p_.kv_heads), count = heads.end - heads.begin;
    const Range keys = seen(b, heads.begin, i);
    const std::ptrdiff_t n = keys.end - keys.begin;
    thread_local Scratch memory[2];
    vectors_.few_queries[static_cast<std::size_t>(p_.q.format)]({
        .q = p_.q.at(b, heads.begin, i),
        .q_stride = p_.q.head,
        .y = p_.y.at(b, heads.begin, i),
        .y_stride = p_.y.head,
        .k = p_.k.at(b, kv, keys.begin),
        .k_stride = p_.k.row,
        .v = p_.v.at(b, kv, keys.begin),
        .v_stride = p_.v.row,
        .queries = count,
        .keys = n,
        .size = p_.size,
        .scale = p_.scale,
        .cap = p_.cap,
        .added = p_.mask.data == nullptr ? nullptr : added(p_.mask.at(b, heads.begin, i), keys, memory[0]),
        .sinks = p_.sinks == nullptr ? nullptr : p_.sinks + heads.begin,
        .scratch = memory[1].floats(few_queries_scratch(count, n, p_.size)),
    });
  }

 private:
  // Bytes at the end of a mask, the last of which is known to be 0, that are: eight at a time where all are.
  static std::ptrdiff_t skipped(const char* end, std::ptrdiff_t length) {
    std::uint64_t last = 1;
    if (length >= 8) std::memcpy(&last, end - 8, 8);
    return last == 0 ? 8 : 1;
  }

  // A mask of these keys in fp32; null where it hides none of them.
  const float* added(const char* mask, Range keys, Scratch& memory) const {
    const std::ptrdiff_t n = keys.end - keys.begin;
    mask += keys.begin * element_bytes(p_.mask.format);
    if (!is_float(p_.mask.format) && std::memchr(mask, 0, static_cast<std::size_t>(n)) == nullptr) return nullptr;
    if (p_.mask.format == kNumbers) return reinterpret_cast<const float*>(mask);
    float* const to = memory.floats(n);
    widen_mask(vectors_, p_.mask.format, mask, to, n);
    return to;
  }

  const AttentionProblem& p_;
  const Vectors& vectors_;
};

// Queries of a head that FewAttender answers one by one: with more of them Attender's lanes are filled better.
inline constexpr std::ptrdiff_t kFewQueries = 8;

// With fewer bytes of keys and values than this, too, a second thread is not worth waking. They come from memory (10
// us): since the last token read them, all weights of a model have passed through the caches.
inline constexpr std::ptrdiff_t kSerialKeys = 192 << 10;

inline bool attend_few(const AttentionProblem& p, const Vectors& vectors, std::ptrdiff_t threads) {
  constexpr std::ptrdiff_t kMost = 8;  // heads at a time, so that their scores stay in the cache
  const Range keys = FewAttender(p, vectors).seen(0, 0, p.queries - 1);
  const std::ptrdiff_t numbers = p.batches * (keys.end - keys.begin) * p.size;
  const std::ptrdiff_t bytes = 2 * p.kv_heads * numbers * element_bytes(p.k.format);
  if (bytes < kSerialKeys && 2 * p.heads * p.queries * numbers < kSerialAttention) threads = 1;
  const std::ptrdiff_t group = p.heads / p.kv_heads;
  const bool apart = (p.mask.data != nullptr && p.mask.head != 0) || p.batches * p.kv_heads * p.queries < threads;
  const std::ptrdiff_t parts = apart ? group : (group + kMost - 1) / kMost;
  const std::ptrdiff_t row = p.kv_heads * parts;
  return share_out(p.batches * p.queries * row, threads, [&] {
    return [&, attender = FewAttender(p, vectors)](std::ptrdiff_t i) mutable {
      const std::ptrdiff_t kv = i % row / parts, part = i % parts, query = i / row;
      const std::ptrdiff_t first = kv * group;
      attender.make(query / p.queries,
                    {first + share_begin(group, part, parts), first + share_begin(group, part + 1, parts)},
                    query % p.queries);
    };
  });
}

}  // namespace fastlinear
