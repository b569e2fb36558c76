// The functions an epilogue may apply, in the order of the registry: those that the driver knows, activations, those of
// two operands, gates. To add one: a file, or a struct in one of its kind, and a name in this list.
#pragma once

#include "fastlinear/contract/epilogue.hpp"
#include "fastlinear/epilogues/binary.hpp"
#include "fastlinear/epilogues/elu.hpp"
#include "fastlinear/epilogues/gates.hpp"
#include "fastlinear/epilogues/gelu.hpp"
#include "fastlinear/epilogues/gelu_tanh.hpp"
#include "fastlinear/epilogues/hardsigmoid.hpp"
#include "fastlinear/epilogues/hardswish.hpp"
#include "fastlinear/epilogues/hardtanh.hpp"
#include "fastlinear/epilogues/identity.hpp"
#include "fastlinear/epilogues/leaky_relu.hpp"
#include "fastlinear/epilogues/mish.hpp"
#include "fastlinear/epilogues/quick_gelu.hpp"
#include "fastlinear/epilogues/relu.hpp"
#include "fastlinear/epilogues/relu2.hpp"
#include "fastlinear/epilogues/relu6.hpp"
#include "fastlinear/epilogues/sigmoid.hpp"
#include "fastlinear/epilogues/silu.hpp"
#include "fastlinear/epilogues/softplus.hpp"
#include "fastlinear/epilogues/tanh.hpp"
#include "fastlinear/generic/step.hpp"

namespace fastlinear {

template <class... F>
struct FunctionList {
  static constexpr EpilogueFunction table[] = {
      {F::name, F::params, {F::defaults[0], F::defaults[1]}, epilogues::operands_of<F>, epilogues::is_gate<F>}...};

  template <class V>
  static constexpr Step steps[] = {epilogues::step<V, F>...};
};

using Functions = FunctionList<epilogues::Identity, epilogues::Relu, epilogues::Add, epilogues::Relu6, epilogues::Gelu,
                               epilogues::GeluTanh, epilogues::Silu, epilogues::Sigmoid, epilogues::Tanh,
                               epilogues::Hardswish, epilogues::Hardsigmoid, epilogues::Hardtanh, epilogues::LeakyRelu,
                               epilogues::Elu, epilogues::Softplus, epilogues::Mish, epilogues::QuickGelu,
                               epilogues::Relu2, epilogues::Sub, epilogues::Mul, epilogues::Div, epilogues::Min,
                               epilogues::Max, epilogues::Glu, epilogues::Reglu, epilogues::Reglu2, epilogues::Geglu,
                               epilogues::GegluTanh, epilogues::Swiglu, epilogues::SwigluOai, epilogues::SwigluLimited>;

static_assert(Functions::table[kIdentity].name == epilogues::Identity::name);
static_assert(Functions::table[kRelu].name == epilogues::Relu::name);
static_assert(Functions::table[kAdd].name == epilogues::Add::name);

// What csrc/registry.cpp shows to the world, and what csrc/<isa>.cpp puts into its row.
inline constexpr auto& kFunctions = Functions::table;

template <class V>
inline constexpr auto& epilogue_steps = Functions::steps<V>;

}  // namespace fastlinear
