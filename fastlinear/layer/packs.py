"""The packed weights, which tied layers share."""

from __future__ import annotations

import functools
import weakref
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

import fastlinear._fingerprints as _fingerprints
import fastlinear._weights as _weights
from fastlinear.layer import unpacked
from fastlinear.plan import table
from fastlinear.spec import gates, int4
from fastlinear.spec.formats import DTYPES
from fastlinear.spec.int8 import Quantized
from fastlinear.spec.precision import Precision, is_same

# (memory of the weight, whether it is transposed, layout, smoothing) -> what it was when it was packed, and its pack.
# No reference to a Parameter is held, not even a weak one, which torch.utils.swap_tensors refuses.
_packs: dict[tuple[Any, ...], tuple[_fingerprints.Fingerprint, weakref.ref[_weights.Packed]]] = {}


class GatedPacked(_weights.Packed):
    """A gated weight [2 N, K], whose channels take turns in the panels (spec/gates.py). Whoever asks for the weight,
    its scales and zero points has them in the order of the Parameter."""

    def __init__(
        self,
        weight: Tensor,
        layout: str,
        scale: Any = None,
        zero: Any = None,
        table: Any = None,
        offset: Tensor | None = None,
        supers: Tensor | None = None,
        order: Tensor | None = None,
    ) -> None:
        channels = (scale, zero, offset, supers)
        scale, zero, offset, supers = (t if t is None else gates.interleave(t, layout) for t in channels)
        super().__init__(gates.interleave(weight, layout), layout, scale, zero, table, offset, supers, order)

    def unpack(self) -> Tensor:
        return gates.separate(super().unpack(), self.layout)

    @property
    def scale(self) -> Tensor | None:  # type: ignore[override]
        return self._in_order(super().scale)

    @property
    def zero(self) -> Tensor | None:  # type: ignore[override]
        return self._in_order(super().zero)

    @property
    def offset(self) -> Tensor | None:  # type: ignore[override]
        return self._in_order(super().offset)

    @property
    def supers(self) -> Tensor | None:  # type: ignore[override]
        return self._in_order(super().supers)

    def _in_order(self, channels: Tensor | None) -> Tensor | None:
        if channels is None:
            return None
        return gates.separate(channels.reshape(len(channels), -1), self.layout).reshape(channels.shape).contiguous()


def kind_of(gated: bool) -> type[_weights.Packed]:
    """The class of the packs of gated weights, or of others."""
    return GatedPacked if gated else _weights.Packed


def pack(
    weight: Tensor,
    precision: Precision,
    transposed: bool = False,
    compare: bool = False,
    fingerprint: _fingerprints.Fingerprint | None = None,
    gated: bool = False,
) -> _weights.Packed:
    """The weight [n, k], or [k, n] if transposed, in the format `precision.packed` and the layout of this machine.

    A pack that there is already is used again, but with `compare` only if it holds the very weight. fingerprint: of the
    weight, if the caller took one before. Raises ValueError where the format is of integers and the weight has
    infinities or NaN, or too many columns.
    """
    layout, smooth, coding = layout_of(precision), precision.smooth, precision.coding
    # Before the contents are read: what is written meanwhile is then seen at the next call.
    fingerprint = fingerprint or _fingerprints.Fingerprint(weight)
    key = (fingerprint.memory, transposed, gated, layout, coding, None if smooth is None else smooth.numpy().tobytes())
    known, shared = _packs.get(key, (None, None))
    packed = shared() if shared is not None and known is not None and known.fits(weight) else None
    if packed is None or compare:
        dense = weight.detach().t() if transposed else weight.detach()
        contents = _contents(dense, precision)
        if packed is None or not _holds(packed, *contents):
            packed = kind_of(gated)(contents[0], layout, *contents[1:])
        reference = weakref.ref(packed, functools.partial(_forget, key))
        _packs[key] = fingerprint, reference
    return packed


def pack_apart(dense: Tensor, precision: Precision, gated: bool = False) -> _weights.Packed:
    """A weight [n, k] as `pack` packs it, but one that nobody else has."""
    contents = _contents(dense.detach(), precision)
    return kind_of(gated)(contents[0], layout_of(precision), *contents[1:])


def _forget(key: tuple[Any, ...], reference: weakref.ref[_weights.Packed]) -> None:
    if _packs.get(key, (None, None))[1] is reference:
        del _packs[key]


def layout_of(precision: Precision) -> str:
    """In which a weight is packed on this machine."""
    assert precision.packed is not None
    base = table.layout(precision.packed)
    return base if precision.coding is None else precision.coding.layout(base)


def _contents(dense: Tensor, precision: Precision) -> tuple[Any, ...]:
    """The weight [n, k] as Packed takes it, with scales and the like where its format is of integers or codes."""
    assert precision.packed is not None
    if precision.packed in DTYPES:
        return (dense.to(DTYPES[precision.packed]),)
    if precision.coding is not None:
        coded = unpacked.coded(dense, precision.coding)
        return coded.codes, *coded.contents()
    quantized = unpacked.quantized(dense, precision.smooth)
    return quantized.values, quantized.scale, quantized.zero


def contents_of(packed: _weights.Packed) -> tuple[Tensor | None, ...]:
    """What a pack was made of: values or codes, scale, zero, table, offset, supers and order."""
    return packed.unpack(), packed.scale, packed.zero, packed.table, packed.offset, packed.supers, packed.order


def _holds(packed: _weights.Packed, *contents: Tensor | None) -> bool:
    padded = (*contents, *(None,) * 6)
    return all(is_same(had, has) for had, has in zip(contents_of(packed), padded, strict=False))


def pack_quantized(quantized: Quantized, packed_as: str, gated: bool) -> _weights.Packed:
    """An int8 weight in an integer format and the layout of this machine; ValueError where it has too many columns."""
    return kind_of(gated)(quantized.values, table.layout(packed_as), quantized.scale, quantized.zero)


def pack_coded(coded: int4.Coded, gated: bool) -> _weights.Packed:
    """A weight in groups that somebody else quantized, bit for bit, in the layout of this machine."""
    layout = coded.layout(table.layout(coded.packed))
    return kind_of(gated)(coded.codes, layout, *coded.contents())


def stitched(parts: Iterable[_weights.Packed], n: int) -> _weights.Packed:
    """The packs of channels that follow one another, n in all, as one. Each but the last has whole panels; one at a
    time is in memory beside the result, which a weight that was read at once would be there beside twice."""
    done = 0
    for part in parts:
        if not done:
            layout, k, nr = part.layout, part.k, part.head(1).n
            block = _weights.Block(_weights.packed_nbytes(layout, n, k))
            memory = torch.frombuffer(block, dtype=torch.uint8)
        panels, before, every = (-(-channels // nr) for channels in (part.n, done, n))
        at_whole = at_part = 0
        for size in _weights.arrays_of_panels(layout, k):
            begin = at_whole + before * size
            memory[begin : begin + panels * size] = part.data[at_part : at_part + panels * size]
            at_whole, at_part = at_whole + every * size, at_part + panels * size
        memory[at_whole:] = part.data[at_part:]  # table and order, which all have
        done += part.n
    return _weights.Packed.over(block, layout, n, k)


def repack(packed: _weights.Packed, layout: str) -> _weights.Packed:
    """The same weight in another layout of its format, bit for bit."""
    values, *beside = contents_of(packed)
    assert values is not None
    return type(packed)(values, layout, *beside)


def forget_pack(weight: Tensor) -> None:
    """The next `pack` of this parameter packs anew, even where no change was seen."""
    if weight.device.type == "cpu" and type(weight) in (nn.Parameter, Tensor) and weight.layout is torch.strided:
        address = weight.data_ptr()
        for key in [key for key in list(_packs) if key[0][1] == address]:
            _packs.pop(key, None)
