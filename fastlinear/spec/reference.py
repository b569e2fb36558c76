"""What a fast layer computes in eval mode, told in torch's own ops, for whatever cannot run the kernels.

y = program(x^ W^T + b), the program being the layer's activation or its epilogue's steps. x^ and W^ are the numbers
that the kernels multiply: the weight rounded to the format it is packed in, x rounded where the layer rounds it,
quantized and back again where it quantizes it. Sums are of fp32 (of fp64 for an fp64 x), as are bias and program, and y
is rounded once; so it differs from what the kernels answer by the rounding of fp32 sums.

All of it can be traced, exported, batched and differentiated, in both directions. Rounding is differentiated straight
through (Bengio et al. 2013, arXiv:1308.3432): dx goes through W^, dW through x^, as if both were not rounded.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad

import fastlinear._tensors as _tensors
from fastlinear.spec import gates, grouping, int4, programs
from fastlinear.spec.activations import Activation
from fastlinear.spec.formats import DTYPES, FP32
from fastlinear.spec.int8 import BYTES, dequantize_rows, handed_on, quantize_channels, quantize_rows, requantize
from fastlinear.spec.precision import Precision


class Reference(NamedTuple):
    """One layer's computation, of tensors that come with each call.

    What is called `weight` here is what stands for it in the op: the Parameter, [N, K], or [K, N] if `transposed`; or
    the packed bytes of a frozen one, with `panels`: layout, N and K, else "", 0 and 0.
    """

    activation: Activation | None
    precision: Precision
    transposed: bool
    panels: tuple[str, int, int] = ("", 0, 0)

    def linear(self, x: Tensor, weight: Tensor, bias: Tensor | None, operands: Sequence[Tensor] = ()) -> Tensor:
        """y [..., N], in the dtype of x, or fp32 where x is integers; integers where the layer hands on such."""
        return self.finish(self.sums(x, weight, bias), x.dtype, operands)

    def floats(self, x: Tensor, weight: Tensor, bias: Tensor | None, operands: Sequence[Tensor] = ()) -> Tensor:
        """The same, but where the layer hands on integers the numbers that they stand for, which have derivatives."""
        out = self.precision.out
        if out is None:
            return self.linear(x, weight, bias, operands)
        y = programs.apply(self.activation, self.sums(x, weight, bias), operands).float()
        return _straight_through(handed_on(requantize(y.detach(), out), out), y)

    def finish(self, sums: Tensor, dtype: torch.dtype, operands: Sequence[Tensor] = ()) -> Tensor:
        """y, of the sums for an x of `dtype`."""
        y = programs.apply(self.activation, sums, operands)
        if self.precision.out is not None:
            return requantize(y.float(), self.precision.out)
        return y if dtype in BYTES else _as(y, dtype)

    def sums(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """What the activation is applied to, in fp32 or fp64."""
        wide = width(x)
        return F.linear(self.rows(x), _as(self.weight(weight), wide), None if bias is None else _as(bias, wide))

    def rows(self, x: Tensor) -> Tensor:
        """x^ [..., K], in fp32 or fp64."""
        rows, wide = self.precision.rows, width(x)
        if rows is None and self.precision.products == FP32:
            return _as(x, wide)
        if rows is None:
            return _straight_through(_as(x.detach().to(DTYPES[self.precision.products]), wide), _as(x, wide))
        if (coding := self.precision.coding) is not None:
            u, scale = int4.quantize_rows(x.detach(), coding.group, rows.kind)
            return _straight_through(_as(int4.dequantize_rows(u, scale, coding.group), wide), _as(x, wide))
        rounded = _as(dequantize_rows(*quantize_rows(x.detach(), rows)), wide)
        if x.dtype in BYTES:
            return rounded
        return _straight_through(rounded, _as(x, wide) if rows.smooth is None else _as(x, wide) * rows.smooth)

    def weight(self, weight: Tensor) -> Tensor:
        """W^ [..., N, K], of a batch of weights, too; a smoothed layer's is for the smoothed x."""
        packed, smooth = self.precision.packed, self.precision.smooth
        layout = self.panels[0]
        w: Tensor = weight
        if layout:
            w = torch.ops.fastlinear.unpack.default(weight, *self.panels)
            w = gates.separate(w, layout) if programs.is_gated(self.activation) else w
        elif self.transposed:
            w = weight.mT
        if layout and layout.split("/")[0] not in DTYPES:  # integers already
            return w
        wide = width(w)
        if packed in DTYPES:
            dtype = DTYPES[packed]
            return w if w.dtype is dtype else _straight_through(_as(w.detach().to(dtype), wide), _as(w, wide))
        if (coding := self.precision.coding) is not None:
            codes, of_groups, *offset = grouping.quantize_channels(w.detach(), coding)
            table = grouping.table_of(coding, w) if coding.table else None
            stands_for = int4.dequantize(int4.Coded(codes, of_groups, table, coding.group, *offset))
            return _straight_through(_as(stands_for, wide), _as(w, wide))
        if packed not in _tensors.PACKED:  # it is used as it is held
            return w
        values, scale = quantize_channels(w.detach(), smooth)
        w = _as(w, wide) if smooth is None else _as(w, wide) / smooth
        return _straight_through(_as(scale[..., None] * values.float(), wide), w)


def width(x: Tensor) -> torch.dtype:
    """What sums of x are made in."""
    return torch.float64 if x.dtype is torch.float64 else torch.float32


def _as(t: Tensor, dtype: torch.dtype) -> Tensor:
    return t if t.dtype is dtype else t.to(dtype)


def _straight_through(value: Tensor, source: Tensor) -> Tensor:
    """`value` exactly, with the derivative of `source`; 0 where that is no number."""
    # torch.jit.trace traces a second time without gradients, and wants the same graph.
    tracing = torch.jit.is_tracing()  # type: ignore[attr-defined,no-untyped-call]
    if not (torch.is_grad_enabled() or tracing or forward_ad._current_level >= 0):
        return value
    return value + torch.where(source.isfinite(), source - source.detach(), 0.0)
