"""A product touches its operands and nothing else: guard pages, canaries, poisoned gaps, offsets past 2^31.

What may die runs in a forked child, so that an overrun is one failed test with the case's name.
"""

import itertools
import math
from collections.abc import Callable
from typing import Any, Literal

import guard
import native
import oracle
import pytest
import torch
from native import Kernel, Note, every_integer_kernel, every_kernel
from torch import Tensor

import fastlinear._weights as _weights
from fastlinear.spec.int8 import Quantized, Requantize, Rows
from kernel import test_int8

SHAPES = ("one", "tile", "tile and one", "ragged")
EDGES: tuple[Literal["start", "end"], ...] = ("start", "end")


def shape(kernel: Kernel, name: str) -> tuple[int, int, int]:
    mr, nr, columns = kernel["mr"], kernel["nr"], kernel["columns"]
    sizes = {"one": (1, 1, 1), "tile": (mr, columns, 16), "tile and one": (mr + 1, columns + 1, 17)}
    return sizes.get(name, (max(1, mr - 1), columns + nr - 1, 5))


@every_kernel
@native.meetings
def test_nothing_outside_the_operands_is_touched(meeting: native.Meeting, kernel: Kernel) -> None:
    """x, W, bias and out flush against forbidden pages at either end, and one element off: no fault, the same bits."""
    steps = [("leaky_relu", (0.1,)), ("tanh", ())]

    def action(note: Note) -> None:
        for size, k_slices, dtypes in meeting(SHAPES, (1, 3), kernel["dtypes"]):
            x, w, b = native.random_case(*shape(kernel, size), dtypes)
            expected = native.run(kernel, x, w, b, steps, k_slices=k_slices)
            operands = {"x": x, "w": w, "out": expected, "bias": b}
            for name, at, offset, gap in meeting([*operands], EDGES, (0, 1), (0, 3)):
                note(f"{size}, {k_slices} slices, {dtypes}: {name} at its {at}, {offset} off, rows {gap} apart")
                near = dict(operands, out=torch.full_like(expected, torch.nan))
                values = operands[name]
                near[name] = guard.guarded(values, at, stride=values.shape[-1] + gap, offset=offset)
                if name == "out":
                    near[name].fill_(torch.nan)
                y = native.run(kernel, near["x"], near["w"], near["bias"], steps, k_slices=k_slices, out=near["out"])
                assert native.same_bits(y, expected)

    native.in_child(action)


def fenced_pack(at: Literal["start", "end"]) -> Callable[..., _weights.Packed]:
    """`native.pack`, whose panels, with what stands behind them, lie against a forbidden page: flush, or as near as
    their beginning at a multiple of 64 bytes lets them."""
    pack = native.pack

    def fenced(*weight: Any) -> _weights.Packed:
        packed = pack(*weight)
        panels = guard.guarded(packed.data, at, offset=-packed.data.numel() % 64 if at == "end" else 0)
        return _weights.Packed.over(panels.numpy(), packed.layout, packed.n, packed.k)

    return fenced


@pytest.mark.parametrize("at", EDGES)
@every_kernel
def test_panels_are_not_left(kernel: Kernel, at: Literal["start", "end"], monkeypatch: pytest.MonkeyPatch) -> None:
    """The packed panels flush against forbidden pages: no kernel reads a byte beyond them."""
    monkeypatch.setattr(native, "pack", fenced_pack(at))

    def action(note: Note) -> None:
        for m, n, k, k_slices in panels_of(kernel):
            note(f"{m} x {n} x {k}, {k_slices} slices")
            x, w, _ = native.exact_case(kernel, m, n, k, kernel["dtypes"][0])
            native.check(kernel, native.run(kernel, x, w, k_slices=k_slices), x, w, exact=True)

    native.in_child(action)


@pytest.mark.parametrize("at", EDGES)
@every_integer_kernel
def test_integer_panels_are_not_left(
    kernel: Kernel, at: Literal["start", "end"], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nor beyond the scales, sums and zero points behind the panels of integer products."""
    monkeypatch.setattr(native, "pack", fenced_pack(at))

    def action(note: Note) -> None:
        for m, n, k, k_slices in panels_of(kernel):
            note(f"{m} x {n} x {k}, {k_slices} slices")
            q = test_int8.weight(n, k, zeros=True)
            test_int8.held(kernel, torch.randn(m, k), q, test_int8.KINDS["asymmetric"], k_slices=k_slices)

    native.in_child(action)


def panels_of(kernel: Kernel) -> list[tuple[int, int, int, int]]:
    """(M, N, K, slices of K) that end within a panel, with it and within the next."""
    columns = (1, kernel["nr"], kernel["columns"], 2 * kernel["columns"] + 1)
    rows = [(1, 1, 1), (kernel["mr"] + 1, 23, 1), (2 * kernel["mr"], 23, 3)]
    return [(m, n, k, k_slices) for n in columns for m, k, k_slices in rows]


@every_kernel
def test_rows_that_are_copied_stay_inside(kernel: Kernel) -> None:
    """Rows 4096 bytes apart, which the driver copies, end at a forbidden page: the copy stops in time."""

    def action(note: Note) -> None:
        for dtypes, at in itertools.product(kernel["dtypes"], EDGES):
            note(f"{dtypes}: x at its {at}")
            x, w, b = native.random_case(2 * kernel["mr"], 3, 19, dtypes)
            near = guard.guarded(x, at, stride=4096 // x.itemsize)
            native.check(kernel, native.run(kernel, near, w, b), x, w, b)

    native.in_child(action)


@pytest.mark.parametrize(("size", "k_slices"), list(itertools.product(SHAPES, (1, 3))))
@every_kernel
def test_only_the_output_is_written(kernel: Kernel, size: str, k_slices: int) -> None:
    """With rows of out further apart than N, and out in the middle of other data, every other element is intact."""
    m, n, k = shape(kernel, size)
    for gap, threads, dtypes in native.together((0, 1, 16, 100), (1, 2, 2), kernel["dtypes"]):
        x, w, b = native.random_case(m, n, k, dtypes)
        torch.set_num_threads(threads)
        out, intact = guard.canaried(m, n, n + gap, dtypes.x)
        native.run(kernel, x, w, b, [("gelu", ())], threads=threads, k_slices=k_slices, out=out)
        assert intact()
        native.check(kernel, out, x, w, b, "gelu")


@pytest.mark.parametrize("size", SHAPES)
@every_kernel
def test_what_lies_around_x_never_leaks(kernel: Kernel, size: str) -> None:
    """x in the middle of NaN, in its gaps and after its rows, gives the bits of x alone; so does a bias amid NaN."""
    m, n, k = shape(kernel, size)
    for dtypes in kernel["dtypes"]:
        x, w, b = native.random_case(m, n, k, dtypes)
        expected = native.run(kernel, x, w, b)
        amid = torch.full((m + 2 * kernel["mr"], k + 40), torch.nan, dtype=dtypes.x)
        amid[1 : m + 1, 7 : k + 7] = x
        bias = torch.full((n + 128,), torch.nan, dtype=dtypes.bias)
        bias[5 : n + 5] = b
        assert native.same_bits(native.run(kernel, amid[1 : m + 1, 7 : k + 7], w, bias[5 : n + 5]), expected)


@pytest.mark.parametrize("k_slices", [1, 3])
@every_kernel
def test_scratch_of_an_earlier_call_never_leaks(kernel: Kernel, k_slices: int) -> None:
    """After products that leave NaN in the scratch tiles, rows and partial sums, the next one has its usual bits."""
    m, n, k = kernel["mr"] + 1, kernel["columns"] + 1, 9
    for dtypes in kernel["dtypes"]:
        x, w, b = native.random_case(m, n, k, dtypes)
        expected = native.run(kernel, x, w, b, k_slices=k_slices)
        poison = torch.full((4 * m, 1024), torch.nan, dtype=dtypes.x)
        bias = torch.full((4 * n,), torch.nan, dtype=dtypes.bias)
        for k_poison, slices in itertools.product((1024, 1, 0), (1, 3)):
            weight = torch.ones(4 * n, k_poison, dtype=dtypes.weight)
            native.run(kernel, poison[:, :k_poison], weight, bias, k_slices=slices)
            assert native.same_bits(native.run(kernel, x, w, b, k_slices=k_slices), expected)


@every_kernel
def test_rows_with_any_stride(kernel: Kernel) -> None:
    """One row expanded (stride 0), overlapping rows (a sliding window) and every second row."""
    m, n, k = kernel["mr"] + 3, kernel["columns"] + 1, 23
    for dtypes in kernel["dtypes"]:
        _, w, _ = native.random_case(m, n, k, dtypes)
        long = torch.randn(m + k)
        views = {"expanded": torch.randn(1, k).to(dtypes.x).expand(m, k)}
        views["sliding"] = long.to(dtypes.x).as_strided((m, k), (1, 1))
        views["every second"] = torch.randn(2 * m, k).to(dtypes.x)[::2]
        for name, x in views.items():
            assert native.same_bits(native.run(kernel, x, w), native.run(kernel, x.contiguous(), w)), name


FAR = 2**30 + 1027  # elements from row to row: the fourth row begins past 2^31 elements


def far(values: Tensor) -> Tensor:
    """A copy of `values` with its rows FAR elements apart."""
    rows, columns = values.shape
    memory = guard.sparse((rows - 1) * FAR + columns, values.dtype)
    return memory.as_strided((rows, columns), (FAR, 1)).copy_(values)


@every_kernel
def test_offsets_past_2_to_31(kernel: Kernel) -> None:
    """Rows of x, of W and of out that lie gigabytes apart are found, with collisions in the cache as well."""
    for dtypes in kernel["dtypes"]:
        x, w, b = native.random_case(4, 4, 21, dtypes)
        expected = native.run(kernel, x, w, b)
        assert native.same_bits(native.run(kernel, far(x), w, b), expected)
        assert native.same_bits(native.run(kernel, x, far(w), b), expected)
        assert native.same_bits(native.run(kernel, x, w, b, out=far(torch.zeros_like(expected))), expected)
        both = native.run(kernel, far(x), far(w), b, k_slices=2, out=far(torch.zeros_like(expected)))
        native.check(kernel, both.contiguous(), x, w, b)


@every_kernel
def test_infinities_meet_no_padding(kernel: Kernel) -> None:
    """Infinite x with N, M and K one short of and one past the tile: the zeros of the last panel make no NaN."""
    shapes = itertools.product((1, kernel["mr"] + 1), (1, kernel["nr"] - 1, kernel["columns"] + 1), (1, 2, 5))
    for (m, n, k), dtypes in itertools.product(shapes, kernel["dtypes"]):
        x, w, b = oracle.stored(dtypes, torch.full((m, k), math.inf), torch.ones(n, k), torch.ones(n))
        assert (native.run(kernel, x, w, b) == math.inf).all()


# ---- integer products ------------------------------------------------------------------------------------------------

FORMS = [  # rows, dtype of x, dtype of the bias, output
    (Rows("symmetric"), torch.float32, torch.float32, torch.float32),
    (Rows("asymmetric"), torch.bfloat16, torch.float16, torch.bfloat16),
    (Rows("static", 0.02, 9), torch.uint8, torch.float32, Requantize(torch.uint8, 0.1, 30)),
    (Rows("static", 0.02, 9), torch.int8, torch.bfloat16, torch.float16),
]


def integer_case(m: int, n: int, k: int, of_x: torch.dtype, of_bias: torch.dtype) -> tuple[Tensor, Quantized, Tensor]:
    values, zero = torch.randint(-128, 128, (n, k), dtype=torch.int8), torch.randint(-128, 128, (n,), dtype=torch.int32)
    x = (torch.randn(m, k) * (1 if of_x.is_floating_point else 40)).to(of_x)
    return x, Quantized(values, torch.rand(n) / 100, zero), torch.randn(n).to(of_bias)


@every_integer_kernel
@native.meetings
def test_integer_products_touch_nothing_outside(meeting: native.Meeting, kernel: Kernel) -> None:
    """x, bias, smoothing and out flush against forbidden pages at either end, in each form: no fault, the same bits."""

    def action(note: Note) -> None:
        for size, k_slices, (rows, of_x, of_bias, to) in meeting(SHAPES, (1, 3), FORMS):
            m, n, k = shape(kernel, size)
            x, q, b = integer_case(m, n, k, of_x, of_bias)
            smooth = torch.rand(k) + 0.5 if of_x.is_floating_point else None
            rows = rows._replace(smooth=smooth)
            expected = native.integers(kernel, x, q, rows, b, [("relu", ())], to, k_slices=k_slices)
            operands = {"x": x, "bias": b, "out": torch.full_like(expected, 77)}
            for name, at, offset, gap in meeting([*operands], EDGES, (0, 1), (0, 3)):
                note(f"{size}, {k_slices} slices, {rows.kind} {of_x}: {name} at its {at}, {offset} off, {gap} apart")
                stride = operands[name].shape[-1] + gap
                near = operands | {name: guard.guarded(operands[name], at, stride=stride, offset=offset)}
                fenced = rows if smooth is None else rows._replace(smooth=guard.guarded(smooth, at))
                given = (near["x"], q, fenced, near["bias"], [("relu", ())], to)
                y = native.integers(kernel, *given, k_slices=k_slices, out=near["out"])
                assert native.same_bits(y, expected)

    native.in_child(action)


@pytest.mark.parametrize("size", SHAPES)
@every_integer_kernel
def test_integer_products_write_the_output_alone(kernel: Kernel, size: str) -> None:
    """What lies between the rows of out and around it is intact; what lies around x, NaN or not, never leaks."""
    m, n, k = shape(kernel, size)
    for (rows, of_x, of_bias, to), gap, threads in native.together(FORMS, (0, 1, 16, 100), (1, 2)):
        x, q, b = integer_case(m, n, k, of_x, of_bias)
        expected = native.integers(kernel, x, q, rows, b, (), to)
        out, intact = guard.canaried(m, n, n + gap, expected.dtype)
        amid = torch.full((m + 2, k + 40), math.nan if of_x.is_floating_point else 99).to(of_x)
        amid[1 : m + 1, 7 : k + 7] = x
        torch.set_num_threads(threads)
        native.integers(kernel, amid[1 : m + 1, 7 : k + 7], q, rows, b, (), to, threads=threads, out=out)
        assert intact() and native.same_bits(out, expected)


@every_integer_kernel
def test_integer_scratch_never_leaks(kernel: Kernel) -> None:
    """After wider, longer rows of NaN and of bytes, the next product has its usual bits, also past the end of K."""
    for rows, of_x, of_bias, to in FORMS:
        x, q, b = integer_case(kernel["mr"] + 1, kernel["columns"] + 1, 9, of_x, of_bias)
        expected = native.integers(kernel, x, q, rows, b, (), to, k_slices=2)
        _, wide, _ = integer_case(1, len(b), 300, of_x, of_bias)
        for poison in (torch.full((50, 300), math.nan), torch.full((50, 300), 255, dtype=torch.uint8)):
            native.integers(kernel, poison, wide, Rows("static", 1.0, 255), k_slices=3)
            assert native.same_bits(native.integers(kernel, x, q, rows, b, (), to, k_slices=2), expected)


@every_integer_kernel
def test_integer_rows_past_2_to_31(kernel: Kernel) -> None:
    """Rows of x and of out that lie gigabytes apart are found."""
    for rows, of_x, of_bias, to in FORMS[::3]:
        x, q, b = integer_case(4, 4, 21, of_x, of_bias)
        expected = native.integers(kernel, x, q, rows, b, (), to)
        y = native.integers(kernel, far(x), q, rows, b, (), to, out=far(torch.zeros_like(expected)))
        assert native.same_bits(y.contiguous(), expected)
