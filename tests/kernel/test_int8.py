"""int8 on every kernel: to the last bit what fastlinear/spec/int8.py says, for any ISA, edges and threads."""

import itertools
import math
from collections.abc import Callable
from typing import Any

import native
import pytest
import torch
from library import Steps
from native import Kernel, every_integer_kernel
from torch import Tensor
from torch.nn import functional as F

import fastlinear._products as _products
import fastlinear._weights as _weights
from fastlinear._plans import Epilogue, Plan, RowQuantizer
from fastlinear._weights import Packed
from fastlinear.spec import int8
from fastlinear.spec.int8 import Quantized, Requantize, Rows

INF, NAN, TINY = math.inf, math.nan, 2.0**-126
INTEGERS = [torch.uint8, torch.int8]
KINDS = {"symmetric": Rows("symmetric"), "asymmetric": Rows("asymmetric"), "static": Rows("static", 0.02, 77)}
every_kind = pytest.mark.parametrize("rows", KINDS.values(), ids=KINDS)

# Activations that round at most once, so that their bits are promised, too.
STEPS: dict[str, tuple[Steps, Callable[[Tensor], Tensor] | None]] = {
    "none": ((), None),
    "relu": ([("relu", ())], torch.relu),
    "relu6": ([("relu6", ())], F.relu6),
    "hardtanh": ([("hardtanh", (-0.5, 0.75))], lambda y: F.hardtanh(y, -0.5, 0.75)),
    "leaky_relu": ([("leaky_relu", (0.125,))], lambda y: F.leaky_relu(y, 0.125)),
}


def weight(n: int, k: int, zeros: bool = False) -> Quantized:
    """Values of all bytes, such that sums of normal x have about unit variance."""
    values = torch.randint(-128, 128, (n, k), dtype=torch.int8)
    zero = torch.randint(-128, 128, (n,), dtype=torch.int32) if zeros else None
    return Quantized(values, torch.rand(n) / (74 * math.sqrt(max(k, 1))), zero)


def whole(values: Tensor, zero: Tensor | None = None) -> Quantized:
    """The weight values - zero."""
    return Quantized(values, torch.ones(len(values)), zero)


def numbers(dtype: torch.dtype, *shape: int) -> Tensor:
    if dtype in INTEGERS:
        return native.of_bits(torch.randint(0, 256, shape), dtype)
    return torch.randn(shape).to(dtype)


def agree(y: Tensor, want: Tensor) -> bool:
    """The same dtype and bits, and NaN for NaN."""
    if y.dtype != want.dtype or y.shape != want.shape:
        return False
    return bool(((native.bits(y) == native.bits(want)) | (y.isnan() & want.isnan())).all())


def held(
    kernel: Kernel,
    x: Tensor,
    q: Quantized,
    rows: Rows,
    b: Tensor | None = None,
    step: str = "none",
    to: torch.dtype | Requantize | None = None,
    **how: Any,
) -> Tensor:
    """The product on this kernel, which is the specification's to the last bit."""
    steps, activation = STEPS[step]
    y = native.integers(kernel, x, q, rows, b, steps, to, **how)
    assert agree(y, int8.linear(x, q, rows, b, activation, to))
    return y


# ---- sums ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", INTEGERS, ids=str)
@every_integer_kernel
def test_every_pair_of_bytes(kernel: Kernel, dtype: torch.dtype) -> None:
    """All 65,536 products u8 x s8, and s8 x s8 by offset, at every place in and after a group of four k."""
    bytes_of_x = native.of_bits(torch.arange(256), dtype)
    bytes_of_w = torch.arange(-128, 128).to(torch.int8)
    rows = Rows("static", 1.0, 0 if dtype is torch.uint8 else 128)
    for place in range(7):
        x, w = torch.zeros(256, 7, dtype=dtype), torch.zeros(256, 7, dtype=torch.int8)
        x[:, place], w[:, place] = bytes_of_x, bytes_of_w
        y = native.integers(kernel, x, whole(w), rows)
        assert torch.equal(y, bytes_of_x.float()[:, None] * bytes_of_w.float())


@pytest.mark.parametrize("zero_x", [0, 128, 255])
@every_integer_kernel
def test_extremes_in_all_patterns_of_four(kernel: Kernel, zero_x: int) -> None:
    """0 and 255 by -128 and 127, in all 16 x 16 patterns of four, repeated over K: nothing saturates on the way."""
    fours = torch.tensor([*itertools.product((0, 1), repeat=4)])
    for repeats, zeros in itertools.product((1, 2, 9), (False, True)):
        x = (fours * 255).to(torch.uint8).repeat(1, repeats)
        w = (fours * 255 - 128).to(torch.int8).repeat(1, repeats)
        zero = torch.tensor([-128, 127, 0, 1] * 4, dtype=torch.int32) if zeros else None
        y = native.integers(kernel, x, whole(w, zero), Rows("static", 1.0, zero_x))
        centered = w.double() - (0 if zero is None else zero[:, None])
        assert torch.equal(y.double(), (x.double() - zero_x) @ centered.T)


@pytest.mark.parametrize("zeros", [False, True])
@every_integer_kernel
def test_the_longest_sums(kernel: Kernel, zeros: bool) -> None:
    """K at its limit with the largest numbers of either sign, and any: int32 holds the sums, in blocks and slices."""
    k, n = _weights.dot_limit(zeros), kernel["nr"] + 1
    largest = torch.tensor([255, 0, 255], dtype=torch.uint8)[:, None].repeat(1, k)
    largest[2] = torch.randint(0, 2, (k,)) * 255
    values = torch.full((n, k), -128, dtype=torch.int8)
    values[1::3] = 127
    values[2::3] = torch.randint(-128, 128, (len(values[2::3]), k), dtype=torch.int8)
    zero = torch.where(torch.arange(n) % 3 == 0, 127, -128).int() if zeros else None
    for zero_x, k_slices in ((0, 1), (255, 3)):
        held(kernel, largest, whole(values, zero), Rows("static", 1.0, zero_x), k_slices=k_slices)


def test_the_limit_of_k() -> None:
    """255 * max |q - zero| * K < 2^31, checked when packing; zero points that are all 0 are none."""
    assert (_weights.dot_limit(), _weights.dot_limit(True)) == (65793, 33025)
    assert (int8.longest(None), int8.longest(torch.ones(1))) == (65793, 33025)
    one, none = torch.ones(1, dtype=torch.int32), torch.zeros(1, dtype=torch.int32)
    for layout in [layout for layout, *_ in native.LAYOUTS if layout.startswith("int8/")]:
        for zero, limit, said in ((None, 65793, ""), (none, 65793, ""), (one, 33025, " with zero points")):
            Packed(torch.zeros(1, limit, dtype=torch.int8), layout, torch.ones(1), zero)
            too_long = torch.zeros(1, limit + 1, dtype=torch.int8)
            message = f"^int8 products of weights{said} have K of at most {limit}, .* this weight has {limit + 1}$"
            with pytest.raises(ValueError, match=message):
                Packed(too_long, layout, torch.ones(1), zero)
        with pytest.raises(ValueError, match="at most 65793"):
            _weights.packed_nbytes(layout, 1, 65794)
    Packed(torch.zeros(1, 70000, dtype=torch.int8), "w8f/16x1", torch.ones(1))


# ---- layers ----------------------------------------------------------------------------------------------------------

SHARES = 4  # of the cases of a kernel
OUTPUTS = [None, *native.FLOATS, Requantize(torch.uint8, 0.03, 3), Requantize(torch.int8, 0.02, 200)]


def factors(kernel: Kernel) -> list[list[Any]]:
    """M, N, K, kind of rows, dtype of x, zero points, dtype of the bias, activation, output, threads, K slices."""
    mr, nr, columns = kernel["mr"], kernel["nr"], kernel["columns"]
    return [
        sorted({1, max(1, mr - 1), mr, mr + 1, 2 * mr + 1, 40}),
        sorted({1, nr - 1, nr, nr + 1, columns, columns + 3, 2 * columns + nr + 1}),
        [0, 1, 3, 4, 5, 16, 97, 1000],
        list(KINDS.values()),
        [*native.FLOATS, *INTEGERS],
        [False, True],
        [None, *native.FLOATS],
        list(STEPS),
        OUTPUTS,
        [1, 2, 5],
        [1, 2, 3, 150],
    ]


@pytest.mark.parametrize("share", range(SHARES))
@every_integer_kernel
def test_layers_are_the_specifications(kernel: Kernel, share: int) -> None:
    """To the last bit, with every two values of `factors` together; slices may outnumber K."""
    torch.set_num_threads(2)
    cases = native.pairwise(*factors(kernel))[share::SHARES]
    for m, n, k, rows, of_x, zeros, of_bias, step, to, threads, k_slices in cases:
        rows = KINDS["static"] if of_x in INTEGERS else rows
        b = None if of_bias is None else torch.randn(n).to(of_bias)
        held(kernel, numbers(of_x, m, k), weight(n, k, zeros), rows, b, step, to, threads=threads, k_slices=k_slices)


@every_kind
@every_integer_kernel
def test_every_isa_has_the_same_bits(kernel: Kernel, rows: Rows) -> None:
    """Those of plain C++, for any threads and slices, in fp32 and rounded to 16 bits."""
    scalar = next(k for k in native.INTEGER if k["isa"] == "scalar")
    x, q, b = torch.randn(29, 331), weight(83, 331, zeros=True), torch.randn(83)
    torch.set_num_threads(2)
    for to, threads, k_slices in zip(native.FLOATS, (1, 3, 8), (7, 1, 2), strict=True):
        want = native.integers(scalar, x, q, rows, b, [("relu", ())], to)
        for _ in range(2):
            y = native.integers(kernel, x, q, rows, b, [("relu", ())], to, threads=threads, k_slices=k_slices)
            assert native.same_bits(y, want)


@every_integer_kernel
def test_other_activations_follow_the_numbers(kernel: Kernel) -> None:
    """A chain of any steps gives what the same steps give of the layer's own fp32 numbers, as a bias of zeros."""
    x, q, b = torch.randn(7, 33), weight(37, 33), torch.randn(37)
    chain: Steps = [("gelu", ()), ("tanh", ())]
    plain = native.integers(kernel, x, q, Rows(), b)
    nothing = Quantized(torch.zeros(plain.numel(), 1, dtype=torch.int8), torch.ones(plain.numel()))
    alone = native.integers(kernel, torch.zeros(1, 1), nothing, Rows(), plain.flatten(), chain)
    assert native.same_bits(native.integers(kernel, x, q, Rows(), b, chain), alone.reshape(plain.shape))


@every_kind
@every_integer_kernel
def test_more_rows_than_a_block(kernel: Kernel, rows: Rows) -> None:
    """Rows are quantized a few MB at a time: of more, each is what it is alone."""
    k = 8188
    m = native.blocks(kernel["rows"])[2] // (k * (2 if kernel["rows"] == "int16" else 1)) + 2 * kernel["mr"] + 1
    x, q = torch.randn(m, k), weight(5, k, zeros=True)
    torch.set_num_threads(2)
    held(kernel, x, q, rows, threads=2)
    held(kernel, x.bfloat16(), q, rows, to=Requantize(torch.uint8, 0.02, 9))


# ---- rows of x -------------------------------------------------------------------------------------------------------


def placed(value: float, at: int, k: int) -> Tensor:
    row = torch.randn(k)
    row[at] = value
    return row


def odd_rows(k: int) -> list[Tensor]:
    """Rows at the edges of what can be quantized."""
    halves = torch.arange(k) % 127 + 0.5
    halves[0], signs = 127.0, torch.where(torch.arange(k) % 3 == 0, -1.0, 1.0)
    edge = torch.full((k,), 127 * TINY)  # a symmetric scale of 2^-126
    constants = [torch.full((k,), value) for value in (0.0, -0.0, 3.5, -2.25, 1e-45, -1e-39, 1e-36, 3e38, -3.4e38)]
    edges = [edge, edge.nextafter(torch.tensor(0.0)), 255 / 127 * edge, signs * edge / 2]
    ties = [halves, signs * halves, halves.abs() * 2, torch.where(halves == 127.0, -0.5, halves * 2), -halves]
    huge = [signs * 3.4e38, torch.randn(k) * 1e38, placed(3.4e38, k - 1, k), placed(1e-40, 0, k) * 1e-38]
    special = [placed(v, at, k) for v in (INF, -INF, NAN, -NAN) for at in (0, k // 2, k - 1)]
    both = placed(INF, 3, k)
    both[5] = NAN
    return [*constants, *edges, *ties, *huge, *special, both, torch.full((k,), NAN), placed(127.0, 2, k) * 0.0]


@pytest.mark.parametrize("of_x", native.FLOATS, ids=str)
@every_kind
@every_integer_kernel
def test_odd_rows(kernel: Kernel, rows: Rows, of_x: torch.dtype) -> None:
    """Zeros, constants, denormals, ties, the largest numbers, infinities and NaN: as specified, and in their row only.

    A row that is not finite is NaN as a whole; in static rows infinities saturate.
    """
    for k, zeros in ((37, True), (64, False)):
        odd = torch.stack(odd_rows(k)).to(of_x)
        usual = torch.randn_like(odd)
        x = torch.stack([usual, odd], 1).reshape(-1, k)
        q = weight(kernel["nr"] + 3, k, zeros)
        b = torch.randn(len(q.values)) if zeros else None  # beside a bias the smallest numbers do not show
        y = held(kernel, x, q, rows, b, "relu", torch.float32)
        assert torch.equal(y[::2], held(kernel, usual, q, rows, b, "relu", torch.float32))
        lost = odd.isnan().any(1) if rows.kind == "static" else ~odd.isfinite().all(1)
        assert torch.equal(y[1::2].isnan(), lost[:, None].expand(-1, y.shape[1]))


@every_integer_kernel
def test_any_static_range(kernel: Kernel) -> None:
    """The smallest and largest scales and zero points; what lies outside of the range saturates."""
    x = torch.cat([torch.randn(5, 40) * scale for scale in (1e-38, 1.0, 1e5, 1e38)])
    for scale, zero in itertools.product((TINY, 1e-3, 1.0, 3e38), (0, 1, 128, 254, 255)):
        held(kernel, x, weight(9, 40, zeros=True), Rows("static", scale, zero))


@every_kind
@every_integer_kernel
def test_smoothed_rows(kernel: Kernel, rows: Rows) -> None:
    """x * smooth in fp32, before anything else, for any K and dtype; also where it overflows or vanishes."""
    for of_x, k in native.together(native.FLOATS, (1, 15, 16, 17, 100)):
        x, q = torch.randn(kernel["mr"] + 1, k).to(of_x), weight(kernel["nr"] + 1, k)
        for smooth in (torch.rand(k) + 0.5, torch.full((k,), 3e38), torch.full((k,), 1e-42), torch.zeros(k)):
            held(kernel, x, q, rows._replace(smooth=smooth), torch.randn(len(q.values)))


@pytest.mark.parametrize("of_x", [*native.FLOATS, *INTEGERS], ids=str)
@every_integer_kernel
def test_rows_with_any_stride(kernel: Kernel, of_x: torch.dtype) -> None:
    """Every second row, one row expanded, overlapping rows, rows in the middle of others, at any address."""
    m, k = kernel["mr"] + 3, 23
    q = weight(kernel["nr"] + 1, k, zeros=True)
    wide, long = numbers(of_x, 2 * m, k + 9), numbers(of_x, 1, m + k)[0]
    views = [wide[::2, 3 : k + 3], wide[1:2, 1 : k + 1].expand(m, k), long.as_strided((m, k), (1, 1)), wide[:m, 9:]]
    for rows, x in itertools.product([KINDS["static"]] if of_x in INTEGERS else KINDS.values(), views):
        held(kernel, x, q, rows)


# ---- integers out ----------------------------------------------------------------------------------------------------

RANGES = [(1.0, 0), (1.0, 128), (1.0, 255), (0.02, 77), (3e38, 5), (TINY, 250)]


@pytest.mark.parametrize("dtype", INTEGERS, ids=str)
@pytest.mark.parametrize("kernel", [native.parameter(kernel) for kernel in native.ALL])
def test_requantized_outputs(kernel: Kernel, dtype: torch.dtype) -> None:
    """Every kernel stores uint8 and int8: to nearest, ties to even, saturated, NaN as the lowest; given as biases."""
    ties = torch.arange(-300, 300) + 0.5
    values = torch.cat([ties, ties.nextafter(torch.tensor(INF)), torch.randn(99) * 100, torch.randn(9) * 1e-38])
    values = torch.cat([values, torch.tensor([NAN, INF, -INF, 3e38, -3e38, 0.0, -0.0])])
    w = torch.zeros(len(values), 1, dtype=native.DTYPES[kernel["format"]])
    packed, x = native.pack(w, kernel["layout"]), torch.zeros(1, 1, dtype=kernel["of_x"][0])
    rows = RowQuantizer("symmetric") if kernel["format"] == "int8" else None
    for scale, zero in RANGES:
        out = torch.full((1, len(values)), 77, dtype=dtype)
        native.product(kernel, packed, x, values, (), 1, 1, out, rows, (dtype, scale, zero))
        assert torch.equal(out[0], int8.requantize(values, Requantize(dtype, scale, zero)))


@pytest.mark.parametrize("dtype", INTEGERS, ids=str)
@every_integer_kernel
def test_layers_in_a_chain(kernel: Kernel, dtype: torch.dtype) -> None:
    """Integers that one layer makes are what the next one reads, with no number in between."""
    x, between = torch.randn(kernel["mr"] + 1, 50), Requantize(dtype, 0.02, 30)
    first, second, b = weight(61, 50), weight(37, 61, zeros=True), torch.randn(61)
    middle = held(kernel, x, first, Rows("asymmetric"), b, "relu", between)
    assert middle.dtype == dtype and len(middle.unique()) > 20
    held(kernel, middle, second, Rows("static", between.scale, between.zero), to=torch.float32)


# ---- weights alone ---------------------------------------------------------------------------------------------------

WEIGHT_ONLY = [kernel for kernel in native.FLOATING if kernel["format"] == "w8f"]


def weight_only(kernel: Kernel, x: Tensor, q: Quantized, b: Tensor | None, steps: Steps = (), **how: Any) -> Tensor:
    out = torch.full((len(x), len(q.values)), NAN, dtype=how.pop("to", torch.float32))
    packed = native.pack(q.values, kernel["layout"], q.scale)
    return native.product(kernel, packed, x, b, steps, how.get("threads", 1), how.get("k_slices", 1), out)


@pytest.mark.parametrize(
    ("kernel", "of_x"),
    [native.parameter(kernel, x, id=f"{kernel['id']}-{x}") for kernel in WEIGHT_ONLY for x in kernel["of_x"]],
)
def test_weights_alone(kernel: Kernel, of_x: torch.dtype) -> None:
    """Within the bound of fp32 sums for the weight scale * q; exact for integers and scales that are powers of two."""
    n = kernel["columns"] + 3
    for m, k, k_slices in ((1, 1, 1), (kernel["mr"] + 1, 97, 1), (2 * kernel["mr"] + 1, 331, 3)):
        q, b = weight(n, k), torch.randn(n)
        x = torch.randn(m, k).to(of_x)
        w = q.scale.double()[:, None] * q.values.double()
        native.check(kernel, weight_only(kernel, x, q, b, k_slices=k_slices, to=of_x), x, w, b)
        powers = Quantized(q.values, 2.0 ** torch.randint(-9, 9, (n,)))
        x, b = torch.randint(-8, 9, (m, k)).to(of_x), b.round()
        w = powers.scale.double()[:, None] * powers.values.double()
        want = (x.double() @ w.T + b).relu()
        y = weight_only(kernel, x, powers, b, [("relu", ())], k_slices=k_slices)
        assert torch.equal(y.double(), want)


@pytest.mark.parametrize("kernel", [native.parameter(kernel) for kernel in WEIGHT_ONLY])
def test_weights_alone_are_scaled_once(kernel: Kernel) -> None:
    """y = (sum * scale) + bias, each rounded once, so that the bits are the same on every ISA where the sums are."""
    x, q = torch.randint(-8, 9, (5, 33)).to(kernel["of_x"][0]), weight(41, 33)
    b = torch.randn(41)
    want = (x.float() @ q.values.float().T) * q.scale + b
    assert native.same_bits(weight_only(kernel, x, q, b), want)
    assert native.same_bits(weight_only(kernel, x, q, b, k_slices=2, threads=2), want)


# ---- what the door refuses -------------------------------------------------------------------------------------------

M, N, K = 5, 37, 10
INTEGER = next(k for k in native.INTEGER if k["runnable"])
PLAIN = next(k for k in native.RUNNABLE if k["own"] == "fp32")
LAYOUT, VALUES, ONES = INTEGER["layout"], torch.ones(N, K, dtype=torch.int8), torch.ones(N)
ALONE = next(k["layout"] for k in native.RUNNABLE if k["format"] == "w8f")


def product(**changed: Any) -> None:
    """A valid integer product, but for what is changed."""
    ready: dict[str, Any] = {"packed": Packed(VALUES, LAYOUT, ONES), "plan": Plan(INTEGER["name"])}
    ready |= {"epilogue": Epilogue(), "x": torch.ones(M, K), "bias": ONES, "out": torch.empty(M, N)}
    ready |= {"rows": RowQuantizer("symmetric"), **changed}
    _products.run(*ready.values())


def to(dtype: torch.dtype) -> Epilogue:
    return Epilogue(out=(dtype, 0.5, 7))


def byte(dtype: torch.dtype, *shape: int) -> Tensor:
    return torch.ones(shape, dtype=dtype)


STATIC = Rows("static", 0.5, 3)
WHERE = f"kernel '{INTEGER['name']}' on a weight in '{LAYOUT}' does not take x of"
SCALE_IS = rf"^scale must be a torch.float32 CPU tensor of shape \({N},\), not"
ZERO_IS = rf"^zero must be a torch.int32 CPU tensor of shape \({N},\), not"
STATIC_IS = "^static rows take a scale above 0 and a zero from 0 to 255, not"
OUT_IS = r"^out is \(torch.uint8 or torch.int8, scale above 0, zero from 0 to 255\), not"

REFUSED: dict[str, tuple[str, Callable[[], object]]] = {
    "no scale": (f"{SCALE_IS} a NoneType", lambda: Packed(VALUES, LAYOUT)),
    "no scale, weight-only": (f"{SCALE_IS} a NoneType", lambda: Packed(VALUES, ALONE)),
    "scale too short": (rf"{SCALE_IS} .*\({N - 1},\)", lambda: Packed(VALUES, LAYOUT, torch.ones(N - 1))),
    "scale in fp64": (f"{SCALE_IS} a torch.float64", lambda: Packed(VALUES, LAYOUT, ONES.double())),
    "scale of 2 dimensions": (SCALE_IS, lambda: Packed(VALUES, LAYOUT, ONES[:, None])),
    "scale on meta": (f"{SCALE_IS} .* on meta", lambda: Packed(VALUES, LAYOUT, ONES.to("meta"))),
    "zero in int64": (f"{ZERO_IS} a torch.int64", lambda: Packed(VALUES, LAYOUT, ONES, ONES.long())),
    "zero too long": (ZERO_IS, lambda: Packed(VALUES, LAYOUT, ONES, torch.ones(N + 1).int())),
    "zero, weight-only": (f"^layout '{ALONE}' holds no zero points$", lambda: Packed(VALUES, ALONE, ONES, ONES.int())),
    "scale of numbers": (
        f"^layout '{PLAIN['layout']}' holds no scales$",
        lambda: Packed(torch.ones(N, K), PLAIN["layout"], ONES),
    ),
    "kind of rows": ("^kind is one of symmetric, asymmetric, static, groups, not 'odd'$", lambda: RowQuantizer("odd")),
    "static without scale": (f"{STATIC_IS} 0.0 and 0$", lambda: RowQuantizer("static")),
    "negative scale": (f"{STATIC_IS} -1.0 and 0$", lambda: RowQuantizer("static", -1.0)),
    "denormal scale": (f"{STATIC_IS} 1e-39 and 0$", lambda: RowQuantizer("static", 1e-39)),
    "infinite scale": (f"{STATIC_IS} inf and 0$", lambda: RowQuantizer("static", INF)),
    "scale of NaN": (f"{STATIC_IS} nan and 0$", lambda: RowQuantizer("static", NAN)),
    "zero of 256": (f"{STATIC_IS} 1.0 and 256$", lambda: RowQuantizer("static", 1.0, 256)),
    "zero of -1": (f"{STATIC_IS} 1.0 and -1$", lambda: RowQuantizer("static", 1.0, -1)),
    "fractional zero": (f"{STATIC_IS} 1.0 and 0.5$", lambda: RowQuantizer("static", 1.0, 0.5)),
    "smooth in bf16": ("^smooth must be a torch.float32", lambda: RowQuantizer("static", 1.0, smooth=ONES.bfloat16())),
    "out of another dtype": (OUT_IS, lambda: Epilogue(out=(torch.int16, 1.0, 0))),
    "out without scale": (OUT_IS, lambda: Epilogue(out=(torch.uint8, 0.0, 0))),
    "out with zero of 256": (OUT_IS, lambda: Epilogue(out=(torch.int8, 1.0, 256))),
    "no rows": (f"^{WHERE} torch.float32$", lambda: product(rows=None)),
    "bytes by the row": (f"^{WHERE} torch.uint8 with symmetric rows$", lambda: product(x=byte(torch.uint8, M, K))),
    "bytes without rows": (f"^{WHERE} torch.int8$", lambda: product(x=byte(torch.int8, M, K), rows=None)),
    "bytes for numbers": (
        f"^kernel '{PLAIN['name']}' .* does not take x of torch.uint8$",
        lambda: product(
            packed=Packed(torch.ones(N, K), PLAIN["layout"]),
            plan=Plan(PLAIN["name"]),
            x=byte(torch.uint8, M, K),
            rows=None,
        ),
    ),
    "smooth too long": (
        rf"^smooth must be \[{K}\], not a torch.float32 .*\({K + 1},\)",
        lambda: product(rows=RowQuantizer("symmetric", smooth=torch.ones(K + 1))),
    ),
    "bytes out, unasked": (
        "^out is torch.uint8, but the epilogue makes numbers$",
        lambda: product(out=byte(torch.uint8, M, N)),
    ),
    "numbers out, unasked": (
        "^out is torch.float32, but the epilogue makes torch.int8$",
        lambda: product(epilogue=to(torch.int8)),
    ),
    "other bytes out": (
        "^out is torch.int8, but the epilogue makes torch.uint8$",
        lambda: product(epilogue=to(torch.uint8), out=byte(torch.int8, M, N)),
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_does_not_fit_is_refused(case: str) -> None:
    """One sentence that says what is allowed and what was given; a ValueError."""
    message, action = REFUSED[case]
    with pytest.raises(ValueError, match=message):
        action()


def test_a_bias_is_of_numbers() -> None:
    """Integers are no bias."""
    with pytest.raises(TypeError, match=r"^bias must be a dense fp32 or bf16 or fp16 CPU tensor, not a torch\.int8"):
        product(bias=byte(torch.int8, N))


def test_the_valid_product_is_valid() -> None:
    """Without changes the product of these tests goes through, so that each refusal has the named reason."""
    product()
    product(x=byte(torch.uint8, M, K), rows=RowQuantizer(*STATIC))
    product(epilogue=to(torch.uint8), out=byte(torch.uint8, M, N))
    product(rows=RowQuantizer("asymmetric", smooth=torch.ones(K)))


def test_what_a_quantizer_and_an_epilogue_say() -> None:
    """Their attributes are what they were made of."""
    smooth = torch.rand(3)
    rows = RowQuantizer("static", 0.25, 9, smooth)
    assert (rows.kind, rows.scale, rows.zero) == ("static", 0.25, 9) and rows.smooth is smooth
    assert RowQuantizer("symmetric").smooth is None
    assert to(torch.int8).out == (torch.int8, 0.5, 7) and Epilogue().out is None


# ---- the table -------------------------------------------------------------------------------------------------------


def test_the_table_is_whole() -> None:
    """Each row is tested as floating or as integer; panels of integer products are read by integer kernels alone."""
    assert {k["id"] for k in native.FLOATING} | {k["id"] for k in native.INTEGER} == {k["id"] for k in native.ALL}
    for kernel in native.ALL:
        assert (kernel["format"] == "int8") == (kernel["accumulate"] == "int32") == (kernel in native.INTEGER)
    assert {k["isa"] for k in native.INTEGER} == {"scalar", "avx2", "avx_vnni", "avx512", "avx512_vnni", "amx"}
