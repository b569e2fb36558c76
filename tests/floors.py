"""The package on a CPU with less than this one has: import, every kernel that may run, attention, and whole layers.

    python tests/floors.py            here, as FASTLINEAR_MAX_ISA allows
    python tests/floors.py --short    the least that meets every kernel, dtype and precision, for QEMU, which is slow
    make floors                       below limits, and on older CPUs that QEMU imitates

A process of its own, since an instruction that the CPU lacks ends it.
"""

import itertools
import os
import sys

os.environ.setdefault("FASTLINEAR_AUTOTUNE", "0")

import torch
from torch import nn

import fastlinear
import fastlinear._attention as _attention
import fastlinear._kernels as _kernels
import fastlinear._plans as _plans
import fastlinear._products as _products
import fastlinear._tensors as _tensors
import fastlinear._weights as _weights
from fastlinear.spec import attention as spec
from fastlinear.spec import grouping, int4

SHAPES = [(1, 64, 48), (7, 33, 70)]  # M, K, N


def layers(short: bool) -> int:
    """Layers in every precision against torch in double; how many. In short, each dtype and each scheme once."""
    schemes = (None, fastlinear.Int8WeightOnly(), fastlinear.Int8Dynamic())
    whole = itertools.product(_tensors.FORMATS, schemes, SHAPES)
    cases = [*(zip(_tensors.FORMATS, schemes, itertools.cycle(SHAPES), strict=False) if short else whole)]
    for dtype, scheme, (m, k, n) in cases:
        stock = nn.Sequential(nn.Linear(k, n), nn.GELU(), nn.Linear(n, k)).to(dtype).eval()
        fast, x = fastlinear.convert(stock, quantize=scheme), torch.randn(m, k).to(dtype)
        with torch.inference_mode():
            y = fast(x)
            expected = stock.double()(x.double())
            error = (y - expected).abs().max() / expected.abs().max()
        assert error < 0.05, (dtype, scheme, m, k, n, error)
    return len(cases)


def kernels() -> int:
    """Every kernel that runs on every layout that it reads, compared with the sums in double; how many products."""
    count = 0
    for row in (row for row in _kernels.kernels() if row["runnable"]):
        integers = row["accumulate"] == "int32"
        for layout in row["reads"]:
            dtype = _tensors.PACKED.get(layout.split("/")[0])
            x = torch.randn(5, 40).to({name: d for d, name in _tensors.FORMATS.items()}.get(row["rows"], torch.float32))
            if dtype is None:
                coded = grouping.quantize_into(layout, torch.randn(70, 40), 16)
                w = int4.dequantize(coded)
                packed = _weights.Packed(coded.codes, coded.layout(layout), *coded.contents())
            elif dtype is torch.int8:
                w = torch.randint(-127, 128, (70, 40)).to(dtype)
                packed = _weights.Packed(w, layout, torch.ones(70))
            else:
                w = torch.randn(70, 40).to(dtype)
                packed = _weights.Packed(w, layout)
            out = torch.empty(5, 70)
            rows = _plans.RowQuantizer("symmetric") if integers or row["rows"] == "int8" else None
            plan = _plans.Plan(row["name"])
            _products.run(packed, plan, _plans.Epilogue(), x, None, out, rows)
            bound = x.double().abs() @ w.double().abs().T
            assert ((out - x.double() @ w.double().T).abs() <= 0.02 * bound).all(), (row["name"], layout)
            count += 1
    return count


def attention() -> int:
    """Attention of every dtype under its bound; how many."""
    for dtype in _tensors.FORMATS:
        q, k = torch.randn(1, 4, 19, 21).to(dtype), torch.randn(1, 2, 35, 21).to(dtype)
        mask = torch.rand(19, 35) < 0.7
        y = _attention.attention(q, k, k, mask, grouped=True)
        want, bound = spec.exact(q, k, k, mask)
        assert y is not None and ((y.double() - want).abs() <= bound).all(), dtype
    return len(_tensors.FORMATS)


if __name__ == "__main__":
    torch.manual_seed(0)
    counts = f"{kernels()} products, {attention()} of attention, {layers('--short' in sys.argv)} models"
    print(f"{' '.join(fastlinear.cpu_info()['isas'])}: {counts}", file=sys.stderr)
