"""FastGatedLinear: the two linear layers and the gate of a gated MLP (SwiGLU, GeGLU, ReGLU) as one product."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from fastlinear.layer.frozen import is_frozen
from fastlinear.layer.linear import FastLinear
from fastlinear.spec import activations, programs
from fastlinear.spec.activations import Activation

_OF_ACTIVATION = {activation: gate for gate, activation in programs.GATES.items()}


class FastGatedLinear(FastLinear):
    """y = activation(x Wg^T + bg) * (x Wu^T + bu), the first half of a gated MLP (Shazeer 2020, arXiv:2002.05202).

    activation: "silu" (SwiGLU), if none is given, "gelu" or "gelu_tanh" (GeGLU), "relu" (ReGLU), "relu2",
        "sigmoid" (GLU).
    Input [..., in_features], output [..., out_features]. `weight` is [2 * out_features, in_features], the gate's rows
    first, and so is `bias`: that of one linear layer whose output is cut by chunk(2, -1). A pack has the channels in
    turns, so that a tile holds a gate and what it lets through, and half as many columns are written. All else is as in
    FastLinear. Raises ValueError for an activation that is no gate.
    """

    @staticmethod
    def _rows(out_features: int) -> int:
        return 2 * out_features

    @staticmethod
    def _resolve(activation: object, epilogue: object) -> Activation | None:
        gate = _OF_ACTIVATION.get(activations.resolve("silu" if activation is None else activation))  # type: ignore[arg-type]
        if gate is None or epilogue != ():
            allowed = ", ".join(each.name for each in _OF_ACTIVATION)
            given = f"activation={activation!r}" if gate is None else f"epilogue={epilogue!r}"
            raise ValueError(f"FastGatedLinear takes one of {allowed} as its activation, but was given {given}")
        return Activation(gate)

    @classmethod
    def from_linears(
        cls, gate: nn.Linear, up: nn.Linear, activation: object = "silu", **options: Any
    ) -> FastGatedLinear:
        """activation(gate(x)) * up(x), of a copy of their parameters; the options are those of `from_linear`, which
        takes one layer that has both, and shares its parameters. Raises TypeError or ValueError for layers that differ
        in shape or dtype, have no linear weight, or one of which alone has a bias.
        """
        for layer in (gate, up):
            if not isinstance(layer, nn.Linear) or is_frozen(layer):
                what = "a frozen layer" if isinstance(layer, nn.Linear) else type(layer).__name__
                raise TypeError(f"FastGatedLinear is made of nn.Linear modules, but was given {what}")
        shapes = [
            (layer.in_features, layer.out_features, layer.weight.dtype, layer.bias is None) for layer in (gate, up)
        ]
        if shapes[0] != shapes[1]:
            told = " and ".join(f"{k} x {n} in {t}, {'without' if b else 'with'} bias" for k, n, t, b in shapes)
            raise ValueError(f"gate and up must be alike, but are {told}")
        with torch.no_grad():
            both = nn.Linear(gate.in_features, 2 * gate.out_features, gate.bias is not None, "meta", gate.weight.dtype)
            for name, own in list(both._parameters.items()):
                if own is not None:
                    parts = [getattr(layer, name) for layer in (gate, up)]
                    setattr(both, name, nn.Parameter(torch.cat(parts), any(part.requires_grad for part in parts)))
        both.train(gate.training)
        fast = cls.from_linear(both, activation, **options)
        assert isinstance(fast, cls)
        return fast
