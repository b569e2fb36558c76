// Gated linear units (Shazeer 2020, arXiv:2002.05202): f(gate) * through, of the sums of two halves of the channels.
// The functions f are those of the activations. Experts of later models limit both: gpt-oss and its kin
// (gate sigmoid(alpha gate)) * (through + 1), DeepSeek V4 and its kin silu(gate) * through.
#pragma once

#include "fastlinear/epilogues/gelu.hpp"
#include "fastlinear/epilogues/gelu_tanh.hpp"
#include "fastlinear/epilogues/relu.hpp"
#include "fastlinear/epilogues/relu2.hpp"
#include "fastlinear/epilogues/sigmoid.hpp"
#include "fastlinear/epilogues/silu.hpp"

namespace fastlinear::epilogues {

template <class F>
struct Gate : F {
  static constexpr bool gate = true;

  template <class V>
  [[gnu::always_inline]] static V through(V x, const float*) {
    return x;
  }
};

template <class V>
[[gnu::always_inline]] inline V within(V x, float limit) {
  return min(V::set(limit), max(V::set(-limit), x));
}

struct Glu : Gate<Sigmoid> {
  static constexpr const char* name = "glu";
};
struct Reglu : Gate<Relu> {
  static constexpr const char* name = "reglu";
};
struct Reglu2 : Gate<Relu2> {
  static constexpr const char* name = "reglu2";
};
struct Geglu : Gate<Gelu> {
  static constexpr const char* name = "geglu";
};
struct GegluTanh : Gate<GeluTanh> {
  static constexpr const char* name = "geglu_tanh";
};
struct Swiglu : Gate<Silu> {
  static constexpr const char* name = "swiglu";
};

// Parameters alpha, limit.
struct SwigluOai {
  static constexpr bool gate = true;
  static constexpr const char* name = "swiglu_oai";
  static constexpr std::size_t params = 2;
  static constexpr float defaults[kMaxParams] = {1.702f, 7.0f};

  template <class V>
  [[gnu::always_inline]] static V apply(V x, const float* params) {
    const V y = min(V::set(params[1]), x);
    return y * Sigmoid::apply<V>(V::set(params[0]) * y, nullptr);
  }

  template <class V>
  [[gnu::always_inline]] static V through(V x, const float* params) {
    return within(x, params[1]) + V::set(1.0f);
  }
};

// Parameter limit.
struct SwigluLimited {
  static constexpr bool gate = true;
  static constexpr const char* name = "swiglu_limited";
  static constexpr std::size_t params = 1;
  static constexpr float defaults[kMaxParams] = {7.0f};

  template <class V>
  [[gnu::always_inline]] static V apply(V x, const float* params) {
    return Silu::apply<V>(min(V::set(params[0]), x), nullptr);
  }

  template <class V>
  [[gnu::always_inline]] static V through(V x, const float* params) {
    return within(x, params[0]);
  }
};

}  // namespace fastlinear::epilogues
