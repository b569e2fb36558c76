"""Several linear layers on one input as one product: their weights are packed one behind the other, or as a gate.

x is then read, converted or quantized once for all of them, and one kernel call has columns enough for every thread.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor

import fastlinear._engine as _engine
import fastlinear._modes as _modes
import fastlinear._reasons as _reasons
import fastlinear._siblings as _siblings
import fastlinear._weights as _weights
from fastlinear._engine import Engine
from fastlinear._fingerprints import Fingerprint
from fastlinear._siblings import Siblings
from fastlinear.layer.fitness import why_unread
from fastlinear.layer.frozen import Frozen, hold, record_of
from fastlinear.layer.linear import FastLinear, is_fast
from fastlinear.layer.lock import lock
from fastlinear.layer.packs import pack
from fastlinear.spec.activations import Activation
from fastlinear.spec.precision import Precision, is_same

Parameters: TypeAlias = tuple[Tensor | None, ...]  # the layers' weights, and then their biases


class Stack:
    """The fast layers `layers`, all of one input width, precision and dtype, packed as one weight.

    The pack is made at the first call, and again when a parameter has changed; like a layer's, not at once where that
    happens all the time. `tune` and `name` are as for a layer. gate: one of `programs.GATES`, which makes one output of
    two layers: that of the first, activated, times that of the second. Raises ValueError for what cannot be one
    product.
    """

    def __init__(
        self, layers: Sequence[Any], tune: str = "lazy", name: str = "", gate: Activation | None = None
    ) -> None:
        reason = why_not_together(layers, gate is not None)
        if reason is not None:
            raise ValueError(f"the layers {name or 'of a group'} cannot be one product: {reason}")
        self.layers = tuple(layers)
        self.widths = tuple(layer.out_features for layer in layers)
        self.whole = _Whole(layers, self.widths, tune, name, gate)
        self.siblings = Siblings(self.layers, self.whole)
        # Of the parameters that are packed, or that are left to torch for some more calls: see Engine.
        self._last: tuple[Fingerprint | None, ...] = ()
        self._waits = 0

    def __call__(self, x: Tensor, parameters: Parameters) -> Any:
        """The outputs, each contiguous, or that of a gate; None where the layers have to answer one by one.

        For callers that know that no gradients of the parameters are wanted.
        """
        ys = self.siblings.answer(x, parameters)
        if ys is None and not self.siblings.fit(parameters) and self._pack(parameters):
            ys = self.siblings.answer(x, parameters)
        return ys

    def _pack(self, parameters: Parameters) -> bool:
        """Packs the parameters as they are now; False where the last ones did not last, until these have."""
        with lock:
            gated = self.whole._gated
            if _modes.watched() or why_not_together(self.layers, gated) is not None:
                return False
            known = tuple(None if p is None else Fingerprint(p) for p in parameters)
            if self._waits and fit(self._last, parameters):
                self._waits -= 1
            else:
                self._waits = _engine.trial if self._last and self.siblings.answered < _engine.trial else 0
            self._last = known
            self.siblings.know(())  # until all the rest is set
            if self._waits:
                return False
            half = len(parameters) // 2
            weights = [weight.detach() for weight in parameters[:half] if weight is not None]
            rows = [w.t() if layer._transposed else w for w, layer in zip(weights, self.layers, strict=True)]
            packed = pack(torch.cat(rows), self.layers[0].precision, gated=gated)
            self.whole.hold(packed, weights[0].dtype, _side_by_side(parameters[half:], self.widths))
            self.siblings.know(known)
        return True


def fit(known: Sequence[Fingerprint | None], parameters: Parameters) -> bool:
    """Whether each parameter is, and holds, what it did when its fingerprint was taken, None where it was None."""
    if len(known) != len(parameters):
        return False
    pairs = zip(known, parameters, strict=True)
    return all(p is None if k is None else p is not None and k.fits(p) for k, p in pairs)


class _Whole(FastLinear):
    """The product of a stack: a frozen layer with several outputs, or gated, which answers natively or, with None, not
    at all."""

    _widths: tuple[int, ...] = ()

    def __init__(
        self, layers: Sequence[Any], widths: tuple[int, ...], tune: str, name: str, gate: Activation | None
    ) -> None:
        super().__init__(layers[0].in_features, sum(widths), bias=False, device="meta")
        vars(self)["_widths"] = widths
        vars(self).update(_precision=layers[0]._precision, _tune=tune, _name=name, training=False)
        if gate is not None:
            vars(self).update(activation=gate, out_features=widths[0])

    def hold(self, packed: _weights.Packed, dtype: torch.dtype, bias: Tensor | None) -> None:
        hold(self, Frozen(packed, dtype))
        self._parameters["bias"] = bias  # type: ignore[assignment]

    def _new_engine(self, precision: Precision, bare: bool = False) -> Engine:
        engine = super()._new_engine(precision, bare)
        if not self._gated:
            engine.split(self._widths)
        return engine

    def _slow(self, x: Tensor, why: str, bare: bool = False, operands: tuple[Tensor, ...] = ()) -> Any:
        return self._native(x, self.packed_as) if why in (_reasons.STALE, _reasons.UNPLANNED) else None


def why_not_together(layers: Sequence[Any], gated: bool = False) -> str | None:
    """Why these modules cannot be one product, or a gate and what it lets through, in a few words; None if they can."""
    if len(layers) < 2:
        return "there are fewer than two"
    if gated and len({layer.out_features for layer in layers}) > 1:
        return f"they make {' and '.join(str(layer.out_features) for layer in layers)} features"
    first, biases = layers[0], {layer.bias.dtype for layer in layers if layer.bias is not None}
    for layer in layers:
        if not is_fast(layer):
            return f"{type(layer).__name__} is no fast layer"
        if (reason := why_unread(layer)) is not None:
            return reason
        if layer._parameters.get("weight") is None:
            return "one of them is frozen"
        if layer.activation is not None:
            return f"one of them has an activation, {layer.activation.name}"
        if layer._precision.fallback:
            return "each may fall back to its own format"
        if (reason := _why_apart(layer, first, layer.dtypes == first.dtypes and len(biases) <= 1)) is not None:
            return reason
    return None


def why_not_frozen_group(layers: Sequence[Any]) -> str | None:
    """Why frozen layers, each on its own pack, cannot answer in one call; None if they can."""
    if not 2 <= len(layers) <= _siblings.MAX_FROZEN:
        return f"there are {len(layers)}"
    first = layers[0]
    for layer in layers:
        frozen = record_of(layer)
        if frozen is None:
            return "one of them is not frozen"
        if layer._gated:
            return "one of them is a gate"
        if (reason := _why_apart(layer, first, frozen.packed.layout == first._frozen.packed.layout)) is not None:
            return reason
        if not is_same(frozen.packed.order, first._frozen.packed.order):
            return "they take their inputs in different orders"
    return None


def _why_apart(layer: Any, first: Any, is_alike: bool) -> str | None:
    """Why two layers cannot answer in one call, however they are packed. is_alike: whether their dtypes, or layouts,
    are the same."""
    if layer._shard is not None:
        return "several processes share their weights"
    if layer.in_features != first.in_features:
        return f"they take {first.in_features} and {layer.in_features} features"
    return None if is_alike and layer.precision.is_as(first.precision) else "they differ in precision"


def _side_by_side(biases: Parameters, widths: Sequence[int]) -> Tensor | None:
    """One bias for all, zeros for those that have none; None where none has one."""
    dtype = next((bias.dtype for bias in biases if bias is not None), None)
    if dtype is None:
        return None
    zeros = (torch.zeros(width, dtype=dtype, device="cpu") for width in widths)
    return torch.cat([zero if bias is None else bias.detach() for bias, zero in zip(biases, zeros, strict=True)])
