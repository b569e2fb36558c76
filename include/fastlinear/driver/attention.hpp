// Attention of all heads; threads share them.
#pragma once

#include <algorithm>
#include <cstddef>
#include <new>

#include "fastlinear/contract/isa.hpp"
#include "fastlinear/contract/kernel.hpp"
#include "fastlinear/driver/few_queries.hpp"
#include "fastlinear/driver/heads.hpp"
#include "fastlinear/driver/rounded_attention.hpp"
#include "fastlinear/formats/all.hpp"
#include "fastlinear/host/memory.hpp"
#include "fastlinear/host/parallel.hpp"

namespace fastlinear {

// What answers queries of one problem on one thread.
class Attender {
 public:
  Attender(const AttentionProblem& p, const Vectors& vectors) : p_(p), vectors_(vectors) {}

  // The queries [begin, end) of head h of batch b.
  void make(std::ptrdiff_t b, std::ptrdiff_t h, std::ptrdiff_t begin, std::ptrdiff_t end) {
    const std::ptrdiff_t kv = h / (p_.heads / p_.kv_heads);
    if (b != batch_ || kv != kv_head_) {
      k_ = rows(p_.k, b, kv, 0, 1);
      v_ = rows(p_.v, b, kv, 1, kAttentionColumns);
      batch_ = b, kv_head_ = kv;
    }
    NextHead ahead = next_of(b, h);
    const bool masked = p_.mask.data != nullptr, same = p_.mask.row == 0;
    const std::ptrdiff_t visible = p_.causal ? begin : p_.keys;
    const char* const mask = masked && !same ? p_.mask.at(b, h, begin) : nullptr;
    const bool turned = mask != nullptr && mask == turned_ && end - begin == turned_queries_;
    turned_ = mask, turned_queries_ = end - begin;
    vectors_.attention[static_cast<std::size_t>(p_.q.format)]({
        .q = p_.q.at(b, h, begin),
        .q_stride = p_.q.row,
        .y = p_.y.at(b, h, begin),
        .y_stride = p_.y.row,
        .k = k_.data,
        .k_stride = k_.stride,
        .v = v_.data,
        .v_stride = v_.stride,
        .queries = end - begin,
        .keys = p_.keys,
        .size = p_.size,
        .scale = p_.scale,
        .cap = p_.cap,
        .added = masked && same ? added(p_.mask.at(b, h)) : nullptr,
        .mask = mask,
        .mask_stride = p_.mask.row,
        .mask_format = p_.mask.format,
        .sink = p_.sink(h),
        .turned = turned,
        .diagonal = visible,
        .scratch = scratch(3).floats(attention_scratch(p_.keys, p_.size)),
        .ahead = &ahead,
    });
  }

 private:
  struct Wide {
    const float* data;
    std::ptrdiff_t stride;
  };

  static Scratch& scratch(std::size_t which) {
    thread_local Scratch memory[4];
    return memory[which];
  }

  // The rows of k or v in fp32, each readable up to a multiple of `columns`, where all can be in L1 at a time: rows of
  // one head lie as far apart as all heads are wide, often by a power of two, so that they meet in a few sets. A few
  // queries do not pay for a copy.
  Wide rows(const Heads& heads, std::ptrdiff_t b, std::ptrdiff_t h, std::size_t which, std::ptrdiff_t columns) const {
    const std::ptrdiff_t wide = round_up(p_.size, columns);
    const bool copies = p_.queries > kCopies || heads.row % kPage == 0 || wide > p_.size;
    if (heads.format == kNumbers && !copies) return {reinterpret_cast<const float*>(heads.at(b, h)), heads.row};
    float* const to = scratch(which).floats(p_.keys * wide);
    for (std::ptrdiff_t r = 0; r < p_.keys; ++r) {
      widen(vectors_, heads.format, heads.at(b, h, r), to + r * wide, p_.size);
      std::fill(to + r * wide + p_.size, to + (r + 1) * wide, 0.0f);
    }
    return {to, wide};
  }

  // The rows of the head that comes next, which lie too far apart for the hardware to foresee. Of short ones only:
  // there are as many lines to wait for as multiplications to wait behind.
  NextHead next_of(std::ptrdiff_t b, std::ptrdiff_t h) const {
    const std::ptrdiff_t next = b * p_.heads + h + 1, batch = next / p_.heads, head = next % p_.heads;
    if (batch >= p_.batches || p_.keys > kShort || p_.queries > kShort) return {};
    const std::ptrdiff_t kv = head / (p_.heads / p_.kv_heads), element = element_bytes(p_.q.format);
    const auto part = [&](const Heads& heads, std::ptrdiff_t at) {
      return Lines::Part{heads.at(batch, at), heads.row * element, p_.size * element};
    };
    const Lines queries{p_.queries, part(p_.y, head), part(p_.q, head)};
    if (kv == kv_head_ && batch == batch_) return {{queries}};
    return {{queries, Lines{p_.keys, {}, part(p_.k, kv)}, Lines{p_.keys, {}, part(p_.v, kv)}}};
  }

  const float* added(const char* mask) { return mask_.added(p_, vectors_, mask, scratch(2).floats(p_.keys)); }

  static constexpr std::ptrdiff_t kCopies = 32, kPage = 1024;  // of floats
  static constexpr std::ptrdiff_t kShort = 64;                 // of rows

  const AttentionProblem& p_;
  const Vectors& vectors_;
  std::ptrdiff_t batch_ = -1, kv_head_ = -1;
  Wide k_{}, v_{};
  SharedMask mask_;
  const char* turned_ = nullptr;
  std::ptrdiff_t turned_queries_ = 0;
};

// What queries are answered by on each thread: make() gives an object of a `make`. False when memory ran out; y is then
// undefined.
template <class Make>
bool attend(const AttentionProblem& p, std::ptrdiff_t threads, const Make& make) try {
  const std::ptrdiff_t heads = p.batches * p.heads;
  if (2 * heads * p.queries * p.keys * p.size < kSerialAttention) threads = 1;
  // Whole heads where there are enough of them, since k and v are prepared for each part.
  const std::ptrdiff_t parts = threads == 1 || heads >= 4 * threads ? 1 : (p.queries + 63) / 64;
  return share_out(heads * parts, threads, [&] {
    return [&p, parts, attender = make()](std::ptrdiff_t i) mutable {
      const std::ptrdiff_t head = i / parts, part = i % parts;
      attender.make(head / p.heads, head % p.heads, share_begin(p.queries, part, parts),
                    share_begin(p.queries, part + 1, parts));
    };
  });
} catch (const std::bad_alloc&) {
  return false;
}

// In fp32; or, with a kernel that rounds_attention, in products of bf16, of q, k and v in bf16 or fp32.
inline bool attend(const AttentionProblem& p, const Vectors& vectors, const Kernel* kernel, std::ptrdiff_t threads) {
  if (kernel != nullptr && has_pairs(p)) return attend(p, threads, [&] { return RoundingAttender(p, *kernel); });
  if (p.queries <= kFewQueries) return attend_few(p, vectors, threads);
  return attend(p, threads, [&] { return Attender(p, vectors); });
}

}  // namespace fastlinear
