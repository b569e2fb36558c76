"""FastExperts: the experts of a mixture (MoE) on packed weights, each call two grouped products and a weighted sum.

transformers keeps the experts of a layer as two parameters of three dimensions, `gate_up_proj` (or `up_proj`) and
`down_proj`, and calls them as module(hidden_states, top_k_index, top_k_weights). `adopt` gives such a module a class of
its own, as `linear.adopt` does with a linear layer: the object, its parameters and its hooks stay. What that class
computes stands in spec/experts.py.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from fastlinear.layer import experts_takeover, mixture
from fastlinear.layer.experts_frozen import hold, thaw
from fastlinear.layer.experts_module import OWN, ExpertsModule
from fastlinear.layer.parametrized import before
from fastlinear.spec import activations, programs
from fastlinear.spec.activations import Activation
from fastlinear.spec.experts import Form, computed
from fastlinear.spec.precision import ANYHOW, AS_HELD, Precision, Wanted, wanted
from fastlinear.spec.schemes import Scheme


class Experts(nn.Module):
    """Experts without a kernel, as a class of transformers' holds them: what FastExperts is a drop-in for."""

    def __init__(self, experts: int, features: int, hidden: int, bias: bool, device: Any, dtype: Any) -> None:
        super().__init__()
        self.gate_up_proj = nn.Parameter(torch.empty(experts, 2 * hidden, features, device=device, dtype=dtype))
        self.down_proj = nn.Parameter(torch.empty(experts, features, hidden, device=device, dtype=dtype))
        if bias:
            self.gate_up_proj_bias = nn.Parameter(torch.zeros(experts, 2 * hidden, device=device, dtype=dtype))
            self.down_proj_bias = nn.Parameter(torch.zeros(experts, features, device=device, dtype=dtype))
        with torch.no_grad():
            for weight in (self.gate_up_proj, self.down_proj):
                weight.uniform_(-(weight.shape[-1] ** -0.5), weight.shape[-1] ** -0.5)

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        module: Any = self
        plain = module._form._replace(precision=AS_HELD)
        return computed(plain, hidden_states, top_k_index, top_k_weights, *module.tensors())


class FastExperts(ExpertsModule, Experts):
    """The experts of a mixture: y[t] = sum_j w[t, j] * (gate(x[t] U_e^T + b_e) D_e^T + c_e), e = ids[t, j].

    experts: how many there are; features: in and out; hidden: what the gate makes.
    activation: that of the gate, "silu" (SwiGLU), "gelu", "gelu_tanh", "relu", "relu2", "sigmoid", or ("swiglu_oai",
        alpha, limit), gpt-oss's, or ("swiglu_limited", limit), DeepSeek V4's.
    packed, accumulate, quantize, products: as `dtype`, `accumulate` ... of `convert`.

    Called as experts(x, ids, weights): x [tokens, features], ids int64 [tokens, top_k], weights [tokens, top_k], of
    which an id past the last expert means none. Parameters: gate_up_proj [experts, 2 * hidden, features], the gates'
    channels first, down_proj [experts, features, hidden], and with `bias` gate_up_proj_bias and down_proj_bias. Rows
    are sorted by expert, and no expert without rows is read; the sum is made in the order of j, whatever ran first.
    Raises ValueError for an activation that is no gate.
    """

    def __init__(
        self,
        experts: int,
        features: int,
        hidden: int,
        bias: bool = False,
        device: Any = None,
        dtype: torch.dtype | None = None,
        *,
        activation: Any = "silu",
        packed: torch.dtype | None = None,
        accumulate: str = "fp32",
        quantize: Scheme | None = None,
        products: torch.dtype | None = None,
    ) -> None:
        program, asked = _gate(activation), wanted(packed, accumulate, quantize, products)
        if (reason := asked.why_not("", max(features, hidden))) is not None:
            raise ValueError(f"FastExperts of {features} and {hidden} features cannot be quantized so: {reason}")
        super().__init__(experts, features, hidden, bias, device, dtype)
        _become_fast(self, Form(program), asked.of("", self.down_proj.dtype), "lazy", "")


FastExperts._stock = Experts


def _gate(activation: Any) -> Activation:
    of_activation = {each: gate for gate, each in programs.GATES.items()}
    name, *params = activation if isinstance(activation, tuple) else (activation,)
    if name in programs.LIMITED and len(params) == programs.LIMITED[name].params:
        return Activation(name, tuple(map(float, params)))
    gate = of_activation.get(activations.resolve(activation))  # type: ignore[arg-type]
    if gate is None:
        allowed = ", ".join([*(each.name for each in of_activation), *programs.LIMITED])
        raise ValueError(f"FastExperts takes one of {allowed} as its activation, but was given {activation!r}")
    return Activation(gate)


# ---- from a class of transformers', and back ----


def is_fast_experts(module: nn.Module) -> bool:
    return isinstance(module, ExpertsModule)


def dtype_of(module: Any) -> torch.dtype:
    """The dtype of the weights of experts, also of frozen ones."""
    dtype: torch.dtype = module.held if is_fast_experts(module) else module._parameters[mixture.SECOND].dtype
    return dtype


def is_transposed(module: Any) -> bool:
    """Whether experts are held as [in, out]."""
    if is_fast_experts(module):
        return bool(module._form.transposed)
    return bool(getattr(module, "is_transposed", False)) or mixture.takes_blocks(type(module))


def are_experts(module: nn.Module) -> bool:
    """Whether a module has the parameters of experts, fast or not, of whatever class it is."""
    if is_fast_experts(module):
        return True
    held = [module._parameters.get(name) for name in (*mixture.FIRST, mixture.SECOND)]
    three = [p is not None and p.dim() == 3 for p in held]
    return three[2] and (three[0] or three[1])


def names_of(module: Any) -> tuple[str, str]:
    """Of the parameters of both products."""
    return module.names if is_fast_experts(module) else mixture.names_of(module)


def sizes_of(module: Any) -> tuple[tuple[int, int, int], tuple[int, int, int]]:
    """Experts, N and K of both products; of a class that nobody knows, as if its weights were [experts, N, K]."""
    if is_fast_experts(module):
        first, second = module.shapes
        return (module.count, *first), (module.count, *second)
    shapes = [tuple(module._parameters[name].shape) for name in mixture.names_of(module)]
    if is_transposed(module):
        shapes = [(e, n, k) for e, k, n in shapes]
    return shapes[0], shapes[1]


def why_not(module: Any, asked: Wanted = ANYHOW, name: str = "") -> str | None:
    """Why experts cannot run on the kernels as it was asked for, in a few words; None if they can, or do."""
    if isinstance(module, ExpertsModule):
        return module.why_unread() or mixture.why_unquantized(module, asked, is_transposed(module), name)
    if experts_takeover.are_foreign(module):
        return experts_takeover.why_not(module, asked)
    if (reason := why_no_twin(module)) is not None:
        return reason
    for own in mixture.names_of(module):
        reason = mixture.why_unread(module._parameters[own], own, module._parameters.get(f"{own}_bias"))
        if reason is not None:
            return reason
    return mixture.why_unquantized(module, asked, is_transposed(module), name)


def why_no_twin(module: Any) -> str | None:
    """Why a module of this class cannot become fast experts, whatever its weights are."""
    form = None if is_fast_experts(module) else mixture.form_of(module)
    return form if isinstance(form, str) else None


def adopt(module: Any, tune: str = "lazy", name: str = "", precision: Precision = AS_HELD) -> None:
    """Turns experts into their fast twin in place; ValueError where `mixture.form_of` has a reason."""
    form = mixture.form_of(module)
    if isinstance(form, str):
        raise ValueError(f"{name or type(module).__name__} cannot be converted: {form}")
    stock: Any = type(module)
    module.__class__ = _twin(stock)
    _become_fast(module, form, precision, tune, name)


def _become_fast(module: Any, form: Form, precision: Precision, tune: str, name: str) -> None:
    vars(module).update(_form=form._replace(precision=own(precision)), _tune=tune, _name=name)
    module._reset()


def take_over(module: Any, tune: str, name: str, held: torch.dtype) -> Callable[[], None]:
    """Makes FastExperts of those in fp8, of which `why_not` has nothing to say, and tells what undoes it. held: the
    dtype of the model around them."""
    told = experts_takeover.found(module)
    assert not isinstance(told, str)
    over, precision = experts_takeover.frozen(told, held)
    kind, before = type(module), {**vars(module), "_parameters": dict(module._parameters)}
    for beside in experts_takeover.beside(module):
        del module._parameters[beside]
    module.__class__ = FastExperts
    _become_fast(module, told.form, precision, tune, name)
    hold(module, over)

    def undo() -> None:
        vars(module).clear()
        module.__class__ = kind
        vars(module).update(before)

    return undo


def release(module: Any) -> None:
    """Turns fast experts back into what they were, thawed."""
    thaw(module)
    if type(module) is FastExperts:
        return  # there is nothing that it was
    for key in OWN:
        vars(module).pop(key, None)
    module.__class__ = before(module, module._stock)


def set_precision(module: Any, precision: Precision) -> None:
    """Tells fast experts what to compute in."""
    vars(module)["_form"] = module._form._replace(precision=own(precision))
    module._reset()


def own(precision: Precision) -> Precision:
    """Without what experts do not have: another format to run in where that is faster, and inputs of a calibration."""
    return precision._replace(fallback=False, sample=None)


@functools.cache
def _twin(stock: type[nn.Module]) -> type[nn.Module]:
    if stock is Experts:
        return FastExperts
    members: dict[str, Any] = {"_stock": stock, "__module__": __name__, "__reduce_ex__": _reduced}
    members |= {"_blocks": mixture.takes_blocks(stock), "__doc__": f"{stock.__name__} on packed weights."}
    return type(f"Fast{stock.__name__}", (ExpertsModule, stock), members)


def _reduced(self: Any, protocol: Any) -> tuple[Any, ...]:
    """Its class is made here, and no pickle finds it."""
    return _again, (self._stock, self.__getstate__())


def _again(stock: type, state: dict[str, Any]) -> nn.Module:
    cls = _twin(stock)
    module = cls.__new__(cls)
    module.__setstate__(state)
    return module
