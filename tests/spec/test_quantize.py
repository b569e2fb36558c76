"""The specification of int8: numbers worked by hand, a second implementation in numpy, and what must hold for all."""

import copy
import math
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from torch import Tensor, nn

import fastlinear._weights as _weights
from fastlinear import Calibration, Int8Dynamic, Int8Static, Int8WeightOnly
from fastlinear.spec import int8
from fastlinear.spec.foreign import foreign, quantized
from fastlinear.spec.int8 import (
    KINDS,
    Quantized,
    Requantize,
    Rows,
    dequantize,
    linear,
    longest,
    output_snr,
    products,
    quantize_rows,
    quantize_weight,
    requantize,
    signal_to_noise,
    weight_snr,
)
from fastlinear.spec.schemes import Observed, Scheme

INF, NAN, TINY = math.inf, math.nan, 2.0**-126
STATIC = Rows("static", 0.06, 100)
EVERY_KIND = pytest.mark.parametrize("rows", [Rows("symmetric"), Rows("asymmetric"), STATIC], ids=KINDS)
ROUNDED = 1 + 2.0**-18  # what the fp32 roundings of a quotient by a scale may add to half a step

many = hypothesis.settings(max_examples=150, deadline=None, derandomize=True)
floats = st.floats(width=32, allow_subnormal=True)
finite = st.floats(width=32, allow_nan=False, allow_infinity=False, allow_subnormal=True)


def rows_of(numbers: st.SearchStrategy[float], least: int = 1) -> st.SearchStrategy[Tensor]:
    return st.lists(numbers, min_size=least, max_size=9).map(lambda row: torch.tensor([row], dtype=torch.float32))


def same(a: Tensor, b: Tensor) -> bool:
    """Equal to the bit, but for the sign of a zero and the bits of a NaN."""
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(a.nan_to_num(nan=-7e37), b.nan_to_num(nan=-7e37))


def random_weight(n: int, k: int, zeros: bool = False) -> Quantized:
    values = torch.randint(-128, 128, (n, k), dtype=torch.int8)
    zero = torch.randint(-128, 128, (n,), dtype=torch.int32) if zeros else None
    return Quantized(values, torch.rand(n) / 100, zero)


# ---- weights ---------------------------------------------------------------------------------------------------------


def test_a_weight_by_hand() -> None:
    """scale = max |w| / 127 for each channel; quotients are rounded to nearest, ties to even; no channel says -128."""
    weight = torch.tensor([[127.0, 0.5, 1.5, 2.5, -2.5], [-254.0, 3.0, 5.0, -1.0, 200.0]])
    q = quantize_weight(weight)
    assert q.values.tolist() == [[127, 0, 2, 2, -2], [-127, 2, 2, 0, 100]]
    assert q.scale.tolist() == [1.0, 2.0] and q.zero is None
    assert dequantize(q).tolist() == [[127.0, 0.0, 2.0, 2.0, -2.0], [-254.0, 4.0, 4.0, 0.0, 200.0]]


def test_a_weight_with_zero_points_by_hand() -> None:
    """W = scale * (values - zero), with a scale and a zero point of each channel."""
    q = Quantized(
        torch.tensor([[-128, 127], [3, 4]]).to(torch.int8), torch.tensor([0.5, 2.0]), torch.tensor([127, -1]).int()
    )
    assert dequantize(q).tolist() == [[-127.5, 0.0], [8.0, 10.0]]


@many
@hypothesis.given(rows_of(finite))
def test_a_weight_comes_back_within_half_a_step(weight: Tensor) -> None:
    """|w - scale * q| <= scale / 2 wherever the channel has a scale; where its scale would be below 2^-126, q is 0."""
    q = quantize_weight(weight)
    amax = np.abs(weight.numpy()).max()
    assert q.scale.item() == (scale := np.float32(amax) / np.float32(127)) or (q.scale.item() == 0 and scale < TINY)
    if q.scale.item() == 0:
        assert scale < TINY and not q.values.any()
    else:
        error = (weight.double() - q.scale.double() * q.values.double()).abs()
        assert bool((error <= q.scale.double() / 2 * ROUNDED).all())
        assert q.values.abs().max() == 127


@pytest.mark.parametrize("value", [INF, -INF, NAN])
def test_a_weight_with_an_infinity_or_a_nan_is_refused(value: float) -> None:
    """ValueError that names the value and its place."""
    weight = torch.zeros(3, 4)
    weight[1, 2] = value
    with pytest.raises(ValueError, match=rf"{value} \(at \[1, 2\]\)"):
        quantize_weight(weight)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_a_weight_of_another_dtype(dtype: torch.dtype) -> None:
    """is quantized as the fp32 that it widens (or rounds) to."""
    weight = torch.randn(5, 7).to(dtype)
    q, expected = quantize_weight(weight), quantize_weight(weight.float())
    assert torch.equal(q.values, expected.values) and torch.equal(q.scale, expected.scale)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"values": torch.zeros(2, 3)}, "values .* must be torch.int8"),
        ({"values": torch.zeros(3, dtype=torch.int8)}, r"values .* shape \[n, k\]"),
        ({"scale": torch.ones(3)}, r"scale .* shape \[2\], not torch.float32 of shape \[3\]"),
        ({"scale": torch.ones(2).double()}, "scale .* must be torch.float32"),
        ({"scale": torch.tensor([1.0, NAN])}, "scale .* finite"),
        ({"scale": torch.tensor([1.0, INF])}, "scale .* finite"),
        ({"scale": torch.tensor([1.0, -1.0])}, "scale .* not negative"),
        ({"zero": torch.zeros(2)}, "zero .* must be torch.int32"),
        ({"zero": torch.tensor([0, 128]).int()}, "zero .* from -128 to 127"),
        ({"zero": torch.tensor([0, -129]).int()}, "zero .* from -128 to 127"),
    ],
)
def test_what_is_no_int8_weight_is_refused(change: dict[str, Tensor], message: str) -> None:
    """ValueError that tells which part is wrong, what it is, and what is allowed."""
    parts = {"values": torch.zeros(2, 3, dtype=torch.int8), "scale": torch.ones(2)}
    Quantized(**parts)
    with pytest.raises(ValueError, match=message):
        Quantized(**parts | change)


# ---- rows of x -------------------------------------------------------------------------------------------------------


def test_symmetric_rows_by_hand() -> None:
    """scale = max |x| / 127, zero = 128, u = x / scale rounded to even, plus 128."""
    u, scale, zero = quantize_rows(torch.tensor([[-254.0, 1.0, 3.0, 127.0], [0.0, 63.5, 0.25, -127.0]]), Rows())
    assert u.tolist() == [[1, 128, 130, 192], [128, 192, 128, 1]]
    assert scale.tolist() == [2.0, 1.0] and zero.tolist() == [128, 128]
    assert (u.dtype, scale.dtype, zero.dtype) == (torch.uint8, torch.float32, torch.int32)


def test_asymmetric_rows_by_hand() -> None:
    """A range that always holds 0 goes to 0 ... 255, and 0 becomes `zero` exactly."""
    x = torch.tensor([[-55.0, 200.0, 0.5, 1.5], [10.0, 255.0, 0.0, 3.0], [-510.0, -2.0, -5.0, 0.0]])
    u, scale, zero = quantize_rows(x, Rows("asymmetric"))
    assert u.tolist() == [[0, 255, 55, 57], [10, 255, 0, 3], [0, 254, 253, 255]]
    assert scale.tolist() == [1.0, 1.0, 2.0] and zero.tolist() == [55, 0, 255]


def test_static_rows_by_hand() -> None:
    """One scale and zero for all; what lies beyond saturates, also an infinity."""
    u, scale, zero = quantize_rows(
        torch.tensor([[-3.0, 0.25, 0.75, 1000.0], [-INF, INF, 77.5, 78.0]]), Rows("static", 0.5, 100)
    )
    assert u.tolist() == [[94, 100, 102, 255], [0, 255, 255, 255]]
    assert scale.tolist() == [0.5, 0.5] and zero.tolist() == [100, 100]


def by_numpy(row: np.ndarray, rows: Rows) -> tuple[list[int], float, int]:
    """The formulas of one row again, one fp32 operation at a time."""
    f, zero_row = np.float32, [128 if rows.kind == "symmetric" else 0]
    with np.errstate(all="ignore"):
        if rows.kind == "static":
            scale, zero = f(rows.scale), rows.zero
            if np.isnan(row).any():
                return [zero] * len(row), NAN, zero
        elif not np.isfinite(row).all():
            return zero_row * len(row), NAN, zero_row[0]
        elif rows.kind == "symmetric":
            scale, zero = np.abs(row).max() / f(127), 128
        else:
            low, high = min(f(0), row.min()), max(f(0), row.max())
            scale = f(f(high / f(255)) - f(low / f(255)))
        if scale < f(TINY):
            return zero_row * len(row), 0.0, zero_row[0]
        inverse = f(1) / scale
        if rows.kind == "asymmetric":
            zero = int(min(max(np.rint(f(-low) * inverse), 0), 255))
        low_step, high_step = (-127, 127) if rows.kind == "symmetric" else (-zero, 255 - zero)
        return [int(np.rint(min(max(f(v * inverse), low_step), high_step))) + zero for v in row], float(scale), zero


@EVERY_KIND
@many
@hypothesis.given(x=rows_of(floats) | rows_of(finite))
def test_rows_equal_a_second_implementation(rows: Rows, x: Tensor) -> None:
    """Bit for bit, for any floats: torch contracts and reorders nothing, and divides where a division is meant."""
    u, scale, zero = quantize_rows(x, rows)
    expected = by_numpy(x[0].numpy(), rows)
    assert (u[0].tolist(), zero.item()) == (expected[0], expected[2])
    assert scale.item() == expected[1] or (math.isnan(scale.item()) and math.isnan(expected[1]))


@EVERY_KIND
def test_quotients_are_products_by_the_inverse(rows: Rows) -> None:
    """x * (1 / scale), which is not quite x / scale: near ties the two round apart, and all come out as in numpy."""
    step = torch.full((5000, 1), STATIC.scale) if rows.kind == "static" else torch.rand(5000, 1) + 0.1
    low = -(torch.randint(0, 255, (5000, 1)) + 0.5) * step
    ends = [low, 255 * step + low] if rows.kind == "asymmetric" else [127 * step]
    x = torch.cat([*ends, (torch.randint(-99, 100, (5000, 8)) + 0.5) * step], 1)
    u, scale, zero = (each.numpy() for each in quantize_rows(x, rows))
    inverse, bounds = np.float32(1) / scale[:, None], (1 if rows.kind == "symmetric" else 0, 255)
    if rows.kind == "asymmetric":
        down = -np.minimum(x.numpy().min(1), np.float32(0))
        assert np.array_equal(zero, np.rint(down * inverse[:, 0])) and (zero != np.rint(down / scale)).any()
    rounded = [np.rint(quotients) + zero[:, None] for quotients in (x.numpy() * inverse, x.numpy() / scale[:, None])]
    by_product, by_quotient = (np.clip(each, *bounds) for each in rounded)
    assert np.array_equal(u, by_product) and (by_product != by_quotient).any()


@pytest.mark.parametrize("kind", ["symmetric", "asymmetric"])
@many
@hypothesis.given(x=rows_of(finite))
def test_rows_come_back_within_half_a_step(kind: str, x: Tensor) -> None:
    """|x - scale * (u - zero)| <= scale / 2 in every row that has a scale, and 0 stays 0 exactly."""
    u, scale, zero = quantize_rows(x, Rows(kind))
    error = (x.double() - scale.double() * (u.double() - zero.double())).abs()
    assert bool((error <= scale.double() / 2 * ROUNDED).all()) or scale.item() == 0
    assert bool((u[x == 0] == zero).all())
    if scale.item() == 0:
        assert x.abs().max() < 255 * TINY and bool((u == zero).all())


@many
@hypothesis.given(x=rows_of(st.floats(-6.0, 9.25, width=32)))
def test_static_rows_come_back_within_half_a_step(x: Tensor) -> None:
    """The same for what lies within the range."""
    u, scale, zero = quantize_rows(x, STATIC)
    error = (x.double() - scale.double() * (u.double() - zero.double())).abs()
    assert bool((error <= scale.double() / 2 * ROUNDED).all())


@pytest.mark.parametrize(("kind", "zero"), [("symmetric", 128), ("asymmetric", 0)])
@pytest.mark.parametrize("value", [0.0, -0.0, 1e-45, -1e-40, 126 * TINY])
def test_a_row_next_to_nothing_is_zeros(kind: str, zero: int, value: float) -> None:
    """A scale below 2^-126 becomes 0 with u = zero, whatever the row's denormals are: y is bias alone."""
    x = torch.full((1, 4), value)
    u, scale, zeros = quantize_rows(x, Rows(kind))
    assert (u.tolist(), scale.tolist(), zeros.tolist()) == ([[zero] * 4], [0.0], [zero])
    bias = torch.randn(3)
    assert torch.equal(linear(x, random_weight(3, 4), Rows(kind), bias), bias[None])


@pytest.mark.parametrize("kind", ["symmetric", "asymmetric"])
@pytest.mark.parametrize("value", [1.0, -1.0, 256 * TINY, 3e38, -3e38])
def test_a_constant_row_is_exact_in_its_steps(kind: str, value: float) -> None:
    """max |x| lands on the last step, on the side of its sign."""
    u, scale, zero = quantize_rows(torch.full((1, 4), value), Rows(kind))
    steps = (u.int() - zero).tolist()[0]
    assert steps == [math.copysign(127 if kind == "symmetric" else 255, value)] * 4 and math.isfinite(scale.item())


@EVERY_KIND
@pytest.mark.parametrize("value", [INF, -INF, NAN])
def test_an_infinity_or_a_nan_stays_in_its_row(rows: Rows, value: float) -> None:
    """A row with a NaN (or, unless static, an infinity) has scale NaN: all of its y is NaN, and no other row's."""
    x = torch.randn(3, 5)
    clean = linear(x, q := random_weight(4, 5), rows)
    x[1, 2] = value
    y = linear(x, q, rows)
    assert torch.equal(y[[0, 2]], clean[[0, 2]])
    assert bool(y[1].isfinite().all() if rows.kind == "static" and not math.isnan(value) else y[1].isnan().all())


@EVERY_KIND
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bit_rows_are_widened_first(rows: Rows, dtype: torch.dtype) -> None:
    """and then smoothed and quantized in fp32."""
    x, smooth = torch.randn(4, 6).to(dtype), torch.rand(6) + 0.5
    for way in (rows, rows._replace(smooth=smooth)):
        assert all(map(torch.equal, quantize_rows(x, way), quantize_rows(x.float(), way)))
    plain = rows._replace(smooth=None)
    smoothed = quantize_rows(x, rows._replace(smooth=smooth))
    assert all(map(torch.equal, smoothed, quantize_rows(x.float() * smooth, plain)))


def test_static_rows_may_be_integers() -> None:
    """uint8 is u itself, int8 is u - 128: no float lies between two layers."""
    u = torch.arange(256).to(torch.uint8).view(2, 128)
    signed = (u.int() - 128).to(torch.int8)
    q = random_weight(3, 128)
    for x in (u, signed):
        assert torch.equal(quantize_rows(x, STATIC)[0], u)
        y = linear(x, q, STATIC)
        assert y.dtype == torch.float32
        assert torch.equal(y, (products(u, torch.tensor([100, 100]), q).float() * q.scale) * torch.tensor(STATIC.scale))


def test_an_unknown_kind_is_refused() -> None:
    """ValueError that lists the kinds."""
    with pytest.raises(ValueError, match="symmetric or asymmetric or static, not 'block'"):
        quantize_rows(torch.zeros(1, 1), Rows("block"))


# ---- products --------------------------------------------------------------------------------------------------------


def test_a_layer_by_hand() -> None:
    """y = (float(acc) * scale_w) * scale_x + bias, then the activation."""
    weight = Quantized(torch.tensor([[1, 2], [-3, 4]], dtype=torch.int8), torch.tensor([0.5, 2.0]))
    x = torch.tensor([[127.0, -254.0]])  # scale 2, steps 64 (63.5 to even) and -127
    assert linear(x, weight, Rows()).tolist() == [[(64 - 254) * 0.5 * 2, (-192 - 508) * 2.0 * 2]]
    bias = torch.tensor([200.0, 1.0])
    assert linear(x, weight, Rows(), bias, torch.relu).tolist() == [[10.0, 0.0]]


def test_weight_only_by_hand() -> None:
    """x stays as it is, and the sum of x * (q - zero) is multiplied by the scale."""
    weight = Quantized(torch.tensor([[1, 2]], dtype=torch.int8), torch.tensor([0.5]), torch.tensor([-1]).int())
    assert linear(torch.tensor([[0.25, 10.0]]), weight, None, torch.tensor([1.0])).tolist() == [[16.25]]


@EVERY_KIND
@pytest.mark.parametrize("zeros", [False, True])
def test_results_are_rounded_in_the_documented_order(rows: Rows, zeros: bool) -> None:
    """Each of the two products, and the bias, is one fp32 operation of numpy's; the sums are Python's integers."""
    x, q, bias = torch.randn(7, 33), random_weight(5, 33, zeros), torch.randn(5)
    u, scale, zero = quantize_rows(x, rows)
    shift = [0] * 5 if q.zero is None else q.zero.tolist()
    for m, n in np.ndindex(7, 5):
        acc = sum((int(a) - int(zero[m])) * (int(b) - shift[n]) for a, b in zip(u[m], q.values[n], strict=True))
        expected = (np.float32(acc) * q.scale[n].numpy()) * scale[m].numpy() + bias[n].numpy()
        assert linear(x, q, rows, bias)[m, n].numpy() == expected


@pytest.mark.parametrize("zero", [None, 127])
def test_the_longest_sum_still_fits(zero: int | None) -> None:
    """At the limit of K the most extreme bytes give their exact sum in an int32; one column more could overflow."""
    zeros = None if zero is None else torch.tensor([zero]).int()
    k = longest(zeros)
    assert k == (65793 if zero is None else 33025) == _weights.dot_limit(zero is not None)
    q = Quantized(torch.full((1, k), -128, dtype=torch.int8), torch.ones(1), zeros)
    extreme = -255 * (128 + (zero or 0)) * k
    assert products(torch.full((1, k), 255, dtype=torch.uint8), torch.tensor([0]), q).item() == extreme >= -(2**31)
    assert 255 * (128 if zero is None else 255) * (k + 1) >= 2**31
    one_more = Quantized(torch.zeros(1, k + 1, dtype=torch.int8), torch.ones(1), zeros)
    with pytest.raises(ValueError, match=f"at most {k} columns, but has {k + 1}"):
        products(torch.zeros(1, k + 1, dtype=torch.uint8), torch.tensor([0]), one_more)
    assert linear(torch.ones(1, k + 1), one_more, None).isfinite()  # sums in floating point have no limit


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rows", [None, Rows()], ids=["weight-only", "dynamic"])
def test_shapes_and_dtypes(dtype: torch.dtype, rows: Rows | None) -> None:
    """y has the leading dimensions and the dtype of x, or the dtype that is asked for; empty sums are zero."""
    q = random_weight(3, 4)
    for shape in ((4,), (2, 4), (2, 5, 4), (0, 4)):
        y = linear(torch.randn(shape).to(dtype), q, rows)
        assert (y.shape, y.dtype) == ((*shape[:-1], 3), dtype)
    assert linear(torch.randn(2, 4).to(dtype), q, rows, out=torch.float16).dtype == torch.float16
    for way in (rows, Rows("asymmetric")):
        nothing = linear(torch.zeros(2, 0, dtype=dtype), quantize_weight(torch.zeros(3, 0)), way)
        assert nothing.tolist() == [[0.0] * 3] * 2


@pytest.mark.parametrize("default", [torch.float64, torch.bfloat16])
@EVERY_KIND
def test_the_default_dtype_changes_nothing(rows: Rows, default: torch.dtype) -> None:
    """All of it is fp32, whatever torch.set_default_dtype says."""
    x, weight, out = torch.randn(4, 9), torch.randn(5, 9), Requantize(torch.uint8, 0.05, 128)
    expected = linear(x, quantize_weight(weight), rows), linear(x, quantize_weight(weight), rows, out=out)
    try:
        torch.set_default_dtype(default)
        results = linear(x, quantize_weight(weight), rows), linear(x, quantize_weight(weight), rows, out=out)
    finally:
        torch.set_default_dtype(torch.float32)
    assert all(map(same, results, expected))


@pytest.mark.parametrize(("dtype", "shift"), [(torch.uint8, 0), (torch.int8, 128)])
def test_requantized_outputs(dtype: torch.dtype, shift: int) -> None:
    """u = y / scale, rounded to even, plus zero, saturating; NaN gives the lowest value; int8 is u - 128."""
    y = torch.tensor([0.0, 0.25, 0.75, -50.5, 77.0, 78.0, 1e9, INF, -INF, NAN])
    integers = requantize(y, Requantize(dtype, 0.5, 100))
    assert integers.dtype == dtype
    assert integers.tolist() == [u - shift for u in (100, 100, 102, 0, 254, 255, 255, 255, 0, 0)]


def test_requantized_outputs_are_products_by_the_inverse() -> None:
    """as rows are, so that a chain has the same bits however its middle is quantized."""
    out = Requantize(torch.uint8, STATIC.scale, STATIC.zero)
    y, scale = (torch.arange(-100, 155) + 0.5).numpy() * np.float32(out.scale), np.float32(out.scale)
    by_product, by_quotient = (np.rint(each) + out.zero for each in (y * (np.float32(1) / scale), y / scale))
    assert np.array_equal(requantize(torch.tensor(y), out).numpy(), by_product.clip(0, 255))
    assert (by_product != by_quotient).any()


def test_a_chain_of_two_layers() -> None:
    """What one layer requantizes, the next reads as if it had quantized the same numbers itself."""
    first, second, x = random_weight(8, 6), random_weight(4, 8), torch.randn(5, 6)
    middle, rows = torch.relu(linear(x, first, Rows())), Rows("static", 0.003, 0)
    for dtype in (torch.uint8, torch.int8):
        integers = linear(x, first, Rows(), None, torch.relu, Requantize(dtype, rows.scale, rows.zero))
        assert torch.equal(linear(integers, second, rows), linear(middle, second, rows))


# ---- error -----------------------------------------------------------------------------------------------------------


def test_signal_to_noise_by_hand() -> None:
    """10 log10 of the ratio of energies: an error of a tenth is 20 dB, of everything 0 dB."""
    exact = torch.tensor([3.0, -4.0])
    assert signal_to_noise(exact, 0.9 * exact) == pytest.approx(20, abs=1e-5)
    assert signal_to_noise(exact, 0 * exact) == 0
    assert signal_to_noise(exact, exact) == INF


def test_the_error_of_a_usual_layer() -> None:
    """Normal weights and inputs: about 40 dB each, so the output is right within 2 %; weight-only within 1.5 %."""
    weight, x, bias = torch.randn(64, 512), torch.randn(32, 512), torch.randn(64)
    q = quantize_weight(weight)
    dynamic = [output_snr(x, weight, q, Rows(kind), bias) for kind in ("symmetric", "asymmetric")]
    assert weight_snr(weight, q) > 40 and min(dynamic) > 37
    assert output_snr(x, weight, q, None, bias) > max(dynamic)
    relu = x.relu()
    assert output_snr(relu, weight, q, Rows("asymmetric")) > output_snr(relu, weight, q, Rows())  # one sign: finer


def test_smoothing_leaves_the_product_and_lessens_the_error() -> None:
    """(x * smooth) (W / smooth)^T is x W^T within rounding; with outlier channels in x the int8 error falls by 6 dB."""
    x, weight = torch.randn(64, 128), torch.randn(48, 128)
    x[:, ::40] *= 60
    s = x.abs().amax(0).sqrt() / weight.abs().amax(0).sqrt()
    smooth = 1 / s
    torch.testing.assert_close((x * smooth) @ (weight / smooth).t(), x @ weight.t(), rtol=1e-4, atol=1e-3)
    plain = output_snr(x, weight, quantize_weight(weight), Rows())
    smoothed = output_snr(x, weight, quantize_weight(weight, smooth), Rows(smooth=smooth))
    assert smoothed > plain + 6
    assert weight_snr(weight, quantize_weight(weight, smooth), smooth) > 30


# ---- schemes ---------------------------------------------------------------------------------------------------------

FOUND = Observed(0.5, 7, torch.ones(3), torch.zeros(2, 3))
CALIBRATION = Calibration({"fc": FOUND}, {"head": "no batch of the calibration reached it"})


def test_what_schemes_say_of_a_layer() -> None:
    """The format of the weight, how rows are quantized, and why a layer has to be left alone."""
    assert Int8Dynamic().rows("fc") == Rows("symmetric") and Int8Dynamic(asymmetric=True).rows("fc") == Rows(
        "asymmetric"
    )
    smoothed = Int8Dynamic(calibration=CALIBRATION)
    assert smoothed.rows("fc").smooth is FOUND.smooth and smoothed.rows("head").smooth is None
    assert Int8WeightOnly().rows("fc") is None
    static = Int8Static(CALIBRATION)
    assert static.rows("fc") == Rows("static", 0.5, 7, FOUND.smooth)
    assert static.why_not("fc") is None and static.why_not("head") == "no batch of the calibration reached it"
    assert static.why_not("other") == "calibrate saw no layer of this name"
    assert {scheme.packed for scheme in (Int8Dynamic(), static)} == {"int8"} != {Int8WeightOnly().packed}
    assert all(scheme.why_not("anything") is None for scheme in (Int8Dynamic(), smoothed, Int8WeightOnly()))


def test_schemes_are_values() -> None:
    """Equal when they say the same, also after a deep copy of the model they are in; frozen; short to print."""
    for make in (
        Int8Dynamic,
        Int8WeightOnly,
        lambda: Int8Static(CALIBRATION),
        lambda: Int8Dynamic(calibration=CALIBRATION),
    ):
        scheme: Scheme = make()
        assert scheme == make() == copy.deepcopy(scheme) and hash(scheme) == hash(make())
        with pytest.raises(AttributeError):
            scheme.fallback = True
    assert Int8Dynamic() != Int8Dynamic(fallback=True) and Int8Static(CALIBRATION) != Int8Static(Calibration({}, {}))
    assert repr(Int8Static(CALIBRATION)) == "Int8Static(calibration=Calibration(1 layers, 1 skipped), chain=False)"


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Int8Dynamic(asymmetric=1), r"Int8Dynamic\(asymmetric=...\) must be True or False, but is 1"),
        (lambda: Int8Dynamic(fallback="yes"), r"Int8Dynamic\(fallback=...\) .* 'yes'"),
        (
            lambda: Int8Dynamic(calibration=[torch.ones(2)]),
            r"Int8Dynamic\(calibration=...\) takes what .*calibrate returns",
        ),
        (lambda: Int8Static(None), r"Int8Static\(calibration=...\) .* given None"),
        (lambda: Int8Static(CALIBRATION, chain=None), r"Int8Static\(chain=...\) must be True or False"),
    ],
)
def test_schemes_refuse_other_types(make: Callable[[], object], message: str) -> None:
    """TypeError that names scheme and argument."""
    with pytest.raises(TypeError, match=message):
        make()


# ---- weights that somebody else quantized ----------------------------------------------------------------------------


def test_plain_parts_become_a_weight() -> None:
    """[N] or [N, 1] scales and zero points of any dtype that fits; zero points that are all 0 are none."""
    values = torch.randint(-128, 128, (4, 6), dtype=torch.int8)
    for scale in (torch.rand(4), torch.rand(4, 1), torch.rand(4).bfloat16(), torch.rand(4, 1).double()):
        q = quantized(values, scale)
        assert torch.equal(q.scale, scale.flatten().float()) and q.values is not None and q.zero is None
    for zero in (torch.tensor([1, -128, 127, 0]), torch.tensor([[1], [-128], [127], [0]]).to(torch.int8)):
        q = quantized(values, torch.ones(4), zero)
        assert torch.equal(dequantize(q), values.float() - zero.view(4, 1).float())
    assert quantized(values, torch.ones(4), torch.zeros(4, 1, dtype=torch.int64)).zero is None


@pytest.mark.parametrize(
    ("parts", "error", "message"),
    [
        ({"values": [[1]]}, TypeError, "values .* is a list"),
        ({"scale": 0.5}, TypeError, "scale .* is a float"),
        ({"zero": 0}, TypeError, "zero .* is a int"),
        ({"values": torch.zeros(4, 6, dtype=torch.uint8)}, ValueError, "values .* must be torch.int8"),
        ({"values": torch.zeros(4, 6, dtype=torch.int8, device="meta")}, ValueError, "values .* on device meta"),
        ({"scale": torch.ones(4).int()}, ValueError, "scale .* floating-point, but is torch.int32"),
        ({"scale": torch.ones(4, 2)}, ValueError, r"scale .* not torch.float32 of shape \[4, 2\]"),
        ({"scale": torch.ones(())}, ValueError, r"scale .* shape \[4\]"),
        ({"scale": torch.full((4,), 1e300, dtype=torch.float64)}, ValueError, "scale .* finite"),
        ({"zero": torch.zeros(4)}, ValueError, "zero .* integer dtype, but is torch.float32"),
        ({"zero": torch.ones(4).bool()}, ValueError, "zero .* integer dtype, but is torch.bool"),
        ({"zero": torch.full((4,), 2**40)}, ValueError, "zero .* from -128 to 127"),
        ({"zero": torch.ones(3).int()}, ValueError, r"zero .* shape \[4\]"),
    ],
)
def test_other_parts_are_refused(parts: dict[str, Any], error: type[Exception], message: str) -> None:
    """One sentence about the part that is wrong."""
    good = {"values": torch.zeros(4, 6, dtype=torch.int8), "scale": torch.ones(4)}
    with pytest.raises(error, match=message):
        quantized(**good | parts)


class Int8Tensor(SimpleNamespace):
    """What fastlinear reads of torchao's tensor of that name."""


def imitation(**changes: object) -> Int8Tensor:
    values = torch.randint(-128, 128, (4, 6), dtype=torch.int8)
    zero = torch.zeros(4, 1, dtype=torch.int8)
    parts = {
        "qdata": values,
        "scale": torch.rand(4, 1),
        "zero_point": zero,
        "block_size": [1, 6],
        "act_pre_scale": None,
    }
    return Int8Tensor(**parts | changes)


def test_a_tensor_of_torchaos_is_read_by_its_parts() -> None:
    """The very integers and scales; with zero points, or without."""
    weight = imitation()
    q = foreign(weight)
    assert isinstance(q, Quantized) and q.zero is None
    assert torch.equal(q.values, weight.qdata) and torch.equal(q.scale, weight.scale[:, 0])
    shifted = foreign(imitation(zero_point=torch.tensor([[3], [0], [-5], [1]]).to(torch.int8), block_size=(1, 6)))
    assert isinstance(shifted, Quantized) and shifted.zero is not None and shifted.zero.tolist() == [3, 0, -5, 1]
    assert isinstance(foreign(imitation(zero_point=None)), Quantized)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        (
            {"block_size": [1, 3], "scale": torch.rand(4, 2)},
            "has a scale for each block of [1, 3], not for each output",
        ),
        ({"block_size": [4, 6], "scale": torch.rand(1, 1)}, "has a scale for each block of [4, 6]"),
        ({"qdata": torch.zeros(4, 6).to(torch.float8_e4m3fn)}, "holds torch.float8_e4m3fn, not torch.int8"),
        ({"qdata": torch.zeros(2, 4, 6, dtype=torch.int8)}, "has a scale for each block of"),
        ({"act_pre_scale": torch.ones(6)}, "wants its inputs scaled first, by act_pre_scale"),
        (
            {"zero_point": torch.zeros(4, 1)},
            "the zero of an int8 weight must be of an integer dtype, but is torch.float32",
        ),
        ({"scale": torch.full((4, 1), NAN)}, "the scale of an int8 weight must be finite"),
    ],
)
def test_other_kinds_of_torchao_have_a_reason(changes: dict[str, object], reason: str) -> None:
    """A few words for the report, with the tensor's class."""
    found = foreign(imitation(**changes))
    assert isinstance(found, str) and reason in found and "its weight (Int8Tensor)" in found


@pytest.mark.parametrize("weight", [torch.ones(2, 2), nn.Parameter(torch.ones(2, 2)), None, SimpleNamespace(scale=1)])
def test_what_is_not_quantized_is_not_foreign(weight: object) -> None:
    """None for plain tensors and for kinds that nothing is known about."""
    assert foreign(weight) is None


def test_the_real_torchao() -> None:
    """Where torchao is installed: what `quantize_` leaves is taken over, and stands for the same weight."""
    ao = pytest.importorskip("torchao.quantization")
    for config, rows in (
        (ao.Int8WeightOnlyConfig(), None),
        (ao.Int8DynamicActivationInt8WeightConfig(act_mapping_type=ao.MappingType.ASYMMETRIC), Rows("asymmetric")),
    ):
        model, x = nn.Sequential(nn.Linear(64, 32)), torch.randn(5, 64)
        ao.quantize_(model, config)
        q = foreign(model[0].weight)
        assert isinstance(q, Quantized) and torch.equal(dequantize(q), model[0].weight.dequantize())
        torch.testing.assert_close(linear(x, q, rows, model[0].bias), model(x), rtol=1e-4, atol=1e-5)
    grouped = nn.Sequential(nn.Linear(64, 32))
    ao.quantize_(grouped, ao.Int8WeightOnlyConfig(granularity=ao.PerGroup(32)))
    assert "a scale for each block of [1, 32]" in str(foreign(grouped[0].weight))


def test_the_specification_imports_torch_only() -> None:
    """So that it can be read, and run, without the rest."""
    modules = {name for name, value in vars(int8).items() if type(value).__name__ == "module"}
    assert modules <= {"math", "torch"}
