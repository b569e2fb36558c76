// Tensors of heads, and what is asked of them.
#pragma once

#include <algorithm>
#include <cstddef>
#include <limits>

#include "fastlinear/contract/isa.hpp"
#include "fastlinear/formats/all.hpp"

namespace fastlinear {

// A tensor [batch, head, row, element], elements side by side; strides in elements, and 0 where it is broadcast.
struct Heads {
  char* data;
  Format format;
  std::ptrdiff_t batch, head, row;

  char* at(std::ptrdiff_t b, std::ptrdiff_t h, std::ptrdiff_t r = 0) const {
    return data + (b * batch + h * head + r * row) * element_bytes(format);
  }
};

struct AttentionProblem {
  std::ptrdiff_t batches, heads, kv_heads, queries, keys, size;
  Heads q, k, v, y;    // of one floating format; heads / kv_heads heads share one of k and v
  Heads mask;          // as AttentionArgs has it, elements being keys; its data may be null
  const float* sinks;  // [heads], or null
  float scale, cap;    // cap: 0 for none
  bool causal;         // query i sees the keys 0 to i

  float sink(std::ptrdiff_t head) const { return sinks == nullptr ? kNoSink : sinks[head]; }
};

// So many numbers of a floating format, in fp32.
inline void widen(const Vectors& vectors, Format format, const char* from, float* to, std::ptrdiff_t n) {
  if (format == kNumbers)
    std::copy_n(reinterpret_cast<const float*>(from), n, to);
  else
    vectors.conversions[static_cast<std::size_t>(format)].widen(from, to, n);
}

// What a mask adds to the scores of its first n keys, in fp32.
inline void widen_mask(const Vectors& vectors, Format format, const char* mask, float* to, std::ptrdiff_t n) {
  constexpr float kUnseen = -std::numeric_limits<float>::infinity();
  if (is_float(format)) return widen(vectors, format, mask, to, n);
  for (std::ptrdiff_t i = 0; i < n; ++i) to[i] = mask[i] != 0 ? 0.0f : kUnseen;
}

// A mask that is the same for all queries, of one head after the other: widened where it is another than the last.
class SharedMask {
 public:
  const float* added(const AttentionProblem& p, const Vectors& vectors, const char* mask, float* to) {
    if (mask != last_) widen_mask(vectors, p.mask.format, mask, to, p.keys);
    last_ = mask;
    return to;
  }

 private:
  const char* last_ = nullptr;
};

// With fewer multiplications than this (about 10 us) a second thread is not worth waking.
inline constexpr std::ptrdiff_t kSerialAttention = 1 << 20;

}  // namespace fastlinear
