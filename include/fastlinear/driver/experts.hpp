// Mixture of experts, what surrounds its products: which rows go to which expert, and the weighted sum of what the
// experts made of them. The products themselves are lists of problems, one an expert that has rows (gemm.hpp).
#pragma once

#include <cstddef>
#include <cstdint>
#include <new>
#include <vector>

#include "fastlinear/contract/isa.hpp"
#include "fastlinear/driver/problem.hpp"
#include "fastlinear/host/memory.hpp"
#include "fastlinear/host/parallel.hpp"

namespace fastlinear {

// ids [tokens, top_k]: the experts that each token goes to; `experts` itself stands for none.
struct Routing {
  std::ptrdiff_t tokens, top_k, experts;
  const std::int64_t* ids;
};

// The pairs (token, place among its top_k), sorted by expert, those of one expert by token: a counting sort.
struct Routes {
  std::vector<std::int64_t> first;   // [experts + 2]: where the pairs of each expert begin; those of none come last
  std::vector<std::int64_t> pairs;   // token * top_k + place
  std::vector<std::int64_t> tokens;  // of each pair
};

// False where an id is none of 0 to `experts`.
inline bool route(const Routing& r, Routes& routes) {
  const std::ptrdiff_t count = r.tokens * r.top_k;
  const auto size = static_cast<std::size_t>(count), ends = static_cast<std::size_t>(r.experts) + 2;
  routes.first.assign(ends, 0);
  routes.pairs.resize(size);
  routes.tokens.resize(size);
  for (std::ptrdiff_t i = 0; i < count; ++i) {
    if (r.ids[i] < 0 || r.ids[i] > r.experts) return false;
    ++routes.first[static_cast<std::size_t>(r.ids[i]) + 1];
  }
  for (std::size_t e = 1; e < ends; ++e) routes.first[e] += routes.first[e - 1];
  std::vector<std::int64_t> next(routes.first);
  for (std::ptrdiff_t i = 0; i < count; ++i) {
    const auto at = static_cast<std::size_t>(next[static_cast<std::size_t>(r.ids[i])]++);
    routes.pairs[at] = i;
    routes.tokens[at] = i / r.top_k;
  }
  return true;
}

// y[t] = sum over j of weights[t, j] * parts[t * top_k + j], [tokens, n]: in fp32 and in the order of j, whatever
// expert was done first, and rounded once. A part of no expert was never written, and counts as zeros.
struct Mixture {
  Routing routing;
  std::ptrdiff_t n;
  const float* parts;    // [tokens * top_k, n]
  const float* weights;  // [tokens, top_k]
  char* y;               // [tokens, n]
  Format format;
};

inline void mix_row(const Mixture& m, const Vectors& vectors, std::ptrdiff_t token) {
  thread_local Scratch memory;
  char* const to = m.y + token * m.n * element_bytes(m.format);
  float* const sum = m.format == kNumbers ? reinterpret_cast<float*>(to) : memory.floats(m.n);
  for (std::ptrdiff_t i = 0; i < m.n; ++i) sum[i] = 0.0f;
  for (std::ptrdiff_t j = 0; j < m.routing.top_k; ++j) {
    const std::ptrdiff_t pair = token * m.routing.top_k + j;
    if (m.routing.ids[pair] == m.routing.experts) continue;
    const float weight = m.weights[pair];
    const float* const part = m.parts + pair * m.n;
    for (std::ptrdiff_t i = 0; i < m.n; ++i) sum[i] += weight * part[i];
  }
  if (m.format != kNumbers) vectors.conversions[static_cast<std::size_t>(m.format)].narrow(sum, to, m.n);
}

// With fewer numbers than this to add (about 10 us) a second thread is not worth waking.
inline constexpr std::ptrdiff_t kSerialMixture = 32 << 10;

// False when memory ran out; y is then undefined.
inline bool mix(const Mixture& m, const Vectors& vectors, std::ptrdiff_t threads) try {
  if (m.routing.tokens == 0 || m.n == 0) return true;
  const std::ptrdiff_t numbers = m.routing.tokens * m.routing.top_k * m.n;
  return share_out(m.routing.tokens, numbers < kSerialMixture ? 1 : threads,
                   [&] { return [&m, &vectors](std::ptrdiff_t token) { mix_row(m, vectors, token); }; });
} catch (const std::bad_alloc&) {
  return false;
}

}  // namespace fastlinear
