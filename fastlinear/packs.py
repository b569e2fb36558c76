"""Which parameters and inputs the kernels read, and the packed weights, which tied layers share."""

from __future__ import annotations

import os
import threading
import weakref
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakIdKeyDictionary

from fastlinear import _engine, _kernels, planner

lock = threading.RLock()  # packing, planning, freezing; a call that is packed and planned never takes it
if hasattr(os, "register_at_fork"):  # another thread may have held it
    os.register_at_fork(after_in_child=lock._at_fork_reinit)  # type: ignore[attr-defined]

_packs = WeakIdKeyDictionary()  # parameter -> layout -> what the parameter was when it was packed, and the pack


def record_of(module: nn.Module) -> Any:
    """The Frozen that a frozen layer has in the place of its weight; None for any other module."""
    frozen = getattr(module, "_frozen", None)
    # functional_call lends a frozen layer a weight
    return None if frozen is None or module._parameters.get("weight") is not None else frozen


def why_unfit(module: nn.Module) -> str | None:
    """Why the kernels cannot read a module's parameters, in a few words; None if they can."""
    weight, frozen = module._parameters.get("weight"), record_of(module)
    if weight is None and frozen is None:
        return "its weight is computed by a hook or parametrization"
    bias = module._parameters.get("bias")
    if bias is None and getattr(module, "bias", None) is not None:
        return "its bias is computed by a hook or parametrization"
    if weight is not None and weight.dim() != 2:
        return f"its weight has {weight.dim()} dimensions, not 2"
    for what, tensor in (("weight", weight), ("bias", bias)):
        if tensor is not None and type(tensor) not in (nn.Parameter, Tensor):
            return f"its {what} is a {type(tensor).__name__}"
        if tensor is not None and tensor.device.type != "cpu":
            return f"its {what} is on device {tensor.device}"
        if tensor is not None and tensor.layout is not torch.strided:
            return f"its {what} is {tensor.layout}, not dense"
    return odd_dtype(dtype_of(module), bias)


def dtype_of(module: Any) -> torch.dtype:
    """The dtype of a layer's weight, also of one that is frozen, which is not unpacked for it."""
    dtype: torch.dtype = (record_of(module) or module.weight).dtype
    return dtype


def odd_dtype(weight: torch.dtype, bias: Tensor | None) -> str | None:
    """Why the kernels cannot read a weight of this dtype and this bias; None if they can."""
    if weight not in _kernels.FORMATS:
        return f"its weight is {weight}, not {' or '.join(map(str, _kernels.FORMATS))}"
    if bias is not None and bias.dtype not in (torch.float32, weight):
        return f"its bias is {bias.dtype}, not torch.float32 or {weight} as its weight"
    return None


def is_pairing(x: torch.dtype, packed: torch.dtype) -> bool:
    """Whether kernels multiply an x of this dtype by a weight packed in that; if that is fp32, x must be, too."""
    return x in _kernels.FORMATS and (x is torch.float32 or packed is not torch.float32)


def pack(weight: Tensor, dtype: torch.dtype, transposed: bool = False, compare: bool = False) -> _kernels.Packed:
    """The weight [n, k], or [k, n] if transposed, cast to `dtype`, in the layout of this machine.

    A pack that there is already is used again, but with `compare` only if it holds the very weight.
    """
    layout = planner.layout(_kernels.FORMATS[dtype])
    state = (weight.data_ptr(), _engine.version_of(weight), weight.dtype, transposed)
    known, shared = _packs.setdefault(weight, {}).get(layout, (None, None))
    packed = shared() if shared is not None and known == state else None
    if packed is None or compare:
        dense = weight.detach().to(dtype)
        dense = dense.t() if transposed else dense
        if packed is None or not torch.equal(packed.unpack(), dense):
            packed = _kernels.Packed(dense, layout)
        _packs[weight][layout] = state, weakref.ref(packed)
    return packed


def forget_pack(weight: Tensor) -> None:
    """The next `pack` of this parameter packs anew, even where torch saw no change."""
    _packs.pop(weight, None)
