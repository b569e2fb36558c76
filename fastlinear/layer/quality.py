"""What quantizing costs a layer, as signal to noise: of its weight, and of its output where calibration kept inputs."""

from __future__ import annotations

import weakref
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

import fastlinear._weights as _weights
from fastlinear.layer import unpacked
from fastlinear.layer.frozen import record_of
from fastlinear.layer.shard import local
from fastlinear.spec import int4
from fastlinear.spec.int8 import Quantized, output_snr, signal_to_noise, weight_snr
from fastlinear.spec.packed import numbers

_FEW = 4  # experts of a mixture that are looked at
_ELEMENTS = 1 << 20  # of a larger weight every second, third ... channel is looked at


class Quality(NamedTuple):
    """Signal to noise in dB; None where it is not known."""

    weight: float | None = None
    output: float | None = None


UNKNOWN = Quality()
# By who has the weight: the layer, since another layer on the same pack has other inputs, or none, to tell an error by;
# of frozen layers, which have no inputs any more, by the pack; of experts by their shelf.
_known: WeakKeyDictionary[Any, tuple[weakref.ref[_weights.Packed], Quality]] = WeakKeyDictionary()


def quality_of(layer: Any) -> Quality:
    """Of what a fast layer is packed in; for a frozen one as it was with the weight."""
    packed, frozen = layer._engine.packed, record_of(layer)
    if packed is None:
        return UNKNOWN
    if frozen is not None:
        return _noted(packed, packed)
    if layer._engine.fresh(layer):
        note(layer, packed)
    return _noted(layer, packed)


def quality_of_pack(packed: _weights.Packed) -> Quality:
    """Of one whose weight is gone, as it was with that."""
    return _noted(packed, packed)


def coded_snr(weight: Tensor, coding: int4.Coding) -> float:
    """Signal to noise in dB that a weight [n, k], or of a large one every second, third ... channel, keeps as codes."""
    part = weight.detach()[:: max(1, weight.numel() // _ELEMENTS)]
    return signal_to_noise(part, int4.dequantize(unpacked.coded(part, coding)))


def quality_of_experts(module: Any, which: int) -> Quality:
    """Of what the one product of a mixture or the other is packed in, over some experts; for a frozen one as it was
    with the weights."""
    frozen, ready = module._frozen_experts, module._ready
    if frozen is None and ready is not None:
        note_experts(module, which, ready.shelves[which])
    shelf = ready and ready.shelves[which] if frozen is None else (frozen.first, frozen.second)[which]
    return UNKNOWN if shelf is None else _noted(shelf, shelf.packs[0])


def note_experts(module: Any, which: int, shelf: Any) -> None:
    """Remembers it of a shelf of the weights that a module still has."""
    if shelf.packs[0].scale is None or _noted(shelf, shelf.packs[0]) != UNKNOWN:
        return
    few = range(0, len(shelf.packs), max(1, len(shelf.packs) // _FEW))
    every = max(1, len(few) * shelf.n * shelf.k // _ELEMENTS)
    exact, found = (
        torch.cat([of(expert)[::every] for expert in few])
        for of in (lambda expert: module.weight_of(which, expert), lambda expert: numbers(shelf.packs[expert]))
    )
    _known[shelf] = weakref.ref(shelf.packs[0]), Quality(signal_to_noise(exact, found))


def note_weight(packed: _weights.Packed, weight: Tensor) -> None:
    """Remembers it of a pack whose weight [n, k] is about to go."""
    every = max(1, packed.n * packed.k // _ELEMENTS)
    found = Quality(signal_to_noise(weight.detach()[::every], numbers(packed, every)))
    _known[packed] = weakref.ref(packed), found


def note(layer: Any, packed: _weights.Packed, for_good: bool = False) -> None:
    """Remembers it of a pack of the weight that a layer still has; for_good: and is about to lose."""
    if packed.scale is None:
        return
    if _noted(layer, packed) == UNKNOWN:
        _known[layer] = weakref.ref(packed), _measured(layer, packed)
    if for_good:
        _known[packed] = _known[layer]


def _noted(owner: Any, packed: _weights.Packed) -> Quality:
    of, quality = _known.get(owner, (None, UNKNOWN))
    return quality if of is not None and of() is packed else UNKNOWN


def _measured(layer: Any, packed: _weights.Packed) -> Quality:
    every, precision = max(1, packed.n * packed.k // _ELEMENTS), layer.precision
    weight = local(layer.weight).detach()
    weight = (weight.t() if layer._transposed else weight)[::every]
    if packed.grouped:
        return Quality(signal_to_noise(weight, numbers(packed, every)))
    scale, zero = packed.scale, packed.zero
    assert scale is not None
    quantized = Quantized(packed.unpack()[::every], scale[::every], None if zero is None else zero[::every])
    bias = None if layer.bias is None else local(layer.bias).detach()[::every]
    of_output = None
    if precision.sample is not None and weight.numel() > 0:
        of_output = output_snr(precision.sample, weight, quantized, precision.rows, bias)
    return Quality(weight_snr(weight, quantized, precision.smooth), of_output)
