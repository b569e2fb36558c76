"""Which parameters and inputs the kernels read, and the packed weights, which tied layers share."""

from __future__ import annotations

import weakref

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakIdKeyDictionary

from fastlinear import _engine, _kernels, planner

_packs = WeakIdKeyDictionary()  # parameter -> layout -> what the parameter was when it was packed, and the pack


def why_unfit(module: nn.Module) -> str | None:
    """Why the kernels cannot read a module's parameters, in a few words; None if they can."""
    weight = module._parameters.get("weight")
    if weight is None:
        return "its weight is computed by a hook or parametrization"
    bias = module._parameters.get("bias")
    if bias is None and getattr(module, "bias", None) is not None:
        return "its bias is computed by a hook or parametrization"
    if weight.dim() != 2:
        return f"its weight has {weight.dim()} dimensions, not 2"
    for what, tensor in (("weight", weight), ("bias", bias)):
        if tensor is not None and type(tensor) not in (nn.Parameter, Tensor):
            return f"its {what} is a {type(tensor).__name__}"
        if tensor is not None and tensor.device.type != "cpu":
            return f"its {what} is on device {tensor.device}"
        if tensor is not None and tensor.layout is not torch.strided:
            return f"its {what} is {tensor.layout}, not dense"
    return odd_dtype(weight, bias)


def odd_dtype(weight: Tensor, bias: Tensor | None) -> str | None:
    """Why the kernels cannot read parameters of these dtypes; None if they can."""
    if weight.dtype not in _kernels.FORMATS:
        return f"its weight is {weight.dtype}, not {' or '.join(map(str, _kernels.FORMATS))}"
    if bias is not None and bias.dtype not in (torch.float32, weight.dtype):
        return f"its bias is {bias.dtype}, not torch.float32 or {weight.dtype} as its weight"
    return None


def is_pairing(x: torch.dtype, packed: torch.dtype) -> bool:
    """Whether kernels multiply an x of this dtype by a weight packed in that; if that is fp32, x must be, too."""
    return x in _kernels.FORMATS and (x is torch.float32 or packed is not torch.float32)


def pack(weight: Tensor, dtype: torch.dtype, transposed: bool = False) -> _kernels.Packed:
    """The weight [n, k], or [k, n] if transposed, cast to `dtype`, in the layout of this machine."""
    layout = planner.layout(_kernels.FORMATS[dtype])
    state = (weight.data_ptr(), _engine.version_of(weight), weight.dtype, transposed)
    known, shared = _packs.setdefault(weight, {}).get(layout, (None, None))
    packed = shared() if shared is not None and known == state else None
    if packed is None:
        dense = weight.detach().to(dtype)
        packed = _kernels.Packed(dense.t() if transposed else dense, layout)
        _packs[weight][layout] = state, weakref.ref(packed)
    return packed


def forget_pack(weight: Tensor) -> None:
    """The next `pack` of this parameter packs anew, even where torch saw no change."""
    _packs.pop(weight, None)
