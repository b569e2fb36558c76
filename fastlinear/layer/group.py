"""FastLinearGroup: the layers that read one input, such as the query, key and value of attention, as one product."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from fastlinear._siblings import Siblings, quicken_group
from fastlinear.layer.linear import FastLinear, is_fast
from fastlinear.layer.stack import Stack
from fastlinear.spec.schemes import Scheme


class FastLinearGroup(nn.Module):
    """Several linear layers on one input, computed as one product: group(x) is (layers[0](x), layers[1](x), ...).

    layers: nn.Linear modules, which become FastLinears over the same parameters, or fast layers, which stay as they
        are; all of one input width, of any output widths, in one dtype, without activations.
    dtype, accumulate, quantize, products: as in `FastLinear.from_linear`, for layers that are not fast yet.

    x: [..., in_features]; each output is a contiguous tensor [..., out_features of its layer]. The weights are packed
    together, once; x is read, and quantized, once for all. In training, with gradients, under other modes and for
    other devices each layer answers for itself. State dict: that of the layers, as "layers.0.weight" ...
    Raises TypeError for what is no linear layer, ValueError for layers that cannot be one product.
    """

    layers: nn.ModuleList
    _stack: Stack
    _siblings: Siblings  # where the engine finds the stack's hot path

    def __init__(
        self,
        layers: Iterable[nn.Linear],
        *,
        dtype: torch.dtype | None = None,
        accumulate: str = "fp32",
        quantize: Scheme | None = None,
        products: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        given = list(layers)
        for layer in given:
            if not isinstance(layer, nn.Linear):
                raise TypeError(f"FastLinearGroup takes nn.Linear modules, but was given {type(layer).__name__}")
        wish: dict[str, Any] = {"dtype": dtype, "accumulate": accumulate, "quantize": quantize, "products": products}
        fast = [layer if is_fast(layer) else FastLinear.from_linear(layer, **wish) for layer in given]
        self.layers = nn.ModuleList(fast)
        self.train(any(layer.training for layer in given))
        self._look_at(fast)

    def _look_at(self, layers: list[Any]) -> None:
        stack = Stack(layers)
        vars(self).update(_stack=stack, _siblings=stack.siblings)

    def forward(self, input: Tensor) -> tuple[Tensor, ...]:
        if not torch.compiler.is_dynamo_compiling():
            if type(self) is FastLinearGroup:
                quicken_group(FastLinearGroup)  # a patch of nn.Module.__call__ that is gone has ended that
            parameters = None if self.training or not self._siblings.are_in(self) else self._siblings.parameters()
            ys: tuple[Tensor, ...] | None = None if parameters is None else self._stack(input, parameters)
            if ys is not None:
                return ys
        return tuple(layer(input) for layer in self.layers)

    def __getstate__(self) -> dict[str, Any]:
        return {key: value for key, value in vars(self).items() if key not in ("_stack", "_siblings")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self._look_at([*self.layers])


quicken_group(FastLinearGroup)
