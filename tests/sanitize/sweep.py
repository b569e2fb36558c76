"""Random products on every kernel that runs here, attention and its cache on every ISA, and the self-check if they are
many.

Argument: how many.
"""

import random
import sys
from typing import Any

import torch

import fastlinear._attention as _attention
import fastlinear._kernels as _kernels
import fastlinear._plans as _plans
import fastlinear._products as _products
import fastlinear._tensors as _tensors
import fastlinear._weights as _weights
from fastlinear.cli import check
from fastlinear.plan.attention import rounding_kernels
from fastlinear.spec import grouping, int4
from fastlinear.spec.formats import INTEGER_ROWS
from fastlinear.spec.int8 import KINDS, Rows


def product(row: dict[str, Any], layout: str, draw: random.Random) -> None:
    m, k, n = (draw.choice((1, 2, 3, 5, 13, 14, 17, 31, 33, 64, 65, 130)) for _ in range(3))
    x, bias = torch.randn(m, k), torch.randn(n) if draw.random() < 0.7 else None
    rows, format = None, layout.split("/")[0]
    if format in _tensors.GROUPED:
        packed = coded(torch.randn(n, k), layout, draw)
        if row["rows"] in INTEGER_ROWS:
            rows = _plans.RowQuantizer(draw.choice(int4.ROW_KINDS))
    elif row["rows"] in INTEGER_ROWS:
        rows = _plans.RowQuantizer(*Rows(draw.choice(KINDS), 0.03, 100))
        zero = torch.randint(-128, 128, (n,)).int() if draw.random() < 0.5 else None
        packed = _weights.Packed(torch.randint(-128, 128, (n, k), dtype=torch.int8), layout, torch.rand(n), zero)
    elif _tensors.PACKED[format] is torch.int8:
        packed = _weights.Packed(torch.randint(-128, 128, (n, k), dtype=torch.int8), layout, torch.rand(n), None)
    else:
        packed = _weights.Packed(torch.randn(n, k).to(_tensors.PACKED[format]), layout)
    slices = draw.choice((1, 1, 2, 3))
    name, (defaults, takes, gate) = draw.choice([f for f in _kernels.functions().items() if n % 2 == 0 or not f[1][2]])
    columns = n // (1 + gate)
    operands = (torch.randn(draw.choice((1, m)), draw.choice((1, columns))),) * takes
    epilogue = _plans.Epilogue([(name, defaults, *range(takes))])
    plan = _plans.Plan(row["name"], draw.choice((1, 2)), slices)
    out = torch.empty(m, columns)
    if row["rows"] not in INTEGER_ROWS:
        x = x.to(_tensors.PACKED[row["rows"]])
    _products.run(packed, plan, epilogue, x, bias, out, rows, operands)


def attention(isa: str, kernels: list[str], draw: random.Random) -> None:
    queries, keys, size = (draw.choice((1, 2, 7, 13, 16, 17, 31, 33, 40)) for _ in range(3))
    dtype, groups = draw.choice(list(_tensors.FORMATS)), draw.choice((1, 2))
    q = torch.randn(2, queries, 2, size).to(dtype).transpose(1, 2)
    k, v = (torch.randn(2, keys, groups, size).to(dtype).transpose(1, 2) for _ in range(2))
    mask = draw.choice(
        (None, torch.rand(2, 1, 1, keys) < 0.5, torch.rand(queries, keys) < 0.5, torch.randn(queries, keys))
    )
    causal, products = mask is None and draw.random() < 0.5, draw.choice([None, *kernels])
    _attention.attention(q, k, v, mask, causal, None, True, isa, products=products)
    if size % 2 == 0 and queries <= keys:
        cos, sin = torch.randn(2, 1, queries, size).to(dtype)
        at, full = keys - queries, draw.random() < 0.5
        new = k[:, :, :queries]
        _attention.store(q, new, new, cos, sin, k.contiguous(), v.contiguous(), at, full, isa)


def coded(weight: torch.Tensor, layout: str, draw: random.Random) -> _weights.Packed:
    codes = grouping.quantize_into(layout, weight, draw.choice((16, 32, 128)), draw.random() < 0.5)
    return _weights.Packed(codes.codes, codes.layout(layout), *codes.contents())


def main() -> None:
    draw, count = random.Random(0), int(sys.argv[1])
    table = [(row, layout) for row in _kernels.kernels() if row["runnable"] for layout in row["reads"]]
    isas = [isa for isa, what, _ in check.attentions() if what == "attention"]
    for i in range(count):
        torch.manual_seed(i)
        product(*table[i % len(table)], draw)
        attention(isas[i % len(isas)], rounding_kernels(), draw)
    if count < 1000:
        return
    for kernel, what, worst in check.results():
        assert worst <= 1, (kernel, what, worst)


if __name__ == "__main__":
    main()
