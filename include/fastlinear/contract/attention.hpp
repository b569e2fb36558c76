// The contract of attention, which is what the driver needs: rows of one head, as fastlinear/spec/attention.py says.
#pragma once

#include <array>
#include <cstddef>
#include <limits>

#include "fastlinear/contract/format.hpp"
#include "fastlinear/contract/kernel.hpp"

namespace fastlinear {

// The sink of a head that has none: the score of one key more, which has no value, with no weight.
inline constexpr float kNoSink = -std::numeric_limits<float>::infinity();

// What the next call will read and write, fetched a row at a time: all at once they would take every buffer of the
// core, and this call would wait for them.
struct NextHead {
  std::array<Lines, 3> lines{};
  std::size_t at = 0;

  void fetch_row() {
    while (at < lines.size() && lines[at].rows == 0) ++at;
    if (at < lines.size()) lines[at].fetch_row();
  }
};

// y = softmax(scale q k^T + mask) v. Query i sees the keys 0 to i + diagonal. `added` is to the scores of every query.
// With a cap, scale q k^T is cap tanh(scale q k^T / cap) instead.
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
  float scale, cap;    // cap: 0 for none
  const float* added;  // [keys], or null
  const void* mask;    // [queries, keys], fp32, bf16, fp16, or bytes (uint8) that are 0 for what is not seen; or null
  std::ptrdiff_t mask_stride;
  Format mask_format;
  float sink = kNoSink;
  bool turned;  // whether the scratch still has this mask from the last call, if that could take its queries at a time
  std::ptrdiff_t diagonal;
  float* scratch;   // attention_scratch(keys, size) floats, at a multiple of 64 bytes
  NextHead* ahead;  // of nothing where no head is to be fetched, but never null
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

// What stands around two products of bf16 rows and bf16/32x2 panels, by a micro-kernel (kernel.hpp), that are attention
// with weights rounded to bf16. Rows of q are its A, keys are the channels of the first weight, elements of a head
// those of the second, whose A are the softmax numerators.
struct WeighArgs {
  const float* products;  // of the first row: tiles of `columns` keys, `tile` floats apart, row by row
  std::ptrdiff_t columns, tile;
  std::ptrdiff_t rows, keys;  // keys: as many as the last row sees
  std::ptrdiff_t diagonal;    // the first row sees the keys 0 to this one, each next row one more
  float scale, cap;
  const float* added;  // these, as in AttentionArgs
  const void* mask;
  std::ptrdiff_t mask_stride;
  Format mask_format;
  float sink = kNoSink;
  float* scores;  // one row of them, in whole vectors
  void* weights;  // bf16, written up to `filled`, with zeros behind the keys
  std::ptrdiff_t weights_stride, filled;
  float* factors;  // [rows]: 1 / the sum of each
};

struct RoundedAttention {
  // Rows of bf16, an even number of elements apart and of as many -> panels, which have zeros for what is not there.
  void (*pack_keys)(const void* rows, std::ptrdiff_t stride, std::ptrdiff_t keys, std::ptrdiff_t size, void* panels);
  void (*pack_values)(const void* rows, std::ptrdiff_t stride, std::ptrdiff_t keys, std::ptrdiff_t size, void* panels);
  void (*weigh)(const WeighArgs&);
  // Each row of a tile times its factor, in place.
  void (*scale_rows)(float* tile, std::ptrdiff_t ld, std::ptrdiff_t rows, std::ptrdiff_t columns, const float* factors);
};

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
  float scale, cap;    // as in AttentionArgs
  const float* added;  // [keys], or null
  const float* sinks;  // [queries], or null
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
