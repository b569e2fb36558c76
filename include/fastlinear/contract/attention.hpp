// The contract of attention, which is what the driver needs: rows of one head, as fastlinear/spec/attention.py says.
#pragma once

#include <cstddef>

#include "fastlinear/contract/format.hpp"

namespace fastlinear {

// y = softmax(scale q k^T + mask) v. Query i sees the keys 0 to i + diagonal.
struct AttentionArgs {
  const void* q;  // [queries, size] of the function's format, as y
  std::ptrdiff_t q_stride;
  void* y;
  std::ptrdiff_t y_stride;
  const float* k;  // [keys, size]
  std::ptrdiff_t k_stride;
  const float* v;  // [keys, size], each row readable up to a multiple of kAttentionColumns
  std::ptrdiff_t v_stride;
  std::ptrdiff_t queries, keys, size;
  float scale;
  const float* added;  // [keys], to the scores of every query; or null
  const void* mask;    // [queries, keys], fp32, bf16, fp16, or bytes (uint8) that are 0 for what is not seen; or null
  std::ptrdiff_t mask_stride;
  Format mask_format;
  bool turned;  // whether the scratch still has this mask from the last call, if that could take its queries at a time
  std::ptrdiff_t diagonal;
  float* scratch;  // attention_scratch(keys, size) floats, at a multiple of 64 bytes
};

using Attention = void (*)(const AttentionArgs&);

// Queries that a function takes at a time, at most: two of the widest vectors.
inline constexpr std::ptrdiff_t kAttentionLanes = 32;
// And of elements of a head: the widest vector.
inline constexpr std::ptrdiff_t kAttentionColumns = 16;

// Of as many queries: them, scores, and a mask.
constexpr std::ptrdiff_t attention_scratch(std::ptrdiff_t keys, std::ptrdiff_t size) {
  return kAttentionLanes * (size + 2 * keys);
}

}  // namespace fastlinear
