"""What int8 means here, in plain torch: the specification that the kernels follow bit for bit.

A weight is W = scale * (q - zero), with int8 q [N, K] and one scale and zero point a channel. Rows of x are quantized
to uint8, x ~ scale * (u - zero), with one scale and zero point a row. Then

    y = (float(sum_k (u - zero_x)(q - zero_w)) * scale_w) * scale_x

where the sum is exact, and each product, like each step below that is not of integers, is rounded once to fp32 (to
nearest, ties to even). Bias, activation and the rounding to the output's dtype follow. Nothing
here is meant for speed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

TINY = 2.0**-126  # of a smaller scale the reciprocal may be infinite: such a row or channel counts as zeros
KINDS = ("symmetric", "asymmetric", "static")
BYTES = (torch.uint8, torch.int8)
BLOCK = 1 << 18  # so many numbers of a weight are looked at at a time: what is computed on the way stays in cache


@dataclass(frozen=True, eq=False)
class Quantized:
    """An int8 weight, ours or somebody else's: W = scale * (values - zero).

    values: int8 [N, K]; scale: fp32 [N], finite and not negative; zero: int32 [N] from -128 to 127, or None for zeros.
    Raises ValueError for anything else.
    """

    values: Tensor
    scale: Tensor
    zero: Tensor | None = None

    def __post_init__(self) -> None:
        n = self.values.shape[0] if self.values.dim() == 2 else None
        _check_tensor("values", self.values, torch.int8, "[n, k]", n is not None)
        _check_tensor("scale", self.scale, torch.float32, f"[{n}]", self.scale.shape == (n,))
        if self.zero is not None:
            _check_tensor("zero", self.zero, torch.int32, f"[{n}]", self.zero.shape == (n,))
        if not is_scale(self.scale):
            raise ValueError("the scale of an int8 weight must be finite and not negative in every channel")
        if self.zero is not None and not is_zero(self.zero):
            raise ValueError("the zero of an int8 weight must be from -128 to 127 in every channel")


def is_scale(scale: Tensor) -> bool:
    """Whether all of it can scale a channel."""
    return bool((scale.isfinite() & (scale >= 0)).all())


def is_zero(zero: Tensor) -> bool:
    """Whether all of it can be the zero point of a channel."""
    return bool(((zero >= -128) & (zero <= 127)).all())


class Rows(NamedTuple):
    """How rows of x are quantized.

    kind: "symmetric" or "asymmetric", by each row's own range; or "static", by `scale` (from 2^-126 on, finite) and
        `zero` (0 to 255, of uint8), which the other kinds leave unread. smooth: fp32 [K] that x is multiplied by first.
    """

    kind: str = "symmetric"
    scale: float = 0.0
    zero: int = 0
    smooth: Tensor | None = None


class Requantize(NamedTuple):
    """An integer output: dtype torch.uint8 or torch.int8; y ~ scale * (u - zero), int8 being u - 128."""

    dtype: torch.dtype
    scale: float
    zero: int


def longest(zero: Tensor | None) -> int:
    """The largest K for which no sum of K products can overflow an int32."""
    return (2**31 - 1) // (255 * (128 if zero is None else 255))


def check_length(weight: Quantized) -> None:
    """ValueError where sums of so many products may overflow; weight-only layers sum in fp32 and have no limit."""
    k, most = weight.values.shape[1], longest(weight.zero)
    if k > most:
        with_zero = "without" if weight.zero is None else "with"
        raise ValueError(f"an int8 weight {with_zero} zero points may have at most {most} columns, but has {k}")


def quantize_weight(weight: Tensor, smooth: Tensor | None = None) -> Quantized:
    """A floating-point weight [N, K] as int8, symmetric, with one scale a channel: max |w| becomes 127.

    smooth: what x [..., K] will be multiplied by, so that each column of the weight is divided by it first.
    Raises ValueError for infinities and NaN.
    """
    w = weight.detach()
    blocks = [quantize_channels(block, smooth) for block in _blocks(w)]
    values, scale = map(torch.cat, zip(*blocks, strict=True))
    if not bool(scale.isfinite().all()):
        w = w.float() if smooth is None else w.float() / smooth
        row, column = (~w.isfinite()).nonzero()[0].tolist()
        raise ValueError(f"a weight with {w[row, column].item()} (at [{row}, {column}]) cannot be quantized to int8")
    return Quantized(values, scale)


def quantize_channels(weight: Tensor, smooth: Tensor | None) -> tuple[Tensor, Tensor]:
    """The values int8 [..., N, K] and the scale fp32 [..., N] of `quantize_weight`, unchecked; traceable."""
    w = weight.float() if smooth is None else weight.float() / smooth
    scale = _amax(w) / 127
    scale = torch.where(scale < TINY, 0.0, scale)
    values = torch.where(scale[..., None] > 0, torch.round(w / scale[..., None]).clamp(-127, 127), 0.0)
    return values.to(torch.int8), scale


def dequantize(weight: Quantized) -> Tensor:
    """The weight [N, K] that this stands for, in fp32."""
    return weight.scale[:, None] * _centered(weight).float()


def quantize_rows(x: Tensor, rows: Rows) -> tuple[Tensor, Tensor, Tensor]:
    """Rows of x [..., K], in fp32, bf16 or fp16, as (u uint8 [..., K], scale fp32 [...], zero int32 [...]); traceable.

    A row whose scale would be below 2^-126 has scale 0 and u = zero. Where a row cannot be quantized, for an infinity
    or a NaN in it (static: a NaN; infinities saturate), its scale is NaN and u = zero, so that all of its y is NaN.
    Static rows may be integers already: uint8 is u itself and int8 is u - 128.
    """
    if rows.kind not in KINDS:
        raise ValueError(f"rows are quantized {' or '.join(KINDS)}, not {rows.kind!r}")
    if x.dtype in BYTES:
        u = x if x.dtype is torch.uint8 else (x.int() + 128).to(torch.uint8)
        return u, _all(x, rows.scale), _all(x, rows.zero).int()
    x = x.float() if rows.smooth is None else x.float() * rows.smooth
    if rows.kind == "static":
        scale = torch.where(x.isnan().any(-1), math.nan, _all(x, rows.scale))
        zero = _all(x, rows.zero)
    elif rows.kind == "symmetric":
        scale, zero = _amax(x) / 127, _all(x, 128)
    else:
        scale, zero = asymmetric(_most(x, torch.amin).clamp(max=0.0), _most(x, torch.amax).clamp(min=0.0))
    whole = (scale >= TINY) & scale.isfinite()
    scale = torch.where(whole | (scale < TINY), torch.where(whole, scale, 0.0), math.nan)
    zeros = zero[..., None]
    low, high = (-127, 127) if rows.kind == "symmetric" else (-zeros, 255 - zeros)
    u = torch.where(whole[..., None], _steps(x * scale.reciprocal()[..., None], low, high), 0.0) + zeros
    return u.to(torch.uint8), scale, zero.int()


def dequantize_rows(u: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
    """The rows [..., K] that the result of `quantize_rows` stands for, in fp32."""
    return scale[..., None] * (u.float() - zero[..., None].float())


def asymmetric(low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
    """(scale, zero), both fp32, that take fp32 low <= 0 to 0 and high >= 0 to 255; zero is 0 for a scale below 2^-126
    and one that is not finite."""
    scale = high / 255 - low / 255
    zero = _steps(-low * scale.reciprocal(), 0.0, 255.0)
    return scale, torch.where((scale >= TINY) & scale.isfinite(), zero, 0.0)


def linear(
    x: Tensor,
    weight: Quantized,
    rows: Rows | None,
    bias: Tensor | None = None,
    activation: Callable[[Tensor], Tensor] | None = None,
    out: torch.dtype | Requantize | None = None,
) -> Tensor:
    """activation(x [..., K] @ W.T + bias [N]) for an int8 weight [N, K].

    rows: how x is quantized. None is weight-only: x stays as it is, and fp32 sums of x * (q - zero) are multiplied by
        the scale; of those, unlike of all else here, the last bits depend on the order of summation.
    out: the dtype of the result; by default that of x, or fp32 where x is integers.
    """
    flat = x.reshape(x.shape[:-1].numel(), x.shape[-1])
    if rows is None:
        y = (flat.float() @ _centered(weight).float().t()) * weight.scale
    else:
        u, scale, zero = quantize_rows(flat, rows)
        y = (products(u, zero, weight).float() * weight.scale) * scale[:, None]
    y = y if bias is None else y + bias.float()
    y = (y if activation is None else activation(y)).reshape(*x.shape[:-1], weight.values.shape[0])
    if isinstance(out, Requantize):
        return requantize(y, out)
    return y.to(out or (torch.float32 if x.dtype in BYTES else x.dtype))


def products(u: Tensor, zero: Tensor, weight: Quantized) -> Tensor:
    """sum_k (u[m, k] - zero[m]) * (q[n, k] - zero_w[n]), exactly, as int32 [M, N]."""
    check_length(weight)
    centered = u.double() - zero[:, None].double()
    return (centered @ _centered(weight).double().t()).int()  # integers below 2^53 are exact in fp64 in any order


def requantize(y: Tensor, out: Requantize) -> Tensor:
    """fp32 y as integers; NaN becomes the lowest value."""
    inverse = y.new_full((), out.scale, dtype=torch.float32).reciprocal()
    steps = _steps(torch.where(y.isnan(), -math.inf, y * inverse), -out.zero, 255 - out.zero)
    integers: Tensor = steps + out.zero - (0 if out.dtype is torch.uint8 else 128)
    return integers.to(out.dtype)


def handed_on(integers: Tensor, out: Requantize) -> Tensor:
    """What the result of `requantize` stands for, in fp32; the layer that reads it makes the same integers of it."""
    return (integers.float() - (out.zero - (0 if out.dtype is torch.uint8 else 128))) * out.scale


def signal_to_noise(exact: Tensor, approximate: Tensor) -> float:
    """10 log10 (sum exact^2 / sum (exact - approximate)^2) in dB, in fp64; infinite where the two are equal."""
    return _decibels(zip(_blocks(exact), _blocks(approximate), strict=True))


def weight_snr(weight: Tensor, quantized: Quantized, smooth: Tensor | None = None) -> float:
    """Signal to noise of a quantized weight in dB, against the weight (divided by `smooth`) that was quantized."""
    exact = (w.double() if smooth is None else w.double() / smooth for w in _blocks(weight.detach()))
    values = _blocks(quantized.values)
    counts = [len(each) for each in values]
    zeros = [None] * len(counts) if quantized.zero is None else quantized.zero.split(counts)
    parts = map(Quantized, values, quantized.scale.split(counts), zeros)
    return _decibels(zip(exact, map(dequantize, parts), strict=True))


def _blocks(matrix: Tensor) -> Sequence[Tensor]:
    """Rows of so few numbers that what is computed of them takes no memory beside a large weight."""
    blocks: Sequence[Tensor] = matrix.split(max(1, BLOCK // max(1, matrix[:1].numel())))
    return blocks


def _decibels(parts: Iterable[tuple[Tensor, Tensor]]) -> float:
    signal = noise = torch.zeros((), dtype=torch.float64, device="cpu")
    for exact, approximate in parts:
        signal = signal + exact.double().square().sum()
        noise = noise + (exact.double() - approximate.double()).square().sum()
    return math.inf if noise == 0 else 10 * float(torch.log10(signal / noise))


def output_snr(x: Tensor, weight: Tensor, quantized: Quantized, rows: Rows | None, bias: Tensor | None = None) -> float:
    """Signal to noise in dB of what a quantized layer makes of x [M, K], before its activation, against fp64."""
    b = None if bias is None else bias.detach()
    exact = x.double() @ weight.detach().double().t() + (0.0 if b is None else b.double())
    return signal_to_noise(exact, linear(x, quantized, rows, b, out=torch.float32))


def _centered(weight: Quantized) -> Tensor:
    """values - zero, as int32 [N, K]."""
    return weight.values.int() if weight.zero is None else weight.values.int() - weight.zero[:, None]


def _amax(rows: Tensor) -> Tensor:
    return _most(rows.abs(), torch.amax)


def _most(rows: Tensor, function: Callable[[Tensor, int], Tensor]) -> Tensor:
    """torch.amax or torch.amin of each row; 0 for nothing, of which torch has none."""
    # A trace warns of every look at a shape. Dynamo knows this function, not torch._C._is_tracing.
    whole = torch.jit.is_tracing() or rows.shape[-1] > 0  # type: ignore[attr-defined,no-untyped-call]
    return function(rows, -1) if whole else rows.sum(-1)


def _steps(values: Tensor, low: Any, high: Any) -> Tensor:
    """fp32 `values` rounded and held to low ... high; a NaN stays one."""
    return torch.round(values.clamp(low, high))


def _all(x: Tensor, value: float) -> Tensor:
    """The same fp32 number for every row of x."""
    return x.new_full(x.shape[:-1], float(value), dtype=torch.float32)


def _check_tensor(what: str, tensor: Tensor, dtype: torch.dtype, shape: str, fits: bool) -> None:
    if tensor.dtype is not dtype or not fits:
        given = f"{tensor.dtype} of shape {list(tensor.shape)}"
        raise ValueError(f"the {what} of an int8 weight must be {dtype} of shape {shape}, not {given}")
