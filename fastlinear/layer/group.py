"""FastLinearGroup: the layers that read one input, such as the query, key and value of attention, as one product."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn, split_with_sizes

from fastlinear.layer.linear import FastLinear, is_fast
from fastlinear.layer.stack import Stack, parameters_of
from fastlinear.spec.schemes import Scheme


class FastLinearGroup(nn.Module):
    """Several linear layers on one input, computed as one product: group(x) is (layers[0](x), layers[1](x), ...).

    layers: nn.Linear modules, which become FastLinears over the same parameters, or fast layers, which stay as they
        are; all of one input width, of any output widths, in one dtype, without activations.
    dtype, accumulate, quantize: as in `FastLinear.from_linear`, for layers that are not fast yet.

    x: [..., in_features]; each output is a contiguous tensor [..., out_features of its layer]. The weights are packed
    together, once; x is read, and quantised, once for all. In training, with gradients, under other modes and for
    other devices each layer answers for itself. State dict: that of the layers, as "layers.0.weight" ...
    Raises TypeError for what is no linear layer, ValueError for layers that cannot be one product.
    """

    layers: nn.ModuleList

    def __init__(
        self,
        layers: Iterable[nn.Linear],
        *,
        dtype: torch.dtype | None = None,
        accumulate: str = "fp32",
        quantize: Scheme | None = None,
    ) -> None:
        super().__init__()
        given = list(layers)
        for layer in given:
            if not isinstance(layer, nn.Linear):
                raise TypeError(f"FastLinearGroup takes nn.Linear modules, but was given {type(layer).__name__}")
        wish: dict[str, Any] = {"dtype": dtype, "accumulate": accumulate, "quantize": quantize}
        fast = [layer if is_fast(layer) else FastLinear.from_linear(layer, **wish) for layer in given]
        self.layers = nn.ModuleList(fast)
        self.train(any(layer.training for layer in given))
        vars(self)["_stack"] = Stack(fast)

    def forward(self, input: Tensor) -> tuple[Tensor, ...]:
        y = None if torch.compiler.is_dynamo_compiling() or not self._may_stack() else self._stacked(input)
        return tuple(layer(input) for layer in self.layers) if y is None else y

    def _may_stack(self) -> bool:
        """Whether no gradient of a parameter is wanted, and nobody watches a layer's calls."""
        if self.training or (torch.is_grad_enabled() and any(p.requires_grad for p in self.parameters())):
            return False
        return not any(layer._forward_hooks or layer._forward_pre_hooks or layer.training for layer in self.layers)

    def _stacked(self, input: Tensor) -> tuple[Tensor, ...] | None:
        stack: Stack = vars(self)["_stack"]
        y = stack(input, parameters_of(stack.layers))
        return None if y is None else tuple(part.contiguous() for part in split_with_sizes(y, stack.widths, -1))

    def __getstate__(self) -> dict[str, Any]:
        return {key: value for key, value in vars(self).items() if key != "_stack"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        vars(self)["_stack"] = Stack([*self.layers])
