"""Between the formats: every bit pattern is widened exactly, every float is rounded to the nearest, on every kernel.

Through products whose sums have one term that is not zero: what goes in by x, the weight or the bias comes out as y.
"""

import itertools
from functools import cache

import library
import native
import oracle
import pytest
import torch
from native import Kernel, every_kernel
from torch import Tensor

import fastlinear._kernels as _kernels
import fastlinear._tensors as _tensors
from fastlinear.spec.formats import INTEGER_ROWS

GROUPED = set(_tensors.GROUPED)
SIXTEEN_BIT = [dtype for dtype in native.DTYPES.values() if dtype.itemsize == 2]


SOME = 29  # has no divisor in common with the steps of `floats`
# Where each instruction of tiles costs a fault, `make test` takes some of the numbers: conversions are those of another
# ISA, which its own kernels show whole.
every_share = pytest.mark.parametrize(
    "share", [SOME, pytest.param(1, marks=pytest.mark.exhaustive)], ids=["some", "all"]
)


def patterns(dtype: torch.dtype, kernel: Kernel, share: int) -> Tensor:
    """Every number of a format of up to 16 bits; of fp32, those and what lies around them (`floats`). For an emulated
    kernel every `share`th of more than a few, and the infinities."""
    values = floats() if dtype.itemsize == 4 else native.of_bits(torch.arange(1 << 8 * dtype.itemsize), dtype)
    if kernel["way"] != library.EMULATED or dtype.itemsize == 1:
        return values
    return values[(torch.arange(len(values)) % share == 0) | values.isinf()]


@cache
def floats() -> Tensor:
    """All exponents, and all ties between numbers of a 16-bit format and what lies just beside the ties.

    So: both sides of every threshold at which a result becomes an infinity, a denormal or zero; NaN whose payload is in
    the last bits only; and floats at random.
    """
    upper = torch.arange(1 << 16)[:, None] << 16
    near_bf16 = upper + torch.tensor([0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF])
    halves = torch.arange(0x7C00, dtype=torch.int16).view(torch.float16).double()
    above = torch.cat([halves[1:], torch.tensor([65536.0], dtype=torch.float64)])
    ties = native.bits(((halves + above) / 2).float()).long()[:, None] + torch.tensor([-1, 0, 1])
    random = torch.randint(0, 1 << 32, (100_000,), generator=torch.Generator().manual_seed(0))
    return native.of_bits(
        torch.cat([near_bf16.flatten(), ties.flatten(), ties.flatten() + (1 << 31), random]), torch.float32
    )


def same(got: Tensor, want: Tensor) -> bool:
    """Equal numbers, and NaN for NaN; payloads and the sign of zero are not promised."""
    return bool(((got == want) | (got.isnan() & want.isnan())).all())


@every_kernel
@every_share
def test_every_weight_is_widened_exactly(share: int, kernel: Kernel) -> None:
    """All bit patterns of the weight's format, at every place of a group of k: infinities, NaN and denormals too."""
    for k, dtypes in itertools.product(range(1, 4), kernel["dtypes"]):
        values = patterns(dtypes.weight, kernel, share)
        want = kernel["sums"].flushed(values.double())
        for place in range(k):
            w = torch.zeros(len(values), k, dtype=dtypes.weight)
            w[:, place] = values
            x = torch.zeros(1, k, dtype=dtypes.x)
            x[0, place] = 1
            y = native.run(kernel, x, w, out=torch.empty(1, len(w)))
            assert same(y[0].double(), want), f"k = {place} of {k}"


@pytest.mark.parametrize("k", [1, 7, 67])
@every_kernel
@every_share
def test_every_activation_is_widened_exactly(share: int, kernel: Kernel, k: int) -> None:
    """All finite bit patterns of the formats of x pass through W = I; infinities and NaN spoil their own row."""
    for dtypes in kernel["dtypes"]:
        values = patterns(dtypes.x, kernel, share)
        eye = torch.eye(k, dtype=dtypes.weight)
        finite = values[values.isfinite()]
        x = finite[: len(finite) // k * k].reshape(-1, k)
        want = kernel["sums"].flushed(x.double())
        for dtype in (dtypes.x, torch.float32):
            assert same(native.run(kernel, x, eye, out=torch.empty(x.shape, dtype=dtype)).double(), want)
        special = values[~values.isfinite()][:: dtypes.x.itemsize]
        x = torch.ones(len(special), k, dtype=dtypes.x)
        at = torch.arange(len(special)), torch.arange(len(special)) % k
        x[at] = special
        y = native.run(kernel, x, eye)
        assert same(y[at], special)
        y[at] = torch.nan
        assert y.isnan().all()  # the others are inf * 0


@every_kernel
@every_share
def test_every_bias_is_widened_exactly(share: int, kernel: Kernel) -> None:
    """All bit patterns of the formats of the bias, added to zero."""
    of_x, of_weight, _ = kernel["dtypes"][0]
    for of_bias in kernel["of_bias"]:
        b = patterns(of_bias, kernel, share)
        x, w = torch.zeros(1, 1, dtype=of_x), torch.zeros(len(b), 1, dtype=of_weight)
        y = native.run(kernel, x, w, b, out=torch.empty(1, len(b)))
        assert same(y[0].double(), b.double())


@pytest.mark.parametrize("dtype", SIXTEEN_BIT, ids=str)
@every_kernel
@every_share
def test_outputs_are_rounded_as_torch_rounds(share: int, kernel: Kernel, dtype: torch.dtype) -> None:
    """fp32 results are stored to the nearest, ties to even, beyond the range as infinities, NaN as NaN."""
    of_x, of_weight, _ = kernel["dtypes"][0]
    b = patterns(torch.float32, kernel, share)
    x, w = torch.zeros(1, 1, dtype=of_x), torch.zeros(len(b), 1, dtype=of_weight)
    y = native.run(kernel, x, w, b, out=torch.empty(1, len(b), dtype=dtype))
    assert same(y[0], b.to(dtype))


@pytest.mark.exhaustive
@pytest.mark.parametrize("dtype", SIXTEEN_BIT, ids=str)
@pytest.mark.parametrize("kernel", [*{k["isa"]: k for k in native.RUNNABLE}.values()], ids=lambda kernel: kernel["isa"])
def test_all_floats_are_rounded_as_torch_rounds(kernel: Kernel, dtype: torch.dtype) -> None:
    """Each of the 2^32, on every ISA."""
    of_x, of_weight, _ = kernel["dtypes"][0]
    chunk = 1 << 22
    x, w, y = (
        torch.zeros(shape, dtype=d) for shape, d in (((1, 1), of_x), ((chunk, 1), of_weight), ((1, chunk), dtype))
    )
    for begin in range(0, 1 << 32, chunk):
        b = native.of_bits(torch.arange(begin, begin + chunk), torch.float32)
        native.run(kernel, x, w, b, out=y)
        assert same(y[0], b.to(dtype)), f"floats from 0x{begin:08x} on"


@pytest.mark.parametrize("k_slices", [1, 3])
@every_kernel
def test_outputs_are_rounded_once(kernel: Kernel, k_slices: int) -> None:
    """Every activation is applied to fp32 sums, and the bits of y are those of the fp32 output, rounded."""
    m, n, k = kernel["mr"] + 1, kernel["columns"] + 3, 97
    for step, dtypes in itertools.product(native.ACTIVATIONS, kernel["dtypes"]):
        x, w, b = native.random_case(m, n, k, dtypes)
        wide = native.run(kernel, x, w, b, [step], k_slices=k_slices, out=torch.empty(m, n))
        y = native.run(kernel, x, w, b, [step], k_slices=k_slices)
        assert y.dtype == dtypes.x and native.same_bits(y, wide.to(dtypes.x)), step


@every_kernel
def test_fp16_sums_are_promoted(kernel: Kernel) -> None:
    """No kernel adds more than 64 products in fp16, where 2048 + 1 is 2048; a lone product is rounded once."""
    x, w, _ = oracle.stored(kernel["dtypes"][0], torch.ones(3, 5001), torch.ones(5, 5001), None)
    assert (native.run(kernel, x, w, out=torch.empty(3, 5)) == 5001).all()
    if kernel["accumulate"] == "fp16":
        x, w, _ = native.random_case(64, 200, 1, kernel["dtypes"][0])
        y = native.run(kernel, x, w, out=torch.empty(64, 200))
        assert torch.equal(y, (x.float() @ w.float().T).half().float())


def test_the_table_pairs_the_formats() -> None:
    """Every format has kernels on every ISA with vectors of its own; fp32 kernels widen all of them but that of
    integer products, those that multiply bf16 take int8 in bf16, and those that multiply bytes in groups take 4 bits in
    bytes; in all, each format of x meets each 16-bit weight."""
    formats = list(_tensors.PACKED)
    assert formats == [*_tensors.FORMATS.values(), "w8f", "int8"] == ["fp32", "bf16", "fp16", "w8f", "int8"]
    table = _kernels.kernels()
    for kernel in table:
        assert kernel["reads"][0] == kernel["layout"] and len(set(kernel["reads"])) == len(kernel["reads"])
        assert kernel["format"] == kernel["name"].split("/")[0] == kernel["layout"].split("/")[0]
        integers, grouped = kernel["format"] == "int8", kernel["format"] in GROUPED
        assert kernel["rows"] in (
            ("uint8", "int16") if integers else ("fp32", "int8") if grouped else ("fp32", kernel["format"])
        )
        assert integers == (kernel["accumulate"] == "int32")
        widens = {layout.split("/")[0] for layout in kernel["reads"][1:]}
        pairs = kernel["format"] == kernel["rows"] == "bf16"
        others = set(formats[1:-1]) if kernel["format"] == "fp32" else {"w8f"} if pairs else set()
        assert widens - GROUPED == others
        whole_panels = bool(others) and kernel["columns"] % 32 == 0
        bytes_in_groups = kernel["format"] == "int8g" and kernel["rows"] == "int8"
        in_groups = GROUPED if whole_panels else {"int4"} if bytes_in_groups else set()
        assert widens & GROUPED == in_groups, kernel["name"]
    for isa in ("scalar", "avx2", "avx512"):
        own = [kernel for kernel in table if kernel["isa"] == isa]
        assert {kernel["format"] for kernel in own} == {*formats, *GROUPED}
        floating = [kernel for kernel in own if kernel["rows"] not in INTEGER_ROWS]
        assert {kernel["rows"] for kernel in floating} == {kernel["accumulate"] for kernel in floating} == {"fp32"}
    met = {(dtypes.x, dtypes.weight) for kernel in native.ALL for dtypes in kernel["dtypes"]}
    assert met >= set(itertools.product(native.FLOATS, SIXTEEN_BIT))
