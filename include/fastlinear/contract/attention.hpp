// The contract of attention, which is what the driver needs: rows of one head, as fastlinear/spec/attention.py says.
#pragma once

#include <cstddef>

#include "fastlinear/contract/format.hpp"

namespace fastlinear {

// y = softmax(scale q k^T + mask) v. Query i sees the keys 0 to i + diagonal. `added` is to the scores of every query.
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
  const float* added;  // [keys], or null
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

// y = softmax(scale q k^T + added) v of few queries, which see the same keys: heads that share k and v at one position.
struct FewQueriesArgs {
  const void* q;  // [queries, size] of the function's format, as y, k and v
  std::ptrdiff_t q_stride;
  void* y;
  std::ptrdiff_t y_stride;
  const void* k;  // [keys, size]
  std::ptrdiff_t k_stride;
  const void* v;  // [keys, size]
  std::ptrdiff_t v_stride;
  std::ptrdiff_t queries, keys, size;
  float scale;
  const float* added;  // [keys], or null
  float* scratch;      // few_queries_scratch(queries, keys, size) floats
};

using FewQueries = void (*)(const FewQueriesArgs&);

// Of a widest vector.
inline constexpr std::ptrdiff_t kLanes = 16;

// The queries and their scores, in whole vectors.
constexpr std::ptrdiff_t few_queries_scratch(std::ptrdiff_t queries, std::ptrdiff_t keys, std::ptrdiff_t size) {
  return queries * (size + keys + 2 * kLanes);
}

// y = x cos + r sin of one head at one position, where r is x with its halves changed about, the upper one negated.
// All have `size` numbers, an even one; y may be x.
struct RotationArgs {
  const float *x, *cos, *sin;
  float* y;
  std::ptrdiff_t size;
};

using Rotation = void (*)(const RotationArgs&);

}  // namespace fastlinear
