"""The checker itself: broken kernels are caught, honest ones pass, and its constants are what they claim to be."""

import math
from collections.abc import Callable

import oracle
import pytest
import torch
import torch.nn.functional as F
from oracle import Dtypes, Sums
from torch import Tensor

from fastlinear.spec import activations

Kernel = Callable[[Tensor, Tensor, Tensor], Tensor]
SHAPES = [(4, 5, 3), (17, 33, 65), (8, 64, 768), (2, 3, 1000)]


def drop_k_tail(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    return F.linear(x[:, :-1], w[:, :-1], b)


def swap_rows(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    return F.linear(torch.cat([x[1:2], x[:1], x[2:]]), w, b)


def swap_columns(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    return F.linear(x, torch.cat([w[1:2], w[:1], w[2:]]), torch.cat([b[1:2], b[:1], b[2:]]))


def skip_bias(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    return F.linear(x, w)


def bias_of_next_column(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    return F.linear(x, w, b.roll(1))


def shifted_columns(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    return F.linear(x, w, b).roll(1, 1)


def bf16_inputs(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    return F.linear(x.bfloat16().float(), w.bfloat16().float(), b)


def stale_last_element(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    y = F.linear(x, w, b)
    y[-1, -1] = y[0, 0]
    return y


def counts_one_k_twice(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    return F.linear(x, w, b) + x[:, -1:] * w[:, -1]


BROKEN = [
    drop_k_tail,
    swap_rows,
    swap_columns,
    skip_bias,
    bias_of_next_column,
    shifted_columns,
    bf16_inputs,
    stale_last_element,
    counts_one_k_twice,
]


FORMATS = [torch.float32, torch.bfloat16, torch.float16]
every_format = pytest.mark.parametrize("dtype", FORMATS, ids=str)


def on_floats(kernel: Kernel, x: Tensor, w: Tensor, b: Tensor, activation: Callable[[Tensor], Tensor]) -> Tensor:
    """What a kernel that computes in fp32 makes of these operands, in the format of x."""
    return activation(kernel(x.float(), w.float(), b.float())).to(x.dtype)


# A kernel that rounds its inputs to bf16 is as good as any on 16-bit ones.
BROKEN_IN = [(kernel, dtype) for kernel in BROKEN for dtype in FORMATS[: 1 if kernel is bf16_inputs else 3]]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize(("kernel", "dtype"), BROKEN_IN, ids=[f"{k.__name__}-{d}" for k, d in BROKEN_IN])
def test_a_broken_kernel_is_caught(kernel: Kernel, shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    """Every mutant fails on random data, with and without an activation, and (but for rounding) on exact data."""
    dtypes = Dtypes(dtype, dtype, dtype)
    x, w, b = oracle.random_case(*shape, dtypes)
    assert b is not None
    with pytest.raises(AssertionError, match=r"y\[\d+, \d+\]"):
        oracle.check(on_floats(kernel, x, w, b, Tensor.clone), x, w, b)
    with pytest.raises(AssertionError, match="wrong"):
        oracle.check(on_floats(kernel, x, w, b, F.gelu), x, w, b, "gelu")
    if kernel is not bf16_inputs:  # bf16 holds small integers exactly
        x, w, b = oracle.exact_case(*shape, dtypes)
        assert b is not None
        with pytest.raises(AssertionError, match="wrong"):
            oracle.check(on_floats(kernel, x, w, b, Tensor.clone), x, w, b, exact=True)


@pytest.mark.parametrize(
    ("wanted", "computed"),
    [
        ("relu", None),
        (None, "relu"),
        ("gelu", "gelu_tanh"),
        ("silu", "gelu"),
        ("sigmoid", "hardsigmoid"),
        (("leaky_relu", 0.1), ("leaky_relu", 0.11)),
        (("elu", 1.0), ("elu", 1.001)),
        ("tanh", "hardtanh"),
    ],
)
def test_a_wrong_activation_is_caught(wanted: object, computed: object) -> None:
    """A missing activation, another one or another parameter fails."""
    x, w, b = oracle.random_case(8, 64, 96)
    y = activations.apply(activations.resolve(computed), F.linear(x, w, b))
    with pytest.raises(AssertionError, match="wrong"):
        oracle.check(y, x, w, b, wanted)


@every_format
@pytest.mark.parametrize("name", [None, *activations.names()])
@pytest.mark.parametrize("shape", [*SHAPES, (1, 1, 1), (0, 5, 3), (3, 0, 2), (3, 1, 7), (2, 9, 0)], ids=str)
def test_an_honest_kernel_passes(name: str | None, shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    """fp32 F.linear and an activation rounded once stay within the bound; empty and one-wide shapes included."""
    x, w, b = oracle.random_case(*shape, Dtypes(dtype, dtype, dtype))
    assert b is not None
    activation = activations.resolve(name)
    y = oracle.activate(activation, F.linear(x.float(), w.float(), b.float()).double()).float().to(dtype)
    result = oracle.check(y, x, w, b, name)
    assert result.worst <= 1 and result.compared == y.numel() and not result.nonfinite and not result.unjudged
    assert not result.mistrusted or y.numel() < 10


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_exact_data_needs_no_tolerance(shape: tuple[int, int, int]) -> None:
    """Integer fills give the same bits in every order of summation, and nearly no zeros."""
    x, w, b = oracle.exact_case(*shape)
    backwards = F.linear(x.flip(1), w.flip(1), b)
    assert torch.equal(backwards, F.linear(x, w, b))
    assert not oracle.check(backwards, x, w, b, exact=True).mistrusted
    assert not oracle.check(backwards.relu(), x, w, b, "relu", exact=True).mistrusted


def test_adversarial_cases_are_fair_and_sharp() -> None:
    """A plain loop over K in fp32 passes them all; infinities, NaN and overflow are really demanded somewhere."""
    nonfinite = 0
    for name, x, w, b in oracle.adversarial_cases(24):
        y = torch.zeros(x.shape[0], w.shape[0]) if b is None else b.repeat(x.shape[0], 1)
        for k in range(24):
            y = y + x[:, k, None] * w[:, k]
        result = oracle.check(y, x, w, b)
        assert result.compared + result.nonfinite + result.unjudged == y.numel(), name
        nonfinite += result.nonfinite
        if result.nonfinite:
            with pytest.raises(AssertionError):
                oracle.check(y.nan_to_num(), x, w, b)
    assert nonfinite > 100


def test_nan_from_padding_is_caught() -> None:
    """An infinity times a padded zero would give NaN where the sum is an infinity: that fails."""
    x, w, b = oracle.random_case(3, 4, 5)
    x[1, 4] = math.inf
    y = F.linear(x, w, b)
    oracle.check(y, x, w, b)
    y[1] = math.nan
    with pytest.raises(AssertionError, match="nan"):
        oracle.check(y, x, w, b)


def test_vacuous_data_is_mistrusted() -> None:
    """Inputs for which zeros would pass are reported as such."""
    x, w = torch.zeros(8, 16), torch.randn(4, 16)
    assert oracle.check(torch.zeros(8, 4), x, w).mistrusted
    x, w, _ = oracle.random_case(8, 4, 16)
    assert not oracle.check(F.linear(x, w), x, w).mistrusted


def test_wrong_shape_is_caught() -> None:
    """y must be x's leading shape with N at the end."""
    x, w, b = oracle.random_case(6, 4, 5)
    with pytest.raises(AssertionError, match="shape"):
        oracle.check(F.linear(x, w, b).T, x, w, b)


@pytest.mark.parametrize("dtype", FORMATS[1:], ids=str)
def test_half_of_the_spacing(dtype: torch.dtype) -> None:
    """It is half of the way to the next number, for every number of the format, denormals included."""
    values = torch.arange(1 << 15, dtype=torch.int16).view(dtype)
    values = values[values.isfinite()].double()
    gaps = values.diff()
    assert torch.equal(oracle.half_spacing(values[:-1], dtype), gaps / 2)
    assert torch.equal(oracle.half_spacing(values[:-1] + 0.9 * gaps, dtype), gaps / 2)


def cut_off(y: Tensor, dtype: torch.dtype) -> Tensor:
    """fp32 values, rounded toward zero."""
    nearest = y.to(dtype)
    return torch.where(nearest.float().abs() > y.abs(), torch.nextafter(nearest, torch.zeros_like(nearest)), nearest)


@pytest.mark.parametrize("dtype", FORMATS[1:], ids=str)
def test_a_coarse_output_is_caught(dtype: torch.dtype) -> None:
    """Rounding toward zero, rounding twice by way of the other format, and flushed denormals fail."""
    x, w, b = oracle.random_case(17, 33, 65)
    y = F.linear(x, w, b)
    oracle.check(y.to(dtype), x, w, b)
    other = FORMATS[3 - FORMATS.index(dtype)]
    for broken in (cut_off(y, dtype), y.to(other).to(dtype)):
        with pytest.raises(AssertionError, match="wrong"):
            oracle.check(broken, x, w, b)
    tiny = torch.finfo(dtype).tiny
    y = F.linear(x * tiny / 4, w)
    oracle.check(y.to(dtype), x * tiny / 4, w)
    with pytest.raises(AssertionError, match="wrong"):
        oracle.check(torch.where(y.abs() < tiny, 0, y).to(dtype), x * tiny / 4, w)


@pytest.mark.parametrize("activation", [None, "relu"])
def test_fp16_overflows_where_the_value_does(activation: str | None) -> None:
    """From 65520 on the nearest of fp16 is an infinity, below it is not; within the bound of that both pass."""
    values, one = torch.tensor([65519.0, 65521.0, 65520.0, 7e4]), torch.ones(1, 1)
    w = values[:, None]
    oracle.check(values.half()[None], one, w, None, activation)
    for i, wrong in enumerate([math.inf, 65504.0, math.nan, 65504.0]):
        broken = values.half()
        broken[i] = wrong
        with pytest.raises(AssertionError, match="wrong"):
            oracle.check(broken[None], one, w, None, activation)
    for either in (65504.0, math.inf):
        oracle.check(torch.tensor([[either]]).half(), one, w[2:3], None, activation)
    with pytest.raises(AssertionError, match="wrong"):
        oracle.check(torch.tensor([[65504.0]]).half(), one, w[2:3], exact=True)


def test_sums_in_fp16_have_their_own_bound() -> None:
    """Blocks of 64 products pass as such and not as fp32; without promotion they fail."""
    dtypes = Dtypes(torch.float16, torch.float16, torch.float16)
    x, w, _ = oracle.stored(dtypes, torch.rand(5, 4000), torch.rand(7, 4000), None)

    def kernel(block: int) -> Tensor:
        total = torch.zeros(5, 7)
        for begin in range(0, 4000, block):
            sums = torch.zeros(5, 7).half()
            for k in range(begin, min(4000, begin + block)):
                sums = (sums.double() + x[:, k, None].double() * w[:, k].double()).float().half()
            total += sums.float()
        return total

    assert oracle.check(kernel(64), x, w, sums=Sums(64)).worst > 0.001
    with pytest.raises(AssertionError, match="wrong"):
        oracle.check(kernel(64), x, w)
    with pytest.raises(AssertionError, match="wrong"):
        oracle.check(kernel(4000), x, w, sums=Sums(64))


def test_flushing_is_demanded_of_those_who_say_so() -> None:
    """Denormal inputs count as zeros where the kernel flushes, and as themselves where it does not."""
    x, w, b = oracle.random_case(3, 4, 65)
    x[:, ::2] = x[:, ::2].clamp(-1, 1) * 2.0**-127
    w[:, ::2] *= 2.0**120
    honest, flushed = F.linear(x, w, b), F.linear(Sums(flushes=True).flushed(x), w, b)
    w[0, 0] = math.inf
    honest[:, 0] = math.inf * x[:, 0].sign()
    flushed[:, 0] = math.nan  # inf * 0
    oracle.check(honest, x, w, b)
    oracle.check(flushed, x, w, b, sums=Sums(flushes=True))
    for y, sums in ((honest, Sums(flushes=True)), (flushed, Sums())):
        with pytest.raises(AssertionError, match="wrong"):
            oracle.check(y, x, w, b, sums=sums)


@pytest.mark.parametrize("name", activations.names())
def test_lipschitz_constants(name: str) -> None:
    """Each constant is above the steepest slope measured over a fine grid, and by less than 0.2 %."""
    activation = activations.resolve(name)
    grid = torch.linspace(-12.0, 12.0, 1_200_001, dtype=torch.float64)
    steepest = float(oracle.activate(activation, grid).diff().abs().max()) / float(grid[1] - grid[0])
    constant = float(oracle.steepest(activation, grid[-1]))
    assert steepest <= constant * (1 + 1e-9)
    assert steepest >= constant * 0.998


def test_stable_formulas_are_torchs() -> None:
    """The rewritten activations equal torch's where torch's own do not cancel."""
    c = torch.linspace(-3.0, 40.0, 4001, dtype=torch.float64)
    for name, formula in oracle.STABLE.items():
        torch.testing.assert_close(formula(c), activations.apply(activations.resolve(name), c), rtol=1e-12, atol=1e-14)
