"""Every kernel that runs here, every function of an epilogue and attention against fp64.

Integer products are held to their specification.
"""

from __future__ import annotations

import argparse
import functools
import itertools
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

import fastlinear._attention as _attention
import fastlinear._kernels as _kernels
import fastlinear._plans as _plans
import fastlinear._products as _products
import fastlinear._tensors as _tensors
import fastlinear._weights as _weights
from fastlinear.plan.attention import rounding_kernels
from fastlinear.spec import activations, attention, gates, grouping, int4, int8, programs
from fastlinear.spec.activations import Activation
from fastlinear.spec.formats import DTYPES, INTEGER_ROWS
from fastlinear.spec.int8 import Quantized, Rows

_SHAPES = ((1, 64, 64), (5, 33, 7), (16, 96, 130), (67, 70, 301))  # around tiles, panels and the unrolling of K
_HEADS = ((3, 9, 32), (19, 35, 21), (40, 33, 64))  # queries, keys, and numbers of a head
_FP16_SUMS = 64  # products that may be added in fp16 before the sum goes on in fp32
_ULPS, _RELATIVE = 4, 1e-6  # a function of an epilogue may be off by the larger of the two
_FUNCTIONS = (*activations.names(), *programs.BINARY, *programs.GATES, *programs.LIMITED)


def results() -> Iterator[tuple[str, str, float]]:
    """(kernel or ISA, what it computed, its worst error as a share of what is allowed) for all that runs here."""
    torch.manual_seed(0)
    rows = [row for row in _kernels.kernels() if row["runnable"]]
    for row in rows:
        for layout in row["reads"]:
            form = layout.split("/")[0]
            worst = _worst_product if row["rows"] in INTEGER_ROWS else _worst_sum
            if form in _tensors.GROUPED:
                worst = _worst_dots if row["rows"] in INTEGER_ROWS else _worst_coded
            yield row["name"], "sums" if form == row["format"] else f"sums of {form}", worst(row, layout)
    for isa, row in {row["isa"]: row for row in reversed(rows) if row["format"] in DTYPES}.items():
        for name in _FUNCTIONS:
            yield isa, name, _worst_function(row, name)
    yield from attentions()


def _worst_sum(row: dict[str, Any], layout: str) -> float:
    """Largest error of x W^T + b, for all formats of x that the kernel takes, over what is allowed: Higham's bound for
    sums of K + 1 terms, gamma_{K+2} (|x| |W|^T + |b|), and half a spacing of the output's format."""
    dtype, worst = _tensors.PACKED[layout.split("/")[0]], 0.0
    free = row["rows"] == "fp32" and dtype is not torch.float32
    for of_x in DTYPES.values() if free else [DTYPES[row["rows"]]]:
        for m, k, n in _SHAPES:
            x, weight, bias = (
                torch.randn(m, k, device="cpu").to(of_x),
                _weight(n, k, dtype),
                torch.randn(n, device="cpu"),
            )
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


def _worst_coded(row: dict[str, Any], layout: str) -> float:
    """`_worst_sum` of a weight in groups, with and without offsets, as what its codes stand for; each of its numbers is
    rounded twice, and once more where the kernel multiplies 16 bits."""
    worst, of_x = 0.0, DTYPES[row["rows"]]
    for offsets, (m, k, n) in itertools.product((False, True), _SHAPES):
        coded = _coded(layout.split("/")[0], n, k, offsets)
        x, bias = torch.randn(m, k, device="cpu").to(of_x), torch.zeros(n, device="cpu")
        out = _run(row, coded.layout(layout), x, coded, bias, torch.float32)
        weight, size = int4.dequantize(coded).to(of_x).double(), int4.magnitudes(coded).double()
        bound = _gamma(k + 6, torch.float32) * (x.double().abs() @ size.T)
        worst = max(worst, _largest((out - x.double() @ weight.T).abs() / bound))
    return worst


def _worst_dots(row: dict[str, Any], layout: str) -> float:
    """Largest error of integer products of a weight in groups against the specification, over that of two roundings of
    each of its sums: sums of integers are exact, but an FMA of the specification is rounded twice."""
    worst = 0.0
    for kind, (m, k, n) in itertools.product(int4.ROW_KINDS, _SHAPES):
        x, nothing = torch.randn(m, k, device="cpu"), torch.zeros(n, device="cpu")
        weight = _coded(layout.split("/")[0], n, k, True)
        rows = _plans.RowQuantizer(kind)
        got = _run(row, weight.layout(layout), x, weight, nothing, torch.float32, rows=rows)
        u, scale = int4.quantize_rows(x, weight.group, kind)
        size = int4.dequantize_rows(u, scale, weight.group).abs() @ int4.magnitudes(weight).T
        worst = max(worst, _largest((got - int4.linear(x, weight, kind)).abs() / (2.0**-23 * size)))
    return worst


@functools.cache  # for all kernels of a format: to round a weight takes longer than to multiply by it
def _coded(form: str, n: int, k: int, offsets: bool) -> int4.Coded:
    numbers = torch.Generator("cpu").manual_seed(0)
    return grouping.quantize_into(form, torch.randn(n, k, generator=numbers, device="cpu") + offsets, 16, offsets)


def _worst_product(row: dict[str, Any], layout: str) -> float:
    """0 where all bits are those of the specification, for every kind of rows; infinite where one is not."""
    for kind in int8.KINDS:
        rows = Rows(kind, 0.03, 100)
        for m, k, n in _SHAPES:
            weight = Quantized(
                _weight(n, k, torch.int8),
                torch.rand(n, device="cpu"),
                torch.randint(-128, 128, (n,), device="cpu").int(),
            )
            x, bias = torch.randn(m, k, device="cpu"), torch.randn(n, device="cpu")
            got = _run(row, layout, x, weight, bias, torch.float32, rows=_plans.RowQuantizer(*rows))
            if not torch.equal(got, int8.linear(x, weight, rows, bias)):
                return float("inf")
    return 0.0


def _weight(n: int, k: int, dtype: torch.dtype) -> Tensor:
    return (
        torch.randint(-128, 128, (n, k), dtype=dtype, device="cpu")
        if dtype is torch.int8
        else torch.randn(n, k, device="cpu").to(dtype)
    )


def _gamma(n: int, dtype: torch.dtype) -> float:
    unit = torch.finfo(dtype).eps / 2
    return n * unit / (1 - n * unit)


def _worst_function(row: dict[str, Any], name: str) -> float:
    """Largest error of a function over what is allowed. The weight is an identity: each sum is a number of x itself. A
    gate takes two of them, and the number 0.75 stands for an operand.

    Further to the left torch's own formula of gelu_tanh cancels, even in fp64.
    """
    defaults, operands, gate = _kernels.functions()[name]
    function = Activation(name, (0.75,) if operands else defaults)
    x = torch.linspace(-4, 8, 4001, device="cpu")[:, None]
    x = (torch.cat([x, x.flip(0)], 1) if gate else x).to(DTYPES[row["rows"]])
    weight = torch.eye(1 + gate, device="cpu").repeat_interleave(32, 0)
    packed = (gates.interleave(weight, row["layout"]) if gate else weight).to(DTYPES[row["format"]])
    got = _run(row, row["layout"], x, packed, torch.zeros(len(weight), device="cpu"), torch.float32, function)
    want = programs.apply(function, x.double() @ weight.double().T)
    ulp = torch.exp2(torch.frexp(want.abs().clamp_min(2.0**-126)).exponent - 24.0)
    return _largest((got - want).abs() / torch.maximum(_ULPS * ulp, _RELATIVE * want.abs()))


def attentions() -> Iterator[tuple[str, str, float]]:
    """(ISA, "attention", its worst error as a share of what is allowed) for all that have vectors and may run, and of
    each kernel that multiplies it in bf16."""
    for isa in _kernels.isas():
        worst = _worst_attention(isa)
        if worst is not None:
            yield isa, "attention", worst
    for kernel in rounding_kernels():
        worst = _worst_attention(None, kernel)
        if worst is not None:
            yield kernel, "attention in bf16", worst


def _worst_attention(isa: str | None, kernel: str | None = None) -> float | None:
    """Largest error of attention over what is allowed; None where the ISA has no vectors of its own, or may not run."""
    worst = 0.0
    dtypes, products = (DTYPES.values(), None) if kernel is None else ((torch.float32, torch.bfloat16), torch.bfloat16)
    for dtype, (queries, keys, size), causal in itertools.product(dtypes, _HEADS, (False, True)):
        q = torch.randn(2, 4, queries, size, device="cpu").to(dtype)
        k, v = (torch.randn(2, 2, keys, size, device="cpu").to(dtype) for _ in range(2))
        if products and size % 2:  # computed in fp32, which is the same where they hold the numbers of the products
            q, k, v = (t.to(products).to(dtype) for t in (q, k, v))
        mask = None if causal else torch.rand(2, 1, queries, keys, device="cpu") < 0.8
        try:
            y = _attention.attention(q, k, v, mask, causal, None, True, isa, products=kernel)
        except ValueError:
            return None
        want, bound = attention.exact(q, k, v, mask, causal, products=products)
        worst = max(worst, float("inf") if y is None else _largest((y.double() - want).abs() / bound))
    return worst


def _run(
    row: dict[str, Any],
    layout: str,
    x: Tensor,
    weight: Tensor | Quantized | int4.Coded,
    bias: Tensor,
    dtype: torch.dtype,
    *steps: Activation,
    rows: _plans.RowQuantizer | None = None,
) -> Tensor:
    if isinstance(weight, Tensor) and weight.dtype is torch.int8:
        weight = Quantized(weight, torch.ones(len(weight), device="cpu"))
    parts: tuple[Any, ...] = (weight,)
    if isinstance(weight, Quantized):
        parts = weight.values, weight.scale, weight.zero
    elif isinstance(weight, int4.Coded):
        parts = weight.codes, *weight.contents()
    columns = len(bias) // 2 if steps and programs.is_gated(steps[0]) else len(bias)
    packed, out = (
        _weights.Packed(parts[0], layout, *parts[1:]),
        torch.full((len(x), columns), torch.nan, dtype=dtype, device="cpu"),
    )
    _products.run(packed, _plans.Plan(row["name"], 1), _plans.Epilogue(steps), x, bias, out, rows)
    return out


def _largest(ratios: Tensor) -> float:
    return float("inf") if ratios.isnan().any() else float(ratios.max())


def check(_: argparse.Namespace) -> int:
    """Prints the worst error of each kernel and each ISA's functions and attention as a share of what is allowed."""
    print(f"{'checked':<30}{'what':<14}{'error':>9}  of what is allowed")
    shares = []
    for checked, what, worst in results():
        print(f"{checked:<30}{what:<14}{worst:>9.1%}  {'ok' if worst <= 1 else 'FAILED'}")
        shares.append(worst)
    failures = sum(not worst <= 1 for worst in shares)
    print(f"\n{len(shares) - failures} of {len(shares)} checks passed")
    return 1 if failures else 0
