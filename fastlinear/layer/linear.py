"""FastLinear: an nn.Linear that runs on a packed weight with its activation fused, or on F.linear where it must.

Weight and bias stay ordinary Parameters (until `freeze` drops the weight), so state dicts, optimizers, hooks and
`isinstance(m, nn.Linear)` keep their meaning. transformers' Conv1D has a fast twin of its own, and so has each subclass
of nn.Linear that leaves its calls to it: the twin is of both classes.
"""

from __future__ import annotations

import functools
import types
from typing import Any

import torch
from torch import Tensor, nn

from fastlinear.layer import lookup, pages, takeover
from fastlinear.layer.fallback import label
from fastlinear.layer.fitness import (
    HOOKED,
    around,
    runs_its_own,
    runs_its_part,
    taken_over,
    why_no_twin,
    why_not,
    why_unread,
)
from fastlinear.layer.frozen import Freezable, Frozen, hold, is_frozen, record_of, thaw_layer
from fastlinear.layer.fused import TakesOperands
from fastlinear.layer.lock import lock
from fastlinear.layer.module import FastModule
from fastlinear.layer.packs import forget_pack, pack, pack_quantized
from fastlinear.layer.parametrized import before
from fastlinear.layer.quality import note
from fastlinear.layer.shard import local, shard_of
from fastlinear.plan import decide, rivals, table
from fastlinear.plan.candidates import Chosen
from fastlinear.spec import activations, foreign, programs
from fastlinear.spec.activations import Activation
from fastlinear.spec.formats import DTYPES, dtype_of_rows
from fastlinear.spec.precision import AS_HELD, Precision, wanted
from fastlinear.spec.schemes import Int8Dynamic, Scheme

TUNE_MODES = ("lazy", "off")


class FastLinear(FastModule, nn.Linear):
    """Drop-in for nn.Linear followed by an activation: y = activation(x W^T + b).

    Takes what nn.Linear takes, and `activation`: a name ("gelu"), a name with torch's parameters (("leaky_relu", 0.1)),
    an nn module or a torch function; ValueError for one that cannot be fused; or `epilogue`: up to 8 steps that follow
    the product and its bias, as `spec.programs.resolve` says, whose tensors come with the call:

        FastLinear(768, 768, epilogue=("add", "relu"))(x, residual)    # relu(x W^T + b + residual)
        FastLinear(768, 768, epilogue=("gelu", ("mul", 0.5)))(x)       # 0.5 gelu(x W^T + b)

    Such operands are fp32, bf16 or fp16, and broadcast to the output. `accumulate="fp16"` admits kernels that sum up to
    64 products in fp16; `products=torch.bfloat16` multiplies x and the weight rounded to that. Input [...,
    in_features], output [..., out_features] of the input's dtype: fp32, with a weight of 16 or 8 bits also bf16 or
    fp16. The first call with a new number of rows measures the kernels for it (about 50 ms, kept in a cache file);
    training runs nn.Linear's own code, other dtypes and devices torch's ops.
    """

    _stock = nn.Linear, nn.Linear.forward

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        device: Any = None,
        dtype: torch.dtype | None = None,
        *,
        activation: object = None,
        epilogue: object = (),
        accumulate: str = "fp32",
        products: torch.dtype | None = None,
    ) -> None:
        resolved = self._resolve(activation, epilogue)
        asked = wanted(None, accumulate, products=products)
        super().__init__(in_features, self._rows(out_features), bias, device, dtype)
        _become_fast(self, resolved, "lazy", "", asked.of("", self.weight.dtype))

    @staticmethod
    def _rows(out_features: int) -> int:
        """Of the weight."""
        return out_features

    @staticmethod
    def _resolve(activation: object, epilogue: object) -> Activation | None:
        if epilogue == ():
            return activations.resolve(activation)
        if activation is not None:
            raise ValueError(f"activation={activation!r} and epilogue={epilogue!r} are two answers: make it a step")
        return programs.resolve(epilogue)

    @classmethod
    def from_linear(
        cls,
        linear: nn.Linear,
        activation: object = None,
        *,
        epilogue: object = (),
        dtype: torch.dtype | None = None,
        accumulate: str = "fp32",
        quantize: Scheme | None = None,
        products: torch.dtype | None = None,
    ) -> FastLinear:
        """A FastLinear that shares the parameters of `linear`; ValueError where it cannot be one (see `why_not`).

        dtype: torch.bfloat16 or torch.float16 packs the weight in 16 bits, whatever the parameter's dtype is.
        quantize: packs it in 8 or 4 bits, as in `convert`; a calibration is looked up by the name "", which is that of
            a layer calibrated by itself. A weight that another package quantized is taken over as it is.
        products: torch.bfloat16 or torch.float16 multiplies x and weight rounded to that, as in `convert`.
        """
        asked = wanted(dtype, accumulate, quantize, products)
        resolved = cls._resolve(activation, epilogue)
        reason = "it is frozen" if is_frozen(linear) else why_not(linear, asked)
        if reason is not None:
            raise ValueError(f"{type(linear).__name__} cannot become a FastLinear: {reason}")
        gated = programs.is_gated(resolved)
        over, told = taken_over(linear, asked, gated), takeover.found(linear)
        if isinstance(told, takeover.Found):
            linear, over, precision = takeover.take(linear, told, asked, "", None, gated)
        else:
            precision = asked.of("", linear.weight.dtype)
        fast = cls.__new__(cls)
        state = vars(linear).items()
        vars(fast).update({key: value.copy() if isinstance(value, dict) else value for key, value in state})
        _become_fast(fast, resolved, "lazy", "", precision)
        if over is not None:
            hold(fast, over)
        return fast

    @classmethod
    def from_quantized(
        cls,
        values: Tensor,
        scale: Tensor,
        zero: Tensor | None = None,
        bias: Tensor | None = None,
        activation: object = None,
        *,
        epilogue: object = (),
        quantize: Scheme | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> FastLinear:
        """A frozen FastLinear over an int8 weight that somebody else quantized: scale * (values - zero).

        values: int8 [out_features, in_features]; scale: floating, [out_features]; zero: integers from -128 to 127,
            [out_features], or None for zeros; bias: [out_features], fp32 or `dtype`, or None.
        quantize: how x is treated; None is Int8Dynamic(). A calibration is looked up by the name "".
        dtype: of `layer.weight`, and of the Parameter that `unfreeze` makes.
        Raises TypeError or ValueError for tensors that are not so, and where `quantize` cannot have them.
        """
        asked, resolved = wanted(None, quantize=quantize or Int8Dynamic()), cls._resolve(activation, epilogue)
        weight = foreign.quantized(values, scale, zero)
        n, k = weight.values.shape
        if bias is not None and bias.shape != (n,):
            raise ValueError(f"bias must be [{n}], one number for each output feature, but is {list(bias.shape)}")
        reason = asked.why_not("", k, weight)
        if reason is not None or asked.scheme is None:
            raise ValueError(f"an int8 weight of {n} x {k} cannot become a FastLinear: {reason}")
        fast: Any = FastLinear(k, n, bias is not None, "meta", dtype)
        if bias is not None:
            fast.bias = nn.Parameter(bias.detach(), requires_grad=False)
        _turn_into(fast, cls)
        _become_fast(fast, resolved, "lazy", "", asked.of("", dtype))
        hold(fast, Frozen(pack_quantized(weight, asked.scheme.packed, programs.is_gated(resolved)), dtype))
        if (reason := why_unread(fast)) is not None:
            raise ValueError(f"an int8 weight of {n} x {k} cannot become a FastLinear: {reason}")
        return fast  # type: ignore[no-any-return]


class FusedLinear(TakesOperands, FastLinear):
    """A FastLinear whose calls bring the operands of its epilogue; FastLinear(..., epilogue=...) makes it."""


def adopt(
    module: nn.Module,
    activation: Activation | None = None,
    tune: str = "lazy",
    name: str = "",
    precision: Precision = AS_HELD,
    over: Frozen | None = None,
) -> None:
    """Turns an nn.Linear or a transformers Conv1D into its fast twin in place: same object, parameters and hooks.

    `tune` is "lazy" (on first call) or "off" (heuristic); `name` is what messages call the layer; `over` makes it a
    frozen layer, whose own weight, on whatever device, goes unread. ValueError where `why_not(module)` has a reason.
    """
    if tune not in TUNE_MODES:
        raise ValueError(f"tune={tune!r} is unknown; allowed are {', '.join(TUNE_MODES)}")
    reason = why_not(module) if over is None else why_no_twin(module)
    if reason is not None:
        raise ValueError(f"{name or type(module).__name__} cannot be converted: {reason}")
    _turn_into(module, _twin(type(module)) or type(module))
    _become_fast(module, activation, tune, name, precision)
    if over is not None:
        hold(module, over)


def set_absorbed(module: Any, marker: nn.Module | None) -> None:
    """Tells a fast layer that its activation is that of `marker`, for which it is to be applied where the output goes
    to the marker and nowhere else; None: it is the layer's own."""
    vars(module)["_absorbed"] = marker
    module._reset()


def has_own_activation(module: Any) -> bool:
    """True for a fast layer that applies an activation whoever calls it."""
    return module.activation is not None and module._absorbed is None


def precision_of(module: Any) -> Precision:
    """What a fast layer was told to compute in."""
    precision: Precision = module._precision
    return precision


def set_precision(module: Any, precision: Precision) -> None:
    """Tells a fast layer what to compute in."""
    vars(module)["_precision"] = precision
    module._reset()


def release(module: Any) -> None:
    """Turns a fast layer back into what it was, thawed; its activation is no longer applied."""
    thaw_layer(module)
    out_features = module._channels if module._gated else None
    stock: Any = next(cls for cls in type(module).__mro__ if not issubclass(cls, Freezable))
    lookup.forget(module)
    for key in (*_OWN, *(key for key in _CONV_OWN if module._transposed)):
        vars(module).pop(key, None)
    _turn_into(module, before(module, stock))
    if out_features is not None:
        vars(module)["out_features"] = out_features


def freeze_layer(layer: Any, *tied: Any) -> None:
    """Packs the weight of a fast layer and drops it; `tied` are fast layers with the very same Parameter.

    Raises ValueError where the kernels cannot read its parameters (`fitness.why_unread`).
    """
    with lock:
        if is_frozen(layer):
            return
        if (reason := why_unread(layer)) is not None:
            raise ValueError(f"{type(layer).__name__} cannot be frozen: {reason}")
        weight = layer._parameters["weight"]
        # It may have changed in a way that torch does not count.
        packed = pack(local(weight), layer.precision, layer._transposed, compare=True, gated=layer._gated)
        note(layer, packed, for_good=True)
        frozen = Frozen(
            packed, weight.dtype, weight.requires_grad, smooth=layer.precision.smooth, shard=shard_of(weight)
        )
        for twin in (layer, *tied):
            plan = [plan for (engine, *_), plan in twin._plans.items() if engine is twin._engine]
            vars(twin)["_precision"] = twin._precision._replace(sample=None)  # it has served
            hold(twin, frozen)
            _plan_again(twin, plan)
        pages.let_go(local(weight).detach())


def _plan_again(layer: Freezable, plans: list[Chosen]) -> None:
    """Spares a layer that was just frozen the tuning of what it ran before; torch's own ways need the weight."""
    for plan in plans:
        if plan.name not in rivals.NAMES and not plan.refused:
            key = layer._engine, plan.threads, plan.x, plan.bucket
            layer._engine.plan_for(plan.bucket, plan.threads, dtype_of_rows(plan.x), decide.native(plan))
            layer._plans[key] = plan


def refresh(module: Any) -> None:
    """Forgets plans and packed weight, but for that of a frozen layer.

    Needed only after a change that goes unseen: a few elements written through `.data`.
    """
    if module._parameters.get("weight") is not None:
        forget_pack(module.weight)
    module._reset()


def force(module: Any, kernel: str | None) -> None:
    """Has a fast layer run one kernel, or one of torch's ways, wherever that can; None: what is measured, as before.
    ValueError for one that its weight, as it is packed, cannot run on, with those that it can."""
    frozen = record_of(module)
    layout = table.base(table.layout(module.packed_as) if frozen is None else frozen.packed.layout)
    allowed = [row["name"] for row in table.runnable() if layout in row["reads"]]
    allowed += rivals.NAMES if frozen is None and module.packed_as in DTYPES else ()
    if kernel is not None and kernel not in allowed:
        raise ValueError(f"{label(module)} cannot run {kernel!r} here; it may be one of {', '.join(allowed)}")
    vars(module)["_kernel"] = kernel
    module._reset()


def settle(module: Any) -> None:
    """Has the next call pack a fast layer's weight, even where that has kept changing."""
    for engine in module._engines():
        engine.settle()


def is_fast(module: nn.Module) -> bool:
    """True for FastLinear and its Conv1D twin."""
    return isinstance(module, FastModule)


def _turn_into(module: nn.Module, cls: type[nn.Module]) -> None:
    """Gives a module another class, and what stands for its forward that class's."""
    if runs_its_part(module):
        vars(module)["forward"] = around(module, cls)
    for attribute in ("forward", HOOKED):
        if attribute in vars(module) and runs_its_own(module, attribute):
            vars(module)[attribute] = types.MethodType(cls.forward, module)
    module.__class__ = cls


_OWN = (
    "activation",
    "_absorbed",
    "_engine",
    "_casting",
    "_plans",
    "_torch_packs",
    "_elsewhere",
    "_tune",
    "_name",
    "_precision",
    "_operands",
    "_kernel",
    "_shard",
    "_spelled",
)
_CONV_OWN = ("in_features", "out_features")


def _become_fast(module: Any, activation: Activation | None, tune: str, name: str, precision: Precision) -> None:
    weight = module._parameters.get("weight")
    if programs.is_gated(activation) and weight is not None:
        if weight.shape[0] % 2:
            raise ValueError(f"a gated layer has two channels for each output, but the weight has {weight.shape[0]}")
        vars(module)["out_features"] = weight.shape[0] // 2
    if (operands := programs.count_operands(activation)) > 0:
        if type(module) is not FastLinear and not isinstance(module, FusedLinear):
            raise TypeError(f"{type(module).__name__} takes no operands: derive it from FusedLinear to have them")
        if type(module) is FastLinear:
            _turn_into(module, FusedLinear)
        vars(module)["_operands"] = operands
    vars(module).update(activation=activation, _absorbed=None, _tune=tune, _name=name, _precision=precision)
    if module._transposed:
        vars(module).update(in_features=module.weight.shape[0], out_features=module.weight.shape[1])
    module._reset()


def _twin(cls: Any) -> type[FastModule] | None:
    if issubclass(cls, Freezable):
        return None
    if cls is nn.Linear:
        return FastLinear
    return _linear_twin(cls) if issubclass(cls, nn.Linear) else _conv1d_twin(cls)


@functools.cache
def _linear_twin(stock: Any) -> type[FastModule]:
    members = {
        "_stock": (stock, stock.forward),
        "__module__": __name__,
        "__doc__": f"{stock.__name__} as a fast layer.",
        "__reduce_ex__": _reduced,
    }
    return type(f"Fast{stock.__name__}", (FastLinear, stock), members)


def _reduced(self: Any, protocol: Any) -> tuple[Any, ...]:
    """Its class is made here, and no pickle finds it."""
    return _unfilled, (self._stock[0],), self.__getstate__()


def _unfilled(stock: Any) -> nn.Module:
    cls = _linear_twin(stock)
    return cls.__new__(cls)


@functools.cache
def _conv1d_twin(stock: type[nn.Module]) -> type[FastModule]:
    doc = "Conv1D of transformers (GPT-2) as a fast layer."
    members = {
        "_stock": (stock, stock.forward),
        "_transposed": True,
        "__module__": __name__,
        "__doc__": doc,
        "__repr__": nn.Module.__repr__,
    }
    twin = type("FastConv1D", (FastModule, stock), members)
    twin.forward = _forward_of_conv1d  # type: ignore[attr-defined]  # not a user's own, so not among the members
    return twin


def _forward_of_conv1d(self: Any, x: Tensor) -> Tensor:
    return self._forward(x)  # type: ignore[no-any-return]


_forward_of_conv1d.__annotations__ = {}  # TorchScript understands none that is a string


def __getattr__(name: str) -> Any:
    """FastConv1D exists once transformers' Conv1D does; pickle looks it up here."""
    if name == "FastConv1D":
        from transformers.pytorch_utils import Conv1D

        return _conv1d_twin(Conv1D)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
