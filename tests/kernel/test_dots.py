"""Integer products of weights in groups, on every kernel: sums of a group are exact, bits are the same on every ISA,
and rows are quantized as the specification says, whatever they hold."""

from dataclasses import replace
from typing import Any

import emulator
import guard
import library
import pytest
import torch
from grouped import E8M0, coded, pack
from torch import Tensor

import fastlinear._kernels as _kernels
import fastlinear._plans as _plans
import fastlinear._products as _products
from fastlinear._weights import Packed
from fastlinear.spec import int4
from fastlinear.spec.int4 import TABLES, Coded, Coding

Kernel = dict[str, Any]
ROWS = [
    row | {"on": layout}
    for row in _kernels.kernels()
    for layout in row["reads"]
    if row["rows"] == "int8" and "skipped" not in library.way(row["isa"])
]
PLAIN = {row["layout"]: row for row in ROWS if row["isa"] == "scalar" and row["on"] == row["layout"]}
WHOLE = [numbers for numbers in TABLES.values() if Coding(table=numbers).is_whole]
every_kernel = pytest.mark.parametrize("kernel", ROWS, ids=lambda row: f"{row['name']} on {row['on']}")


def tables(kernel: Kernel) -> list[tuple[float, ...]]:
    return WHOLE if kernel["on"].startswith("int4") else [()]


def run(kernel: Kernel, packed: Packed, x: Tensor, kind: str = "groups", threads: int = 1, k_slices: int = 1) -> Tensor:
    y = torch.full((len(x), packed.n), torch.nan)
    with emulator.running() if not kernel["runnable"] else torch.no_grad():
        plan = _plans.Plan(kernel["name"], threads, k_slices, library.caches())
        _products.run(packed, plan, _plans.Epilogue(), x, None, y, _plans.RowQuantizer(kind))
    return y


def same(a: Tensor, b: Tensor) -> bool:
    """Equal bits, and NaN for NaN."""
    return bool(((a == b) | (a.isnan() & b.isnan())).all())


def test_tables_of_integers_are_known() -> None:
    """NF4 is none; E2M1 has halves."""
    assert [name for name, numbers in TABLES.items() if numbers in WHOLE] == ["int4", "fp4", "iq4_nl"]


@every_kernel
def test_every_code_times_every_byte_is_exact(kernel: Kernel) -> None:
    """All codes of every table of integers, and all of 8 bits, at every place of a group, times the largest bytes."""
    k = 35
    for numbers in tables(kernel):
        codes = torch.arange(64 if numbers else 256)[:, None].add(torch.arange(k))
        codes = codes.remainder(16).to(torch.uint8) if numbers else codes.to(torch.int8)
        table = torch.tensor(numbers) if numbers else None
        weight = Coded(codes, torch.full((len(codes), 3), 0.5), table, 16)
        x = torch.cat([torch.eye(k) * 127, torch.eye(k) * -127])
        want = int4.dequantize(weight).t() * 127
        assert torch.equal(run(kernel, pack(weight, kernel["on"]), x), torch.cat([want, -want]))


@every_kernel
def test_sums_of_integers_are_exact(kernel: Kernel) -> None:
    """Rows of integers with a 127 in each group, or in the row, are multiplied as they are, the largest codes and bytes
    of one sign too, and groups that end with K: bits are those of int64."""
    for m, k, offsets, kind in ((1, 96, False, "groups"), (5, 203, True, "groups"), (13, 64, True, "symmetric")):
        for numbers in tables(kernel):
            weight = coded(70, k, Coding(32, numbers, offsets=offsets))
            weight.codes[3] = weight.codes.max()
            scale = torch.randint(0, 3, weight.scale.shape).float().exp2().half()
            offset = None if weight.offset is None else torch.randint(-8, 9, scale.shape).half()
            weight = Coded(weight.codes, scale, weight.table, 32, offset)
            x = torch.randint(-127, 128, (m, k)).float()
            x[:, ::32] = 127
            x[0] = 127
            want = x.double() @ int4.dequantize(weight).double().t()
            assert torch.equal(run(kernel, pack(weight, kernel["on"]), x, kind).double(), want)


@every_kernel
def test_products_follow_the_specification(kernel: Kernel) -> None:
    """Of random numbers in every format of x, around tiles, groups and blocks, with every kind of scales, on threads
    and K slices, every other weight's columns in an order of their own: within a bit or two of the specification, whose
    rounding of an FMA is not exact, and the bits of the scalar kernel."""
    mr, columns = kernel["mr"], kernel["columns"]
    one, two, last = (tables(kernel) * 3)[:3]
    cases = [
        (1, columns, 16, Coding(16, one), torch.float32),
        (mr, columns + 1, 67, Coding(16, two, torch.bfloat16, True), torch.bfloat16),
        (mr + 1, 2 * columns - 1, 200, Coding(64, last, torch.float32, True), torch.float16),
        (1, 40, 129, Coding(128, one, torch.float32), torch.float32),
        (3, 64, 300, Coding(512, two), torch.float32),
        (1, 40, 300, Coding(32, one, E8M0), torch.float32),
        (2, 70, 600, Coding(32, one, torch.uint8, True), torch.float32),
        (1, 33, 520, Coding(16, one, torch.int8), torch.float32),
    ]
    for i, (m, n, k, coding, dtype) in enumerate(cases):
        weight, x = coded(n, k, coding, i % 2 == 1), torch.randn(m, k).to(dtype)
        packed, kind = pack(weight, kernel["on"]), int4.ROW_KINDS[i % 2]
        y, want = run(kernel, packed, x, kind), int4.linear(x, weight, kind)
        turned = x if weight.order is None else x[:, weight.order.long()]
        u, scale = int4.quantize_rows(turned, coding.group, kind)
        size = int4.dequantize_rows(u, scale, coding.group).abs() @ int4.magnitudes(replace(weight, order=None)).t()
        assert bool(((y - want).abs() <= 2.0**-23 * size).all())
        assert torch.equal(y, run(PLAIN[kernel["on"]], packed, x, kind))
    weight, x = coded(96, 700, Coding(32, one, offsets=True)), torch.randn(2 * mr, 700)
    packed = pack(weight, kernel["on"])
    want = run(PLAIN[kernel["on"]], packed, x)
    with library.caches_of(1 << 15, 1 << 13, 1 << 20):  # K in several blocks
        assert torch.equal(run(kernel, packed, x, threads=2), want)
        sliced = run(kernel, packed, x, threads=2, k_slices=2)
    assert torch.allclose(sliced, want, atol=1e-4 * float(want.abs().max()))


@every_kernel
def test_odd_numbers_stay_in_their_row_and_channel(kernel: Kernel) -> None:
    """Infinities and NaN of x spoil their row, those of scales their channel; groups of zeros and of denormals are
    zeros; numbers as large as there are are no infinity."""
    k, coding = 80, Coding(16, tables(kernel)[0], torch.float32)
    weight = coded(40, k, coding)
    weight.scale.clamp_(-1e-3, 1e-3)
    weight.scale[3, 1] = torch.nan
    packed = pack(weight, kernel["on"])
    x = torch.randn(6, k)
    x[0, 17], x[1, 18], x[2, 64] = torch.nan, torch.inf, -torch.inf
    x[3, 16:32], x[4] = 0.0, 1e-42
    x[5, 7] = torch.finfo(torch.float32).max
    y = run(kernel, packed, x)
    assert y[:3].isnan().all() and y[:, 3].isnan().all()
    rest = [n for n in range(40) if n != 3]
    assert y[3:, rest].isfinite().all() and not y[4, rest].any()
    assert same(y, run(PLAIN[kernel["on"]], packed, x))
    assert same(run(kernel, packed, x, "symmetric"), run(PLAIN[kernel["on"]], packed, x, "symmetric"))


@every_kernel
def test_nothing_is_read_beyond_rows_and_panels(kernel: Kernel) -> None:
    """x and the packed weight end at a page that nobody may read."""
    for m, k in ((1, 37), (kernel["mr"], 64)):
        weight = coded(33, k, Coding(16, tables(kernel)[0], offsets=True))
        held = pack(weight, kernel["on"])
        packed = Packed.over(guard.guarded(held.data, "end").numpy(), held.layout, held.n, held.k)
        x = guard.guarded(torch.randn(m, k), "end")
        assert torch.equal(run(kernel, packed, x), run(PLAIN[kernel["on"]], held, x.clone()))


def test_what_is_no_integer_is_refused() -> None:
    """Integer products of NF4, integer rows of another kind on weights in groups, groups of rows on others."""
    weight = coded(4, 32, Coding(32, TABLES["nf4"]))
    x, y, nothing = torch.ones(1, 32), torch.empty(1, 4), _plans.Epilogue()
    plan = _plans.Plan("int4/scalar/dot1x32")
    whole = coded(4, 32, Coding(32))
    int8 = Packed(torch.ones(4, 32, dtype=torch.int8), "int8/8x4", torch.ones(4))
    for packed, kind, chosen in (
        (pack(weight, "int4/32x8"), "groups", plan),
        (pack(whole, "int4/32x8"), "asymmetric", plan),
        (pack(whole, "int4/32x8"), "groups", _plans.Plan("int4/scalar/1x32")),
        (int8, "groups", _plans.Plan("int8/scalar/4x8")),
    ):
        with pytest.raises((ValueError, TypeError)):
            _products.run(packed, chosen, nothing, x, None, y, _plans.RowQuantizer(kind))
