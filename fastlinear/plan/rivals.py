"""torch's own ways to run a linear layer, as plans beside the kernels of the table."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor

from fastlinear.spec import programs
from fastlinear.spec.activations import Activation

BASELINE = "torch/linear"


# A weight as MKL and oneDNN pack it, by the way's name: one for all numbers of rows.
Packs: TypeAlias = dict[str, Tensor]


class Rival(NamedTuple):
    """(x, weight as the module holds it, bias, *operands) -> y, and the packed weight it holds, if it holds one. What
    the activation is applied to is appended to a list that is given as `kept`."""

    run: Callable[..., Tensor]
    packed: Tensor | None = None


# (x, weight as the module holds it, bias) -> x W^T + b, and the weight as it is packed for that.
_Sums: TypeAlias = tuple[Callable[[Tensor, Tensor, Tensor | None], Tensor], Tensor | None]


_ROWS = 32  # that MKL and oneDNN are told to pack for; what that makes of other numbers of rows, the tuner sees


def _linear(weight: Tensor, transposed: bool, packs: Packs) -> _Sums:
    def sums(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return programs.linear(x, weight.t() if transposed else weight, bias, None)

    return sums, None


def _mkl(weight: Tensor, transposed: bool, packs: Packs) -> _Sums:
    """MKL's prepacked sgemm. Its packs do not depend on M, as little as those of IPEX, which packs once for all; torch
    asks whether a call's rows are as many as it is told the pack was made for, and else uses `dense`."""
    linear = torch.ops.mkl._mkl_linear.default
    if "torch/mkl" not in packs:
        dense = weight.t() if transposed else weight
        packs["torch/mkl"] = torch.ops.mkl._mkl_reorder_linear_weight(dense.contiguous(), _ROWS)
    packed = packs["torch/mkl"]

    def sums(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:  # of the caller's: a plan holds no weight
        dense = weight.t() if transposed else weight
        return linear(x, packed, dense, bias, x.numel() // x.shape[-1])  # type: ignore[no-any-return]

    return sums, packed


def _mkldnn(weight: Tensor, transposed: bool, packs: Packs) -> _Sums:
    """oneDNN's prepacked inner product, which packs anew in a call whose rows want another form."""
    linear = torch.ops.mkldnn._linear_pointwise.default
    if "torch/mkldnn" not in packs:
        dense = weight.t().contiguous() if transposed else weight
        packs["torch/mkldnn"] = torch.ops.mkldnn._reorder_linear_weight(dense, _ROWS)
    packed = packs["torch/mkldnn"]

    def sums(x: Tensor, _: Tensor, bias: Tensor | None) -> Tensor:
        return linear(x, packed, bias, "none", [], "")  # type: ignore[no-any-return]

    return sums, packed


_MAKERS: dict[str, Callable[[Tensor, bool, Packs], _Sums]] = {
    BASELINE: _linear,
    "torch/mkl": _mkl,
    "torch/mkldnn": _mkldnn,
}
NAMES = tuple(_MAKERS)
# Ours, ours in products of bf16, and torch's, between which plan/attention.py decides.
ATTENTION = ("attention/fastlinear", "attention/fastlinear in bf16", "torch/attention")


def make(name: str, weight: Tensor, transposed: bool, activation: Activation | None, packs: Packs) -> Rival:
    """The way `name`. weight: as the module holds it, [n, k], or [k, n] if transposed; packs: of that weight, to take
    one from or put one into.

    Raises AttributeError or RuntimeError where this torch lacks the operator, or it refuses the shape.
    """
    sums, packed = _MAKERS[name](weight, transposed, packs)

    def run(
        x: Tensor, weight: Tensor, bias: Tensor | None, *operands: Tensor, kept: list[Tensor] | None = None
    ) -> Tensor:
        z = sums(x, weight, bias)
        if kept is not None:
            kept.append(z)
        return programs.apply(activation, z, operands)

    return Rival(run, packed)


def memory(tensor: Tensor) -> tuple[int, int]:
    """Address and bytes of a dense tensor, expanded ones included, or of a weight that MKL or oneDNN packed."""
    if tensor.layout is torch.strided:
        storage = tensor.untyped_storage()
        end = storage.data_ptr() + storage.nbytes()
        return tensor.data_ptr(), min(tensor.nbytes, end - tensor.data_ptr())
    return torch.ops.mkldnn.data_ptr(tensor), torch.ops.mkldnn._nbytes(tensor)
