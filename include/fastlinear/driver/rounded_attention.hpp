// Attention whose products are of bf16, by a micro-kernel: q, k and v as they are or rounded to it, and the softmax
// numerators rounded to it, while scores, the softmax and all sums are fp32. k and v of a head are packed as weights,
// [keys, size] and [size, keys], once for all heads that share them, and stay in L2; then as many queries at a time as
// the kernel has rows go through both products.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstring>
#include <new>

#include "fastlinear/driver/heads.hpp"
#include "fastlinear/driver/prologue.hpp"
#include "fastlinear/host/memory.hpp"
#include "fastlinear/host/parallel.hpp"

namespace fastlinear {

// Whether a kernel may be the one.
inline bool rounds_attention(const Kernel& kernel) {
  return kernel.rows == Format::bf16 && kernel.layout == Layout{Format::bf16, 32, 2} &&
         kernel.accumulate == Format::fp32 && vectors_of(kernel.isa).rounded_attention != nullptr;
}

// Pairs of elements are read as one.
inline bool has_pairs(const AttentionProblem& p) {
  const bool even = p.k.batch % 2 == 0 && p.k.head % 2 == 0 && p.k.row % 2 == 0;
  return p.size % 2 == 0 && (even || p.k.format != Format::bf16);
}

class RoundingAttender {
 public:
  RoundingAttender(const AttentionProblem& p, const Kernel& kernel)
      : p_(p), kernel_(kernel), vectors_(vectors_of(kernel.isa)), ours_(*vectors_.rounded_attention) {
    if (kernel_.session != nullptr) kernel_.session->enter(state_);
  }
  ~RoundingAttender() {
    if (kernel_.session != nullptr) kernel_.session->leave(state_);
  }
  RoundingAttender(const RoundingAttender&) = delete;
  RoundingAttender& operator=(const RoundingAttender&) = delete;

  // The queries [begin, end) of head h of batch b.
  void make(std::ptrdiff_t b, std::ptrdiff_t h, std::ptrdiff_t begin, std::ptrdiff_t end) {
    const std::ptrdiff_t kv = h / (p_.heads / p_.kv_heads);
    if (b != batch_ || kv != kv_head_) {
      keys_ = packed(p_.k, b, kv, 0, ours_.pack_keys, round_up(p_.keys, kPanel) * p_.size);
      values_ = packed(p_.v, b, kv, 1, ours_.pack_values, round_up(p_.size, kPanel) * round_up(p_.keys, 2));
      batch_ = b, kv_head_ = kv;
    }
    for (std::ptrdiff_t i = begin; i < end; i += kernel_.mr) some(b, h, i, std::min(kernel_.mr, end - i));
  }

 private:
  static constexpr std::ptrdiff_t kPanel = 32, kPair = 2;  // of bf16/32x2

  static Scratch& scratch(std::size_t which) {
    thread_local Scratch memory[9];
    return memory[which];
  }
  static Bf16* numbers(std::size_t which, std::ptrdiff_t count) {
    return reinterpret_cast<Bf16*>(scratch(which).bytes(count * element_bytes(Format::bf16)));
  }

  // Rows of bf16: where they lie, or rounded.
  const char* rounded(const Heads& heads, std::ptrdiff_t b, std::ptrdiff_t h, std::ptrdiff_t& stride) const {
    stride = heads.row;
    if (heads.format == Format::bf16) return heads.at(b, h);
    Bf16* const to = numbers(2, p_.keys * p_.size);
    stride = p_.size;
    const auto& rounding = vectors_.conversions[static_cast<std::size_t>(Format::bf16)];
    rounding.narrow_rows(reinterpret_cast<const float*>(heads.at(b, h)), heads.row, to, stride, p_.keys, p_.size);
    return reinterpret_cast<const char*>(to);
  }

  template <class Pack>
  const char* packed(const Heads& heads, std::ptrdiff_t b, std::ptrdiff_t h, std::size_t which, Pack pack,
                     std::ptrdiff_t count) const {
    std::ptrdiff_t stride;
    const char* const rows = rounded(heads, b, h, stride);
    Bf16* const to = numbers(which, count);
    pack(rows, stride, p_.keys, p_.size, to);
    return reinterpret_cast<const char*>(to);
  }

  // What the kernel takes as rows of A: in bf16, with zeros where it reads more of them than there are, and more of
  // each.
  Bf16* rows_of(std::size_t which, std::ptrdiff_t rows, std::ptrdiff_t k, std::ptrdiff_t& stride) const {
    stride = made_stride(k, kernel_);
    Bf16* const to = numbers(which, kernel_.mr * stride);
    std::fill(to + rows * stride, to + round_up(rows, kernel_.row_step) * stride, Bf16{});
    return to;
  }

  // Rows of A times `columns` channels of a weight of `depth` k, of which the first `k` count, one tile after the
  // other.
  float* product(const Bf16* a, std::ptrdiff_t stride, std::ptrdiff_t rows, const char* panels, std::ptrdiff_t columns,
                 std::ptrdiff_t depth, std::ptrdiff_t k) const {
    const std::ptrdiff_t panel_bytes = round_up(depth, kPair) * kPanel * element_bytes(Format::bf16);
    float* const tiles = scratch(4).floats(ceil_div(columns, kernel_.columns()) * tile());
    TileArgs t{};
    t.a = a, t.lda = stride, t.rows = rows, t.k = k, t.panel_stride = panel_bytes;
    for (std::ptrdiff_t first = 0, i = 0; first < columns; first += kernel_.columns(), ++i) {
      t.panel = t.prefetch = t.beside = panels + first / kPanel * panel_bytes;
      t.panels = std::min(kernel_.panels, ceil_div(columns - first, kPanel));
      t.tile = tiles + i * tile();
      kernel_.run(t);
    }
    return tiles;
  }

  std::ptrdiff_t tile() const { return kernel_.mr * kernel_.columns(); }  // floats

  void some(std::ptrdiff_t b, std::ptrdiff_t h, std::ptrdiff_t begin, std::ptrdiff_t rows) {
    const std::ptrdiff_t keys = p_.causal ? std::min(p_.keys, begin + rows) : p_.keys;
    std::ptrdiff_t q_stride, weights_stride;
    Bf16* const q = rows_of(3, rows, p_.size, q_stride);
    for (std::ptrdiff_t r = 0; r < rows; ++r) {
      const char* const from = p_.q.at(b, h, begin + r);
      Bf16* const to = q + r * q_stride;
      if (p_.q.format == Format::bf16)
        std::memcpy(to, from, static_cast<std::size_t>(p_.size * element_bytes(Format::bf16)));
      else
        vectors_.conversions[static_cast<std::size_t>(Format::bf16)].narrow(reinterpret_cast<const float*>(from), to,
                                                                            p_.size);
      std::fill(to + p_.size, to + round_up(p_.size, kernel_.k_step), Bf16{});
    }
    const float* const products = product(q, q_stride, rows, keys_, keys, p_.size, p_.size);

    const std::ptrdiff_t filled = round_up(round_up(keys, kernel_.k_step), kLanes);
    Bf16* const weights = rows_of(5, rows, filled, weights_stride);
    float* const factors = scratch(6).floats(kernel_.mr);
    const bool masked = p_.mask.data != nullptr, same = p_.mask.row == 0;
    ours_.weigh({.products = products,
                 .columns = kernel_.columns(),
                 .tile = tile(),
                 .rows = rows,
                 .keys = keys,
                 .diagonal = p_.causal ? begin : p_.keys,
                 .scale = p_.scale,
                 .cap = p_.cap,
                 .added = masked && same ? added(p_.mask.at(b, h)) : nullptr,
                 .mask = masked && !same ? p_.mask.at(b, h, begin) : nullptr,
                 .mask_stride = p_.mask.row,
                 .mask_format = p_.mask.format,
                 .sink = p_.sink(h),
                 .scores = scratch(7).floats(round_up(keys, kLanes)),
                 .weights = weights,
                 .weights_stride = weights_stride,
                 .filled = filled,
                 .factors = factors});

    float* const sums = product(weights, weights_stride, rows, values_, p_.size, p_.keys, keys);
    for (std::ptrdiff_t first = 0, i = 0; first < p_.size; first += kernel_.columns(), ++i) {
      float* const made = sums + i * tile();
      const std::ptrdiff_t columns = std::min(kernel_.columns(), p_.size - first);
      ours_.scale_rows(made, kernel_.columns(), rows, round_up(columns, kLanes), factors);
      char* const y = p_.y.at(b, h, begin) + first * element_bytes(p_.y.format);
      if (p_.y.format == Format::bf16)
        vectors_.conversions[static_cast<std::size_t>(Format::bf16)].narrow_rows(made, kernel_.columns(), y, p_.y.row,
                                                                                 rows, columns);
      else
        for (std::ptrdiff_t r = 0; r < rows; ++r)
          std::memcpy(y + r * p_.y.row * element_bytes(p_.y.format), made + r * kernel_.columns(),
                      static_cast<std::size_t>(columns) * sizeof(float));
    }
  }

  const float* added(const char* mask) { return mask_.added(p_, vectors_, mask, scratch(8).floats(p_.keys)); }

  const AttentionProblem& p_;
  const Kernel& kernel_;
  const Vectors& vectors_;
  const RoundedAttention& ours_;
  alignas(kSessionBytes) char state_[kSessionBytes];
  std::ptrdiff_t batch_ = -1, kv_head_ = -1;
  const char *keys_ = nullptr, *values_ = nullptr;
  SharedMask mask_;
};

}  // namespace fastlinear
