"""The packed weights, which tied layers share."""

from __future__ import annotations

import functools
import weakref
from typing import Any

import torch
from torch import Tensor, nn

import fastlinear._engine as _engine
import fastlinear._kernels as _kernels
from fastlinear.plan import table
from fastlinear.spec.formats import DTYPES
from fastlinear.spec.int8 import Quantized, quantize_weight
from fastlinear.spec.precision import Precision, is_same

# (memory of the weight, whether it is transposed, layout, smoothing) -> what it was when it was packed, and its pack.
# No reference to a Parameter is held, not even a weak one, which torch.utils.swap_tensors refuses.
_packs: dict[tuple[Any, ...], tuple[_engine.Fingerprint, weakref.ref[_kernels.Packed]]] = {}


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
    layout, smooth = table.layout(precision.packed), precision.smooth
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
    return _kernels.Packed(quantized.values, table.layout(packed_as), quantized.scale, quantized.zero)


def repack(packed: _kernels.Packed, layout: str) -> _kernels.Packed:
    """The same weight in another layout of its format, bit for bit."""
    return _kernels.Packed(packed.unpack(), layout, packed.scale, packed.zero)


def forget_pack(weight: Tensor) -> None:
    """The next `pack` of this parameter packs anew, even where no change was seen."""
    if weight.device.type == "cpu" and type(weight) in (nn.Parameter, Tensor) and weight.layout is torch.strided:
        address = weight.data_ptr()
        for key in [key for key in list(_packs) if key[0][1] == address]:
            _packs.pop(key, None)
