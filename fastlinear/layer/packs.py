"""Which parameters the kernels read, and the packed weights, which tied layers share."""

from __future__ import annotations

import functools
import os
import threading
import weakref
from typing import Any

import torch
from torch import Tensor, nn

import fastlinear._engine as _engine
import fastlinear._kernels as _kernels
from fastlinear.plan import decide
from fastlinear.spec.int8 import Quantized, quantize_weight
from fastlinear.spec.precision import DTYPES, Precision, is_same

lock = threading.RLock()  # packing, planning, freezing; a call that is packed and planned never takes it
if hasattr(os, "register_at_fork"):  # another thread may have held it
    os.register_at_fork(after_in_child=lock._at_fork_reinit)  # type: ignore[attr-defined]

# (memory of the weight, whether it is transposed, layout, smoothing) -> what it was when it was packed, and its pack.
# No reference to a Parameter is held, not even a weak one, which torch.utils.swap_tensors refuses.
_packs: dict[tuple[Any, ...], tuple[_engine.Fingerprint, weakref.ref[_kernels.Packed]]] = {}


def record_of(module: nn.Module) -> Any:
    """The Frozen that a frozen layer has in the place of its weight; None for any other module."""
    frozen = getattr(module, "_frozen", None)
    # functional_call lends a frozen layer a weight
    return None if frozen is None or module._parameters.get("weight") is not None else frozen


def why_unfit(module: nn.Module, but: str = "") -> str | None:
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
    if weight is not None and weight.dim() != 2:
        return f"its weight has {weight.dim()} dimensions, not 2"
    for what, tensor in (("weight", weight), ("bias", bias)):
        if tensor is not None and type(tensor) not in (nn.Parameter, Tensor):
            return f"its {what} is a {type(tensor).__name__}"
        if tensor is not None and tensor.device.type != "cpu":
            return f"its {what} is on device {tensor.device}"
        if tensor is not None and tensor.layout is not torch.strided:
            return f"its {what} is {tensor.layout}, not dense"
        if tensor is not None and (tensor.is_neg() or tensor.is_conj()):
            return f"its {what} is a lazily negated or conjugated view"
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


def pack(
    weight: Tensor,
    precision: Precision,
    transposed: bool = False,
    compare: bool = False,
    fingerprint: _engine.Fingerprint | None = None,
) -> _kernels.Packed:
    """The weight [n, k], or [k, n] if transposed, in the format `precision.packed` and the layout of this machine.

    A pack that there is already is used again, but with `compare` only if it holds the very weight. fingerprint: of the
    weight, if the caller took one before. Raises ValueError where the format is of integers and the weight has
    infinities or NaN, or too many columns.
    """
    assert precision.packed is not None
    layout, smooth = decide.layout(precision.packed), precision.smooth
    # Before the contents are read: what is written meanwhile is then seen at the next call.
    fingerprint = fingerprint or _engine.Fingerprint(weight)
    key = (fingerprint.memory, transposed, layout, None if smooth is None else smooth.numpy().tobytes())
    known, shared = _packs.get(key, (None, None))
    packed = shared() if shared is not None and known is not None and known.fits(weight) else None
    if packed is None or compare:
        dense = weight.detach().t() if transposed else weight.detach()
        contents = _contents(dense, precision.packed, smooth)
        if packed is None or not _holds(packed, *contents):
            packed = _kernels.Packed(contents[0], layout, *contents[1:])
        reference = weakref.ref(packed, functools.partial(_forget, key))
        _packs[key] = fingerprint, reference
    return packed


def _forget(key: tuple[Any, ...], reference: weakref.ref[_kernels.Packed]) -> None:
    if _packs.get(key, (None, None))[1] is reference:
        del _packs[key]


def _contents(dense: Tensor, packed_as: str, smooth: Tensor | None) -> tuple[Any, ...]:
    """The weight [n, k] in a format: as Packed takes it, with scales where the format is of integers."""
    if packed_as in DTYPES:
        return (dense.to(DTYPES[packed_as]),)
    quantized = quantize_weight(dense, smooth)
    return quantized.values, quantized.scale, quantized.zero


def _holds(packed: _kernels.Packed, values: Tensor, scale: Tensor | None = None, zero: Tensor | None = None) -> bool:
    return torch.equal(packed.unpack(), values) and is_same(packed.scale, scale) and is_same(packed.zero, zero)


def pack_quantized(quantized: Quantized, packed_as: str) -> _kernels.Packed:
    """An int8 weight in an integer format and the layout of this machine; ValueError where it has too many columns."""
    return _kernels.Packed(quantized.values, decide.layout(packed_as), quantized.scale, quantized.zero)


def repack(packed: _kernels.Packed, layout: str) -> _kernels.Packed:
    """The same weight in another layout of its format, bit for bit."""
    return _kernels.Packed(packed.unpack(), layout, packed.scale, packed.zero)


def forget_pack(weight: Tensor) -> None:
    """The next `pack` of this parameter packs anew, even where no change was seen."""
    if weight.device.type == "cpu" and type(weight) in (nn.Parameter, Tensor) and weight.layout is torch.strided:
        address = weight.data_ptr()
        for key in [key for key in list(_packs) if key[0][1] == address]:
            _packs.pop(key, None)
