"""Several linear layers on one input as one product: their weights are packed one behind the other.

x is then read, converted or quantized once for all of them, and one kernel call has columns enough for every thread.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor

import fastlinear._engine as _engine
import fastlinear._weights as _weights
from fastlinear._engine import Engine, Fingerprint
from fastlinear.layer.fitness import why_unread
from fastlinear.layer.frozen import Frozen, hold
from fastlinear.layer.linear import FastLinear, is_fast
from fastlinear.layer.lock import lock
from fastlinear.layer.packs import pack
from fastlinear.spec.precision import Precision

Parameters: TypeAlias = tuple[Tensor | None, ...]  # the layers' weights, and then their biases


class Stack:
    """The fast layers `layers`, all of one input width, precision and dtype, packed as one weight.

    The pack is made at the first call, and again when a parameter has changed; like a layer's, not at once where that
    happens all the time. `tune` and `name` are as for a layer. Raises ValueError for what cannot be one product.
    """

    def __init__(self, layers: Sequence[Any], tune: str = "lazy", name: str = "") -> None:
        reason = why_not_together(layers)
        if reason is not None:
            raise ValueError(f"the layers {name or 'of a group'} cannot be one product: {reason}")
        self.layers = tuple(layers)
        self.widths = tuple(layer.out_features for layer in layers)
        self.whole = _Whole(layers, self.widths, tune, name)
        # Of the parameters that are packed, or that are left to torch for some more calls: see Engine.
        self._known: tuple[Fingerprint | None, ...] = (None,)
        self._answered, self._waits = _engine.trial, 0

    def __call__(self, x: Tensor, parameters: Parameters) -> tuple[Tensor, ...] | None:
        """The outputs, each contiguous; None where the layers have to answer one by one.

        For callers that know that no gradients of the parameters are wanted.
        """
        if not (_engine.all_fit(self._known, parameters) and not self._waits) and not self._pack(parameters):
            return None
        self._answered += 1
        ys: Any = self.whole._engine.forward(self.whole, x)
        return ys  # type: ignore[no-any-return]

    def _pack(self, parameters: Parameters) -> bool:
        """Packs the parameters as they are now; False where the last ones did not last, until these have."""
        with lock:
            if _engine.watched() or why_not_together(self.layers) is not None:
                return False
            known = tuple(None if p is None else Fingerprint(p) for p in parameters)
            if self._waits and _engine.all_fit(self._known, parameters):
                self._waits -= 1
            else:
                self._waits = _engine.trial if self._answered < _engine.trial else 0
            self._answered, self._known = 0, known if self._waits else (None,)  # not fresh until all the rest is set
            if self._waits:
                return False
            half = len(parameters) // 2
            weights = [weight.detach() for weight in parameters[:half] if weight is not None]
            rows = [w.t() if layer._transposed else w for w, layer in zip(weights, self.layers, strict=True)]
            packed = pack(torch.cat(rows), self.layers[0].precision)
            self.whole.hold(packed, weights[0].dtype, _side_by_side(parameters[half:], self.widths))
            self._known = known
        return True


class _Whole(FastLinear):
    """The product of a stack: a frozen layer with several outputs, which answers natively or, with None, not at all."""

    _widths: tuple[int, ...] = ()

    def __init__(self, layers: Sequence[Any], widths: tuple[int, ...], tune: str, name: str) -> None:
        super().__init__(layers[0].in_features, sum(widths), bias=False, device="meta")
        vars(self)["_widths"] = widths
        vars(self).update(_precision=layers[0]._precision, _tune=tune, _name=name, training=False)

    def hold(self, packed: _weights.Packed, dtype: torch.dtype, bias: Tensor | None) -> None:
        hold(self, Frozen(packed, dtype))
        self._parameters["bias"] = bias  # type: ignore[assignment]

    def _new_engine(self, precision: Precision, bare: bool = False) -> Engine:
        engine = super()._new_engine(precision, bare)
        engine.split(self._widths)
        return engine

    def _slow(self, x: Tensor, why: str, bare: bool = False, operands: tuple[Tensor, ...] = ()) -> Any:
        return self._native(x, self.packed_as) if why in (_engine.STALE, _engine.UNPLANNED) else None


def why_not_together(layers: Sequence[Any]) -> str | None:
    """Why these modules cannot be one product, in a few words; None if they can."""
    if len(layers) < 2:
        return "there are fewer than two"
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
        if layer.in_features != first.in_features:
            return f"they take {first.in_features} and {layer.in_features} features"
        if not layer.precision.is_as(first.precision) or layer.dtypes != first.dtypes or len(biases) > 1:
            return "they differ in precision"
    return None


def _side_by_side(biases: Parameters, widths: Sequence[int]) -> Tensor | None:
    """One bias for all, zeros for those that have none; None where none has one."""
    dtype = next((bias.dtype for bias in biases if bias is not None), None)
    if dtype is None:
        return None
    zeros = (torch.zeros(width, dtype=dtype, device="cpu") for width in widths)
    return torch.cat([zero if bias is None else bias.detach() for bias, zero in zip(biases, zeros, strict=True)])
