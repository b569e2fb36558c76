"""Weights that are scaled in groups, on every kernel that reads them: what is packed comes back, every code means what
the table says, and products are those of the stored values, wherever groups, panels and rows end."""

import itertools
from contextlib import nullcontext
from typing import Any

import emulator
import guard
import library
import pytest
import torch
from torch import Tensor

import fastlinear._kernels as _kernels
import fastlinear._plans as _plans
import fastlinear._products as _products
import fastlinear._weights as _weights
from fastlinear._weights import Packed
from fastlinear.spec import int4
from fastlinear.spec.int4 import TABLES, Coded, Coding

Kernel = dict[str, Any]
LAYOUTS = sorted({row["layout"] for row in _kernels.rows() if row["grouped"]})
ROWS = [
    row | {"on": layout}
    for row in _kernels.kernels()
    for layout in row["reads"]
    if layout in LAYOUTS and "skipped" not in library.way(row["isa"])
]
every_kernel = pytest.mark.parametrize("kernel", ROWS, ids=lambda row: f"{row['name']} on {row['on']}")
SCALES = [torch.float16, torch.bfloat16, torch.float32]


def coded(n: int, k: int, coding: Coding) -> Coded:
    """A weight of random codes, scales (of both signs) and offsets."""
    groups = -(-k // coding.group)
    scale, offset = (torch.randn(n, groups).to(coding.scales) for _ in range(2))
    codes, table = torch.randint(0, 16, (n, k), dtype=torch.uint8), torch.tensor(coding.table)
    return Coded(codes, scale, table, coding.group, offset if coding.offsets else None)


def pack(weight: Coded, layout: str) -> Packed:
    dtype, offsets = weight.scale.dtype, weight.offset is not None
    full = Coding(weight.group, scales=dtype, offsets=offsets).layout(layout)
    return Packed(weight.codes, full, weight.scale, None, weight.table, weight.offset)


def run(kernel: Kernel, packed: Packed, x: Tensor, threads: int = 1, k_slices: int = 1) -> Tensor:
    y = torch.full((len(x), packed.n), torch.nan)
    with nullcontext() if kernel["runnable"] else emulator.running():
        plan = _plans.Plan(kernel["name"], threads, k_slices, library.caches())
        _products.run(packed, plan, _plans.Epilogue(), x, None, y)
    return y


def rows_for(kernel: Kernel, m: int, k: int) -> Tensor:
    return torch.randn(m, k).to(torch.bfloat16 if kernel["rows"] == "bf16" else torch.float32)


def check(kernel: Kernel, y: Tensor, x: Tensor, weight: Coded) -> None:
    """Within the error of fp32 sums made group by group, of what the stored values mean in fp64."""
    w = int4.dequantize(weight)
    w = w.to(x.dtype)  # bf16 products are of a weight that is rounded to it
    exact = x.double() @ w.double().t()
    k = x.shape[1]
    bound = (k + 8) * 2.0**-24 * (x.double().abs() @ int4.magnitudes(weight).double().t()) + k * 2.0**-120
    assert bool(((y.double() - exact).abs() <= bound).all()), f"{kernel['name']}: {(y.double() - exact).abs().max()}"


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_bit_comes_back(layout: str) -> None:
    """Codes, scales, offsets and table are what was packed, in as many bytes as the page says, in a mapping, too."""
    for (n, k), group, dtype, offsets in itertools.product(
        [(1, 1), (31, 16), (32, 17), (65, 130), (3, 0), (0, 5)], (16, 64), SCALES, (False, True)
    ):
        weight = coded(n, k, Coding(group, scales=dtype, offsets=offsets))
        packed = pack(weight, layout)
        panels, groups = -(-n // 32), -(-k // group)
        side = panels * 32 * groups * dtype.itemsize * (1 + offsets)
        assert packed.nbytes == panels * 32 * (-(-k // 8) * 4 + 4) + side + 64
        assert packed.nbytes == _weights.packed_nbytes(packed.layout, n, k)
        mapped = Packed.over(packed.data.clone().numpy(), packed.layout, n, k)
        for read in (packed, mapped):
            assert torch.equal(read.unpack(), weight.codes)
            assert torch.equal(read.scale, weight.scale)
            assert torch.equal(read.table, weight.table)
            assert read.offset is None if weight.offset is None else torch.equal(read.offset, weight.offset)


def test_eight_codes_of_a_channel_share_four_bytes() -> None:
    """Byte j holds k = j in its lower half and k = 4 + j in its upper half; channels lie one after another."""
    codes = torch.arange(16, dtype=torch.uint8).reshape(2, 8)
    packed = pack(Coded(codes, torch.ones(2, 1), torch.tensor(TABLES["int4"]), 16), LAYOUTS[0])
    assert packed.data[:8].tolist() == [0x40, 0x51, 0x62, 0x73, 0xC8, 0xD9, 0xEA, 0xFB]


@every_kernel
def test_every_code_means_what_the_table_says(kernel: Kernel) -> None:
    """All 16 codes of every table, at every place of a group, alone."""
    k = 35
    for name, numbers in TABLES.items():
        table = torch.tensor(numbers)
        codes = torch.arange(64)[:, None].add(torch.arange(k)).remainder(16).to(torch.uint8)
        weight = Coded(codes, torch.full((64, 3), 0.5), table, 16)
        x = torch.eye(k).to(torch.bfloat16 if kernel["rows"] == "bf16" else torch.float32)
        want = (0.5 * table[codes.long()]).to(x.dtype).float()
        assert torch.equal(run(kernel, pack(weight, kernel["on"]), x), want.t()), name


@every_kernel
def test_sums_of_integers_are_exact(kernel: Kernel) -> None:
    """Small integers and scales that are powers of two leave nothing to round: bits are those of int64."""
    for m, k, offsets in ((1, 96, False), (5, 203, True), (17, 64, True)):
        weight = coded(70, k, Coding(32, offsets=offsets))
        scale = torch.randint(0, 3, weight.scale.shape).float().exp2().half()
        offset = None if weight.offset is None else torch.randint(-8, 9, scale.shape).half()
        weight = Coded(weight.codes, scale, weight.table, 32, offset)
        x = torch.randint(-8, 9, (m, k)).to(rows_for(kernel, 1, 1).dtype)
        want = x.long() @ int4.dequantize(weight).long().t()
        assert torch.equal(run(kernel, pack(weight, kernel["on"]), x).long(), want)


@every_kernel
def test_products_are_those_of_the_stored_values(kernel: Kernel) -> None:
    """Groups of all sizes that end in the middle of a panel's k or of a block, rows and channels around tiles, every
    format of scales, with and without offsets, on threads and K slices; a group longer than K is a channel's scale."""
    mr, columns = kernel["mr"], kernel["columns"]
    cases = [
        (1, columns, 16, Coding(16)),
        (mr, columns + 1, 67, Coding(16, TABLES["nf4"], torch.bfloat16, True)),
        (mr + 1, 2 * columns - 1, 200, Coding(64, TABLES["iq4_nl"], torch.float32, True)),
        (2, 33, 5, Coding(32, offsets=True)),
        (1, 40, 129, Coding(128, scales=torch.float32)),
        (3, 64, 300, Coding(512, TABLES["fp4"])),
    ]
    for m, n, k, coding in cases:
        weight, x = coded(n, k, coding), rows_for(kernel, m, k)
        check(kernel, run(kernel, pack(weight, kernel["on"]), x), x, weight)
    weight, x = coded(96, 700, Coding(32, offsets=True)), rows_for(kernel, 2 * mr, 700)
    with library.caches_of(1 << 15, 1 << 13, 1 << 20):  # K in several blocks
        check(kernel, run(kernel, pack(weight, kernel["on"]), x, 2, 2), x, weight)


@every_kernel
def test_odd_scales_stay_in_their_channel(kernel: Kernel) -> None:
    """A scale of 0 is a group of zeros; one that is NaN or infinite spoils its own channel and no other."""
    weight, x = coded(40, 80, Coding(16, scales=torch.float32)), rows_for(kernel, 2, 80)
    zero = Coded(weight.codes, weight.scale.clone().fill_(0.0), weight.table, 16)
    assert not run(kernel, pack(zero, kernel["on"]), x).any()
    odd = weight.scale.clone()
    odd[3, 1], odd[7, 4] = torch.nan, torch.inf
    y = run(kernel, pack(Coded(weight.codes, odd, weight.table, 16), kernel["on"]), x)
    assert y[:, 3].isnan().all() and not y[:, 7].isfinite().any()
    rest = [n for n in range(40) if n not in (3, 7)]
    assert torch.equal(y[:, rest], run(kernel, pack(weight, kernel["on"]), x)[:, rest])


@every_kernel
def test_nothing_is_read_beyond_rows_and_panels(kernel: Kernel) -> None:
    """x and the packed weight end at a page that nobody may read."""
    for m, k in ((1, 37), (kernel["mr"], 64)):
        weight = coded(33, k, Coding(16, offsets=True))
        held = pack(weight, kernel["on"])
        packed = Packed.over(guard.guarded(held.data, "end").numpy(), held.layout, held.n, held.k)
        x = guard.guarded(rows_for(kernel, m, k), "end")
        y = run(kernel, packed, x)
        check(kernel, y, x, weight)


@pytest.mark.parametrize(
    ("layout", "about"),
    [
        ("int4/32x8", "must tell how it is scaled"),
        ("int4/32x8:8:fp16", "a power of two"),
        ("int4/32x8:24:fp16", "a power of two"),
        ("int4/32x8:032:fp16", "a power of two"),
        ("int4/32x8:32:int8", "a format of fp32, bf16, fp16"),
        ("int4/32x8:32:fp16:offset", "a format of"),
        ("fp32/32x1:32:fp16", "has no groups"),
        ("int4/16x8:32:fp16", "no kernel reads"),
    ],
)
def test_layouts_that_are_none_are_refused(layout: str, about: str) -> None:
    with pytest.raises(ValueError, match=about):
        _weights.packed_nbytes(layout, 32, 32)


def test_what_does_not_fit_is_refused() -> None:
    """Scales of another dtype or shape, offsets that the layout has not, a table of another length, zero points."""
    weight = coded(4, 40, Coding(32))
    good = {"scale": weight.scale, "table": weight.table}
    odd: list[dict[str, Any]] = [
        {"scale": weight.scale.float()},
        {"scale": weight.scale[:, :1]},
        {"scale": None},
        {"table": weight.table[:8]},
        {"table": None},
        {"offset": weight.scale},
        {"zero": torch.zeros(4, dtype=torch.int32)},
    ]
    for changed in odd:
        with pytest.raises(ValueError, match=r"scale must be|table must be|offsets"):
            Packed(weight.codes, "int4/32x8:32:fp16", **{**good, **changed})
    with pytest.raises(ValueError, match="holds offsets"):
        Packed(weight.codes, "int4/32x8:32:fp16:offsets", **good)
    with pytest.raises(ValueError, match="holds no groups"):
        Packed(torch.ones(4, 40), "fp32/32x1", table=weight.table)
    with pytest.raises(TypeError, match=r"holds torch\.uint8"):
        Packed(torch.ones(4, 40), "int4/32x8:32:fp16", **good)
