"""torch's own ways to run a linear layer, as plans beside the kernels of the table."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from fastlinear import activations
from fastlinear.activations import Activation

BASELINE = "torch/linear"


class TorchPlan(NamedTuple):
    """(x, weight as the module holds it, bias) -> y, and the packed weight it holds, if it holds one."""

    run: Callable[[Tensor, Tensor, Tensor | None], Tensor]
    packed: Tensor | None = None


def _linear(weight: Tensor, transposed: bool, activation: Activation | None, m: int) -> TorchPlan:
    def run(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return activations.linear(x, weight.t() if transposed else weight, bias, activation)

    return TorchPlan(run)


def _mkl(weight: Tensor, transposed: bool, activation: Activation | None, m: int) -> TorchPlan:
    """MKL's prepacked sgemm. The pack is for m rows; other numbers fall back to plain sgemm inside the op."""
    dense = weight.t().contiguous() if transposed else weight
    packed = torch.ops.mkl._mkl_reorder_linear_weight(dense, m)
    linear = torch.ops.mkl._mkl_linear.default

    def run(x: Tensor, _: Tensor, bias: Tensor | None) -> Tensor:
        return activations.apply(activation, linear(x, packed, dense, bias, x.numel() // x.shape[-1]))

    return TorchPlan(run, packed)


def _mkldnn(weight: Tensor, transposed: bool, activation: Activation | None, m: int) -> TorchPlan:
    """oneDNN's prepacked inner product."""
    dense = weight.t().contiguous() if transposed else weight
    packed = torch.ops.mkldnn._reorder_linear_weight(dense, m)
    linear = torch.ops.mkldnn._linear_pointwise.default

    def run(x: Tensor, _: Tensor, bias: Tensor | None) -> Tensor:
        return activations.apply(activation, linear(x, packed, bias, "none", [], ""))

    return TorchPlan(run, packed)


_MAKERS: dict[str, Callable[[Tensor, bool, Activation | None, int], TorchPlan]] = {
    BASELINE: _linear,
    "torch/mkl": _mkl,
    "torch/mkldnn": _mkldnn,
}
NAMES = tuple(_MAKERS)


def make(name: str, weight: Tensor, transposed: bool, activation: Activation | None, m: int) -> TorchPlan:
    """The way `name` for about m rows. weight: as the module holds it, [n, k], or [k, n] if transposed.

    Raises AttributeError or RuntimeError where this torch lacks the operator, or it refuses the shape.
    """
    return _MAKERS[name](weight, transposed, activation, m)


def memory(tensor: Tensor) -> tuple[int, int]:
    """Address and bytes of a dense tensor, expanded ones included, or of a weight that MKL or oneDNN packed."""
    if tensor.layout is torch.strided:
        storage = tensor.untyped_storage()
        end = storage.data_ptr() + storage.nbytes()
        return tensor.data_ptr(), min(tensor.nbytes, end - tensor.data_ptr())
    # MKL's pack counts its bytes as floats; what lies beyond a fourth was never written.
    return torch.ops.mkldnn.data_ptr(tensor), torch.ops.mkldnn._nbytes(tensor) // (4 if tensor.shape[-1] == 1 else 1)
