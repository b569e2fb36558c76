// Gated linear units (Shazeer 2020, arXiv:2002.05202): f(gate) * through, of the sums of two halves of the channels.
// The functions f are those of the activations.
#pragma once

#include "fastlinear/epilogues/gelu.hpp"
#include "fastlinear/epilogues/gelu_tanh.hpp"
#include "fastlinear/epilogues/relu.hpp"
#include "fastlinear/epilogues/sigmoid.hpp"
#include "fastlinear/epilogues/silu.hpp"

namespace fastlinear::epilogues {

template <class F>
struct Gate : F {
  static constexpr bool gate = true;
};

struct Glu : Gate<Sigmoid> {
  static constexpr const char* name = "glu";
};
struct Reglu : Gate<Relu> {
  static constexpr const char* name = "reglu";
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

}  // namespace fastlinear::epilogues
