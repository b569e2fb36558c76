"""Every kernel that runs here, and every activation, against fp64."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from fastlinear import _kernels, activations
from fastlinear.activations import Activation

_DTYPES = {name: dtype for dtype, name in _kernels.FORMATS.items()}
_SHAPES = ((1, 64, 64), (5, 33, 7), (16, 96, 130), (67, 70, 301))  # around tiles, panels and the unrolling of K
_FP16_SUMS = 64  # products that may be added in fp16 before the sum goes on in fp32
_ULPS, _RELATIVE = 4, 1e-6  # an activation may be off by the larger of the two


def results() -> Iterator[tuple[str, str, float]]:
    """(kernel or ISA, what it computed, its worst error as a share of what is allowed) for all that runs here."""
    torch.manual_seed(0)
    rows = [row for row in _kernels.kernels() if row["runnable"]]
    for row in rows:
        for layout in row["reads"]:
            form = layout.split("/")[0]
            yield row["name"], "sums" if form == row["format"] else f"sums of {form}", _worst_sum(row, layout)
    for isa, row in {row["isa"]: row for row in reversed(rows)}.items():
        for name in activations.names():
            yield isa, name, _worst_activation(row, name)


def _worst_sum(row: dict[str, Any], layout: str) -> float:
    """Largest error of x W^T + b, for all formats of x that the kernel takes, over what is allowed: Higham's bound for
    sums of K + 1 terms, gamma_{K+2} (|x| |W|^T + |b|), and half a spacing of the output's format."""
    dtype, worst = _DTYPES[layout.split("/")[0]], 0.0
    free = row["rows"] == "fp32" and dtype is not torch.float32
    for of_x in _DTYPES.values() if free else [_DTYPES[row["rows"]]]:
        for m, k, n in _SHAPES:
            x, weight, bias = torch.randn(m, k).to(of_x), torch.randn(n, k).to(dtype), torch.randn(n)
            want = x.double() @ weight.double().T + bias
            share = _gamma(k + 2, torch.float32)
            if row["accumulate"] == "fp16":
                share += (1 + share) * _gamma(min(k, _FP16_SUMS), torch.float16)
            bound = share * (x.double().abs() @ weight.double().abs().T + bias.abs())
            for of_y in {of_x, torch.float32}:  # in fp32 an error shows that the rounding to 16 bits hides
                spacing = torch.finfo(of_y).eps * (want.abs() + bound).clamp_min(torch.finfo(of_y).tiny)
                error = (_run(row, layout, x, weight, bias, of_y) - want).abs()
                worst = max(worst, _largest(error / (bound + (of_y is not torch.float32) * spacing / 2)))
    return worst


def _gamma(n: int, dtype: torch.dtype) -> float:
    unit = torch.finfo(dtype).eps / 2
    return n * unit / (1 - n * unit)


def _worst_activation(row: dict[str, Any], name: str) -> float:
    """Largest error of an activation over what is allowed. K = 1 and a weight of ones: the sum itself is exact.

    Further to the left torch's own formula of gelu_tanh cancels, even in fp64.
    """
    activation = Activation(name, _kernels.activations()[name])
    x = torch.linspace(-4, 8, 4001)[:, None].to(_DTYPES[row["rows"]])
    ones = torch.ones(32, 1, dtype=_DTYPES[row["format"]])
    got = _run(row, row["layout"], x, ones, torch.zeros(32), torch.float32, activation)
    want = activations.apply(activation, x.double())
    ulp = torch.exp2(torch.frexp(want.abs().clamp_min(2.0**-126)).exponent - 24.0)
    return _largest((got - want).abs() / torch.maximum(_ULPS * ulp, _RELATIVE * want.abs()))


def _run(
    row: dict[str, Any],
    layout: str,
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    dtype: torch.dtype,
    *steps: Activation,
) -> Tensor:
    out = torch.full((len(x), len(weight)), torch.nan, dtype=dtype)
    packed = _kernels.Packed(weight, layout)
    _kernels.run(packed, _kernels.Plan(row["name"], 1), _kernels.Epilogue(steps), x, bias, out)
    return out


def _largest(ratios: Tensor) -> float:
    return float("inf") if ratios.isnan().any() else float(ratios.max())
