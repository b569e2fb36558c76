"""Why a layer is not fast: `why_not` is the one door; and what stands for a weight that others quantized."""

from __future__ import annotations

import sys
import types
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.lazy import LazyModuleMixin
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

import fastlinear._tensors as _tensors
from fastlinear.layer import pages, takeover
from fastlinear.layer.frozen import Freezable, Frozen, record_of
from fastlinear.layer.packs import pack_quantized
from fastlinear.layer.quality import coded_snr
from fastlinear.layer.shard import is_shared, is_unsummed, local
from fastlinear.spec.foreign import foreign
from fastlinear.spec.int8 import Quantized
from fastlinear.spec.precision import ANYHOW, Wanted

HOOKED = "_old_forward"  # where accelerate puts the forward that its hooks run around
# What decides what a call computes.
_CALL = ("forward", "__call__", "_wrapped_call_impl", "_call_impl", "__getattr__", "__getattribute__")
_LIKE_LINEAR = {"transformers.models.falcon.modeling_falcon.FalconLinear"}  # whose forward is nn.Linear's, spelled out


def why_not(layer: Any, asked: Wanted = ANYHOW, name: str = "") -> str | None:
    """Why a module cannot run on the kernels as it was asked for, in a few words; None if it can, or does.

    name: by which a calibration knows the layer.
    """
    told = takeover.found(layer)
    if told is not None:
        return told if isinstance(told, str) else takeover.why_not(told, asked, name)
    return why_no_twin(layer) or _why_unpacked(layer, asked, name)


def _told(cls: type[nn.Module]) -> str:
    """The name of a class; with its module where it is nn.Linear's own, as peft's are."""
    return f"{cls.__module__}.{cls.__name__}" if cls.__name__ == "Linear" else cls.__name__


def why_no_twin(module: nn.Module) -> str | None:
    """Why a module of this class cannot become a fast one, whatever its weight is."""
    if isinstance(module, Freezable):
        return None
    if isinstance(module, NonDynamicallyQuantizableLinear):
        return "the attention around it reads its weight and never calls it"
    if isinstance(module, LazyModuleMixin):
        return "its first call makes its parameters: convert after that"
    if isinstance(module, nn.Linear) and not calls_linear(type(module)):
        return f"{_told(type(module))} is an nn.Linear with a forward of its own"
    if not isinstance(module, nn.Linear) and type(module) is not conv1d():
        return f"{type(module).__name__} is neither nn.Linear nor transformers' Conv1D"
    hooked = "_hf_hook" in vars(module) and runs_its_own(module, HOOKED)
    if not runs_its_own(module, "forward") and not hooked and not runs_its_part(module):
        return "its forward was replaced by one that knows nothing of kernels: convert first, then replace it"
    return None


def calls_linear(cls: type[nn.Module]) -> bool:
    """Whether a subclass of nn.Linear leaves what a call computes to nn.Linear."""
    own = {name for name in _CALL if getattr(cls, name) is not getattr(nn.Linear, name)}
    return not own or (own == {"forward"} and f"{cls.__module__}.{cls.__qualname__}" in _LIKE_LINEAR)


def runs_its_own(module: nn.Module, attribute: str) -> bool:
    """Whether what stands for the module's forward in this attribute is that of its class."""
    method = vars(module).get(attribute)
    if method is None:
        return attribute == "forward"
    own = isinstance(method, types.MethodType) and method.__func__ is type(module).forward
    return own and method.__self__ is module


def runs_its_part(module: nn.Module) -> bool:
    """Whether transformers' tensor parallelism is around the module's forward: a function that lends it this process's
    parts of the parameters, which are DTensors, and keeps the forward of its class in its closure."""
    return any(map(is_shared, module._parameters.values())) and _kept(vars(module).get("forward")) is not None


def _kept(function: Any) -> types.MethodType | None:
    """The forward of a module that a function around it keeps."""
    cells = [cell.cell_contents for cell in getattr(function, "__closure__", None) or ()]
    held = [cell for cell in cells if isinstance(cell, types.MethodType) and isinstance(cell.__self__, nn.Module)]
    kind: Any = type(held[0].__self__) if len(held) == 1 else None
    return held[0] if kind is not None and held[0].__func__ is kind.forward else None


def around(module: nn.Module, cls: type[nn.Module]) -> types.FunctionType:
    """What stands for the forward of a module that `runs_its_part`, around that of `cls`. In a copy it is a function
    around the original's."""
    function: types.FunctionType = vars(module)["forward"]
    kept: Any = _kept(function)
    instead = {id(kept): types.MethodType(cls.forward, module), id(kept.__self__): module}
    cells = [cell.cell_contents for cell in function.__closure__ or ()]
    closure = tuple(types.CellType(instead.get(id(cell), cell)) for cell in cells)
    made = types.FunctionType(
        function.__code__, function.__globals__, function.__name__, function.__defaults__, closure
    )
    made.__kwdefaults__ = function.__kwdefaults__
    made.__dict__.update(vars(function))
    return made


def conv1d() -> Any:
    """GPT-2's linear layer of transformers, whose weight is [in, out]; None before the user has imported it."""
    return getattr(sys.modules.get("transformers.pytorch_utils"), "Conv1D", None)


def _why_unpacked(layer: Any, asked: Wanted, name: str) -> str | None:
    integers = _foreign_weight(layer, asked)
    if isinstance(integers, str):
        return integers
    if integers is not None:
        return asked.why_not(name, integers.values.shape[1], integers) or why_unread(layer, but="weight")
    reason = why_unread(layer)
    if reason is not None or asked.scheme is None:
        return reason
    weight = local(layer.weight)
    reason = asked.why_not(name, weight.shape[0 if is_transposed(layer) else 1])
    if reason is None and weight.numel() > 0 and not bool(torch.stack(weight.detach().aminmax()).isfinite().all()):
        reason = "its weight has infinities or NaN, which no integers stand for"
    coding, least = asked.scheme.coding(), asked.scheme.least
    if reason is None and coding is not None and least is not None and weight.numel() > 0:
        kept = coded_snr(weight.t() if is_transposed(layer) else weight, coding)
        if kept < least:
            reason = f"4 bits keep {kept:.1f} dB of its weight, less than the {least:g} that were asked for"
    pages.let_go(weight.detach())  # `convert` looks at all weights before it packs the first
    return reason


def why_unread(module: nn.Module, but: str = "") -> str | None:
    """Why the kernels cannot read a module's parameters, in a few words; None if they can. `but`: "weight", where that
    is not for them to read."""
    weight, frozen = module._parameters.get("weight"), record_of(module)
    if weight is None and frozen is None:
        return "its weight is computed by a hook or parametrization"
    bias = module._parameters.get("bias")
    if bias is None and getattr(module, "bias", None) is not None:
        return "its bias is computed by a hook or parametrization"
    if but == "weight":
        weight = None
    for what, tensor in (("weight", weight), ("bias", bias)):
        if is_unsummed(tensor):
            return f"its {what} is a DTensor whose parts are still to be summed"
    weight, bias = local(weight), local(bias)
    if weight is not None and weight.dim() != 2:
        return f"its weight has {weight.dim()} dimensions, not 2"
    for what, tensor in (("weight", weight), ("bias", bias)):
        if tensor is not None and (reason := odd_memory(what, tensor)) is not None:
            return reason
    return odd_dtype(dtype_of(module), bias)


def odd_memory(what: str, tensor: Tensor) -> str | None:
    """Why the kernels cannot read a parameter as it lies, whatever its dtype is; None if they can."""
    if type(tensor) not in (nn.Parameter, Tensor):
        return f"its {what} is a {type(tensor).__name__}"
    if tensor.device.type != "cpu":
        return f"its {what} is on device {tensor.device}"
    if tensor.layout is not torch.strided:
        return f"its {what} is {tensor.layout}, not dense"
    if tensor.is_neg() or tensor.is_conj():
        return f"its {what} is a lazily negated or conjugated view"
    return None


def odd_dtype(weight: torch.dtype, bias: Tensor | None) -> str | None:
    """Why the kernels cannot read a weight of this dtype and this bias; None if they can."""
    if weight not in _tensors.FORMATS:
        return f"its weight is {weight}, not {' or '.join(map(str, _tensors.FORMATS))}"
    if bias is not None and bias.dtype not in (torch.float32, weight):
        return f"its bias is {bias.dtype}, not torch.float32 or {weight} as its weight"
    return None


def dtype_of(module: Any) -> torch.dtype:
    """The dtype of a layer's weight, also of one that is frozen, which is not unpacked for it."""
    dtype: torch.dtype = (record_of(module) or module.weight).dtype
    return dtype


def features_of(module: Any) -> tuple[int, int]:
    """Input and output features of a layer of any linear class; 0 where it does not tell them."""
    names = (("in_features", "out_features"), ("nx", "nf"), ("infeatures", "outfeatures"))  # Conv1D, AutoGPTQ
    known = next((each for each in names if all(hasattr(module, name) for name in each)), None)
    return (0, 0) if known is None else (getattr(module, known[0]), getattr(module, known[1]))


def is_transposed(module: Any) -> bool:
    """Whether a layer, fast or not, holds its weight as [in, out]."""
    return bool(getattr(module, "_transposed", not isinstance(module, nn.Linear)))


def taken_over(module: Any, asked: Wanted, gated: bool = False) -> Frozen | None:
    """What stands for the weight of a module that was quantized elsewhere; None where its weight is its own."""
    integers = _foreign_weight(module, asked)
    if asked.scheme is None or not isinstance(integers, Quantized):
        return None
    return Frozen(pack_quantized(integers, asked.scheme.packed, gated), module.weight.dtype)


def _foreign_weight(module: Any, asked: Wanted) -> Quantized | str | None:
    """The integers that a module to be quantized has as its weight already, or why they cannot be taken over."""
    own = asked.scheme is None or is_transposed(module)
    return None if own else foreign(module._parameters.get("weight"))
