"""Weights that are scaled in groups, on every kernel that reads them: what is packed comes back, every code means what
the table says, and products are those of the stored values, wherever groups, panels and rows end."""

import itertools
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import emulator
import guard
import library
import pytest
import torch
from grouped import E8M0, coded, eight_bits, every_byte, pack
from torch import Tensor

import fastlinear._kernels as _kernels
import fastlinear._plans as _plans
import fastlinear._products as _products
import fastlinear._tensors as _tensors
import fastlinear._weights as _weights
from fastlinear._weights import Packed
from fastlinear.spec import int4
from fastlinear.spec import packed as packs
from fastlinear.spec.int4 import TABLES, Coded, Coding

Kernel = dict[str, Any]
LAYOUTS = sorted({row["layout"] for row in _kernels.rows() if row["grouped"]})
ROWS = [
    row | {"on": layout}
    for row in _kernels.kernels()
    for layout in row["reads"]
    if layout in LAYOUTS and "skipped" not in library.way(row["isa"]) and row["rows"] != "int8"  # those: test_dots.py
]
every_kernel = pytest.mark.parametrize("kernel", ROWS, ids=lambda row: f"{row['name']} on {row['on']}")
SCALES = [*_tensors.SCALES]
WORDS = {1: torch.uint8, 2: torch.int16, 4: torch.int32}


def tables(kernel: Kernel) -> list[tuple[float, ...]]:
    """Those that its codes may have: none, for codes of 8 bits."""
    return [*TABLES.values()] if kernel["on"].startswith("int4") else [()]


def bytes_of_scales(coding: Coding, groups: int, k: int) -> int:
    """Of one channel: 6 bits each and two bytes for each 256 k are what Q4_K has, 8 bits what Q6_K has."""
    supers = -(-k // _tensors.SUPER)
    if coding.scales is torch.uint8:
        return supers * (8 * 6 // 8 + 2)
    if coding.scales is torch.int8:
        return supers * (_tensors.SUPER // coding.group + 2)
    return groups * coding.scales.itemsize


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
    """Codes, scales, offsets, table and order are what was packed, in as many bytes as the page says, in a mapping,
    too."""
    table, bits = (TABLES["int4"], 4) if layout.startswith("int4") else ((), 8)
    for (n, k), dtype, offsets, ordered in itertools.product(
        [(1, 1), (31, 16), (32, 17), (65, 530), (3, 0), (0, 5)], SCALES, (False, True), (False, True)
    ):
        coding = Coding(32 if dtype is torch.uint8 or n == 32 else 16, table, dtype, offsets)
        weight = coded(n, k, coding, ordered, layout)
        packed = pack(weight, layout)
        panels = -(-n // 32)
        side = bytes_of_scales(coding, -(-k // coding.group), k) * (1 + offsets)
        kr = int(layout.rpartition("x")[2])
        of_codes = -(-k // kr) * kr * bits // 8
        assert packed.nbytes == panels * 32 * (of_codes + side) + 64 * (bits == 4) + 4 * k * ordered
        assert packed.nbytes == _weights.packed_nbytes(packed.layout, n, k)
        mapped = Packed.over(packed.data.clone().numpy(), packed.layout, n, k)
        for read in (packed, mapped):
            assert same_bits(read.unpack(), weight.codes)
            for name in ("scale", "table", "offset", "supers", "order"):
                back, had = getattr(read, name), getattr(weight, name)
                assert back is had if had is None else same_bits(back, had), name
            again = int4.coded_of(read)
            assert again.coding == coding
            assert torch.equal(int4.dequantize(again), int4.dequantize(weight))
            assert torch.equal(packs.numbers(read, 3), int4.dequantize(weight)[::3])


def same_bits(a: Tensor, b: Tensor) -> bool:
    return a.dtype is b.dtype and torch.equal(*(t.view(WORDS[t.dtype.itemsize]) for t in (a, b)))


def test_eight_codes_of_a_channel_share_four_bytes() -> None:
    """Byte j holds k = j in its lower half and k = 4 + j in its upper half; channels lie one after another."""
    codes = torch.arange(16, dtype=torch.uint8).reshape(2, 8)
    packed = pack(Coded(codes, torch.ones(2, 1), torch.tensor(TABLES["int4"]), 16), "int4/32x8")
    assert packed.data[:8].tolist() == [0x40, 0x51, 0x62, 0x73, 0xC8, 0xD9, 0xEA, 0xFB]


@every_kernel
def test_every_code_means_what_the_table_says(kernel: Kernel) -> None:
    """All codes of every table, and all of 8 bits, at every place of a group, alone."""
    k = 35
    for numbers in tables(kernel):
        every = torch.arange(64).to(torch.uint8) % 16 if numbers else every_byte(kernel["on"])
        codes = every[torch.arange(len(every))[:, None].add(torch.arange(k)) % len(every)]
        table = torch.tensor(numbers) if numbers else None
        means = codes.float() if table is None else table[codes.long()]
        weight = Coded(codes, torch.full((len(codes), 3), 0.5), table, 16)
        x = torch.eye(k).to(torch.bfloat16 if kernel["rows"] == "bf16" else torch.float32)
        want = (0.5 * means).to(x.dtype).float()
        assert torch.equal(run(kernel, pack(weight, kernel["on"]), x), want.t())


@pytest.mark.parametrize(
    "kernel",
    [row for row in ROWS if row["on"].startswith("fp8") and row["runnable"]],  # the emulator's MXCSR is its own
    ids=lambda row: row["name"],
)
def test_denormals_of_fp8_are_numbers(kernel: Kernel) -> None:
    """Whatever MXCSR says of denormals: those of fp8 are none of floats."""
    codes = every_byte("fp8").repeat(32, 1)[:, :96]
    weight, x = Coded(codes, torch.ones(32, 6), None, 16), torch.eye(96).to(rows_for(kernel, 1, 1).dtype)
    packed = pack(weight, kernel["on"])
    try:
        assert torch.set_flush_denormal(True)
        y = run(kernel, packed, x)
    finally:
        torch.set_flush_denormal(False)
    assert torch.equal(y, codes.float().t())


@every_kernel
def test_every_scale_means_what_its_format_says(kernel: Kernel) -> None:
    """All e8m0, whose extremes fp16 does not hold, all integers of 6 and of 8 bits at every place of 256 k, and as
    offsets, too."""
    table = tables(kernel)[0]
    cases = {E8M0: torch.arange(256).to(torch.uint8), torch.int8: torch.arange(-128, 128).to(torch.int8)}
    cases[torch.uint8] = torch.arange(256).remainder(64).to(torch.uint8)
    for dtype, every in cases.items():
        group, k = 32, 288
        scale = torch.stack([every.roll(g) for g in range(k // group)], 1).view(dtype)
        supers = None if dtype is E8M0 else torch.rand(256, 4).half()
        codes = torch.full((256, k), 9, dtype=torch.uint8)
        codes = codes if table else eight_bits(codes, kernel["on"])
        weight = Coded(codes, scale, torch.tensor(table) if table else None, group, scale.flip(0), supers)
        x = torch.zeros(k // group, k)
        x[torch.arange(k // group), torch.arange(k // group) * group + 3] = 1
        x = x.to(rows_for(kernel, 1, 1).dtype)
        want = int4.dequantize(weight)[:, 3::group].to(x.dtype).float().t()
        y = run(kernel, pack(weight, kernel["on"]), x)
        odd = want.isnan()
        assert bool(odd.any()) == (dtype is E8M0) and bool(y[odd].isnan().all())
        if dtype is E8M0:  # NaN of one group spoils its channel
            spoiled = (scale.view(torch.uint8) == 255).any(1) | (scale.flip(0).view(torch.uint8) == 255).any(1)
            y, want = y[:, ~spoiled], want[:, ~spoiled]
        assert torch.allclose(y, want, rtol=2.0**-22, atol=2.0**-140)


@every_kernel
def test_sums_of_integers_are_exact(kernel: Kernel) -> None:
    """Small integers and scales that are powers of two leave nothing to round: bits are those of int64."""
    for m, k, offsets in ((1, 96, False), (5, 203, True), (17, 64, True)):
        weight = coded(70, k, Coding(32, tables(kernel)[0], offsets=offsets))
        codes = torch.randint(16, (70, k), dtype=torch.uint8)  # bf16 holds their products
        codes = codes if weight.table is not None else eight_bits(codes, kernel["on"])
        scale = torch.randint(0, 3, weight.scale.shape).float().exp2().half()
        offset = None if weight.offset is None else torch.randint(-8, 9, scale.shape).half()
        weight = Coded(codes, scale, weight.table, 32, offset)
        x = torch.randint(-8, 9, (m, k)).to(rows_for(kernel, 1, 1).dtype)
        want = x.long() @ int4.dequantize(weight).long().t()
        assert torch.equal(run(kernel, pack(weight, kernel["on"]), x).long(), want)


@every_kernel
def test_products_are_those_of_the_stored_values(kernel: Kernel) -> None:
    """Groups of all sizes that end in the middle of a panel's k or of a block, rows and channels around tiles, every
    format of scales, with and without offsets, columns in another order than those of x, on threads and K slices; a
    group longer than K is a channel's scale."""
    mr, columns = kernel["mr"], kernel["columns"]
    one, two, *_, last = tables(kernel) * 3
    cases = [
        (1, columns, 16, Coding(16, one)),
        (mr, columns + 1, 67, Coding(16, two, torch.bfloat16, True)),
        (mr + 1, 2 * columns - 1, 200, Coding(64, last, torch.float32, True)),
        (2, 33, 5, Coding(32, one, offsets=True)),
        (1, 40, 129, Coding(128, one, torch.float32)),
        (3, 64, 300, Coding(512, two)),
        (1, 40, 300, Coding(32, one, E8M0)),
        (2, 70, 600, Coding(32, one, torch.uint8, True)),
        (1, 33, 520, Coding(16, one, torch.int8)),
    ]
    for i, (m, n, k, coding) in enumerate(cases):
        weight, x = coded(n, k, coding, i % 2 == 1, kernel["on"]), rows_for(kernel, m, k)
        check(kernel, run(kernel, pack(weight, kernel["on"]), x), x, weight)
    for coding in (Coding(32, one, offsets=True), Coding(32, one, torch.uint8, True)):
        weight, x = coded(96, 700, coding, layout=kernel["on"]), rows_for(kernel, 2 * mr, 700)
        with library.caches_of(1 << 15, 1 << 13, 1 << 20):  # K in several blocks
            check(kernel, run(kernel, pack(weight, kernel["on"]), x, 2, 2), x, weight)


@every_kernel
def test_odd_scales_stay_in_their_channel(kernel: Kernel) -> None:
    """A scale of 0 is a group of zeros; one that is NaN or infinite spoils its own channel and no other."""
    weight = coded(40, 80, Coding(16, tables(kernel)[0], torch.float32), layout=kernel["on"])
    x = rows_for(kernel, 2, 80)
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
    for m, k, ordered in ((1, 37, False), (kernel["mr"], 64, False), (2, 48, True)):
        weight = coded(33, k, Coding(16, tables(kernel)[0], offsets=True), ordered, kernel["on"])
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
        ("int4/32x8:32:int16", "a format of fp32, bf16, fp16, e8m0, int8, uint6"),
        ("int4/32x8:16:uint6", "scaled by uint6 are of 32 k"),
        ("int4/32x8:512:int8", "scaled by int8 are of at most 256 k"),
        ("int4/32x8:32:fp16:offset", "a format of"),
        ("int4/32x8:32:fp16:ordered:offsets", "a format of"),
        ("fp32/32x1:32:fp16", "has no groups"),
        ("int4/16x8:32:fp16", "no kernel reads"),
    ],
)
def test_layouts_that_are_none_are_refused(layout: str, about: str) -> None:
    with pytest.raises(ValueError, match=about):
        _weights.packed_nbytes(layout, 32, 32)


@pytest.mark.parametrize("order", [[0, 1, 1, *range(3, 40)], [40, *range(1, 40)], [-1, *range(1, 40)]])
def test_an_order_names_each_column_once(order: list[int]) -> None:
    """Kernels follow it into x, so that one of a file is looked at before it is mapped."""
    weight = replace(coded(4, 40, Coding(32)), order=torch.tensor(order, dtype=torch.int32))
    with pytest.raises(ValueError, match="other ones than the 40 of x, each once"):
        pack(weight, "int4/32x8")
    good = pack(replace(weight, order=torch.arange(40, dtype=torch.int32)), "int4/32x8")
    data = good.data.clone()
    data[-160:] = weight.order.view(torch.uint8)
    with pytest.raises(ValueError, match="other ones than the 40 of x, each once"):
        Packed.over(data.numpy(), good.layout, 4, 40)


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
        {"supers": torch.ones(4, 1, dtype=torch.float16)},
        {"order": torch.arange(40, dtype=torch.int32)},
    ]
    for changed in odd:
        with pytest.raises(ValueError, match=r"scale must be|table must be|offsets|two levels|no order"):
            Packed(weight.codes, "int4/32x8:32:fp16", **{**good, **changed})
    with pytest.raises(ValueError, match="holds an order of columns"):
        Packed(weight.codes, "int4/32x8:32:fp16:ordered", **good)
    with pytest.raises(ValueError, match="order must be"):
        Packed(weight.codes, "int4/32x8:32:fp16:ordered", **good, order=torch.arange(40))
    with pytest.raises(ValueError, match="holds offsets"):
        Packed(weight.codes, "int4/32x8:32:fp16:offsets", **good)
    two = Coded(
        weight.codes, torch.full((4, 2), 64, dtype=torch.uint8), weight.table, 32, None, torch.ones(4, 1).half()
    )
    with pytest.raises(ValueError, match="0 to 63, not 64"):
        pack(two, "int4/32x8")
    with pytest.raises(ValueError, match=r"supers must be a torch\.float16 CPU tensor of shape \(4, 1\)"):
        pack(replace(two, supers=torch.ones(4, 2).half()), "int4/32x8")
    with pytest.raises(ValueError, match="holds no table"):
        Packed(weight.codes.to(torch.int8), "int8g/32x4:32:fp16", **good)
    with pytest.raises(ValueError, match="holds no groups"):
        Packed(torch.ones(4, 40), "fp32/32x1", table=weight.table)
    with pytest.raises(TypeError, match=r"holds torch\.uint8"):
        Packed(torch.ones(4, 40), "int4/32x8:32:fp16", **good)
