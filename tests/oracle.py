"""What a linear layer may return: the fp64 value, and how far from it an honest kernel can land.

Inputs of any format are taken as stored. For sums of K products and a bias accumulated in fp32 in any order, with or
without FMA (Higham, Accuracy and Stability of Numerical Algorithms, section 3.1), u = 2^-24, gamma_n = n u / (1 - n u):

    |c - c*| <= E = gamma_{K+2} (sum |x_k w_k| + |b|) + (K+1) 2^-149

where the second term is what products lose to underflow. `Sums` has what other kernels lose beyond that. An activation
f, computed in fp32, widens it to |f(c) - f(c*)| <= L E + max(4 ulp, 1e-6 relative), L being its Lipschitz constant; and
a 16-bit output is off by half of its own spacing more, denormals included, or infinite where the value is that large.
"""

import math
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from fastlinear.spec import activations

UNIT, UNIT_FP16 = 2.0**-24, 2.0**-11
MAX = torch.finfo(torch.float32).max
VACUOUS = 0.9  # a check of which more than this share would pass for an output of zeros proves little

# The steepest slope of each activation, given its parameters; tests/kernel/test_oracle.py measures them.
LIPSCHITZ: dict[str, Callable[..., float]] = {
    "relu": lambda: 1.0,
    "relu6": lambda: 1.0,
    "gelu": lambda: 1.1290,
    "gelu_tanh": lambda: 1.1300,
    "quick_gelu": lambda: 1.0999,
    "silu": lambda: 1.0999,
    "sigmoid": lambda: 0.25,
    "tanh": lambda: 1.0,
    "hardswish": lambda: 1.5,
    "hardsigmoid": lambda: 1 / 6,
    "hardtanh": lambda low, high: 1.0,
    "leaky_relu": lambda slope: max(1.0, abs(slope)),
    "elu": lambda alpha: max(1.0, abs(alpha)),
    "softplus": lambda beta, threshold: 1.0,
    "mish": lambda: 1.0885,
}
# Of activations whose slope has no bound, the steepest one up to a value.
STEEPEST_UP_TO: dict[str, Callable[[Tensor], Tensor]] = {"relu2": lambda most: 2.0 * most.clamp_min(0.0)}

# torch's own formulas, where those cancel even in fp64, rewritten so that they do not.
STABLE: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": lambda c: 0.5 * c * torch.special.erfc(-c / math.sqrt(2)),
    "gelu_tanh": lambda c: c * torch.sigmoid(math.sqrt(8 / math.pi) * (c + 0.044715 * c**3)),
}


class Dtypes(NamedTuple):
    """Of the operands of a product; the output has that of x."""

    x: torch.dtype = torch.float32
    weight: torch.dtype = torch.float32
    bias: torch.dtype = torch.float32


class Sums(NamedTuple):
    """How a kernel adds up, where that is not plain fp32."""

    block: int = 0  # products that are added in fp16 before the sum goes on in fp32
    flushes: bool = False  # denormal inputs are taken as zeros, denormal products and sums become zeros

    def flushed(self, values: Tensor) -> Tensor:
        """fp64 inputs as the kernel takes them."""
        return torch.where(values.abs() < 2.0**-126, 0.0, values) if self.flushes else values

    def relative(self, k: int) -> float:
        """The error of a sum of k products and a bias, over the sum of their absolute values."""
        return gamma(k + 2, UNIT) + (1 + gamma(k + 2, UNIT)) * gamma(min(k, self.block), UNIT_FP16)

    def absolute(self, k: int) -> float:
        """What underflow may take from it: half a spacing, or a flushed number, for each product and each sum."""
        lost = 2.0**-149 + (2.0**-24 if self.block else 0.0) + (2.0**-125 if self.flushes else 0.0)
        return (k + 1) * lost

    @property
    def largest(self) -> float:
        """Sums beyond this may be infinite."""
        return torch.finfo(torch.float16 if self.block else torch.float32).max


FP32, FP32_SUMS = Dtypes(), Sums()


def gamma(n: int, unit: float) -> float:
    return n * unit / (1 - n * unit)


class Result(NamedTuple):
    """What a passed check has seen."""

    worst: float  # largest error / bound among the finite outputs; 0 where nothing was compared
    compared: int  # finite outputs held to the bound
    nonfinite: int  # outputs that had to be, and were, a particular infinity or NaN
    unjudged: int  # outputs whose partial sums may overflow in one order and not in another
    mistrusted: bool  # zeros would have passed nearly everywhere: the inputs prove nothing


def activate(activation: activations.Activation | None, c: Tensor) -> Tensor:
    """The activation of fp64 values, accurate in the tails and at the infinities."""
    if activation is None:
        return c
    stable = STABLE.get(activation.name, lambda c: activations.apply(activation, c))
    # At an infinity the meaning is the limit: x * sigmoid(x) at -inf is -0, although inf * 0 is NaN.
    far = stable(c.clamp(-1e300, 1e300))
    limit = torch.where(far.abs() > 1e150, far.sign() * math.inf, far)
    return torch.where(c.isinf(), limit, stable(c))


def check(
    y: Tensor,
    x: Tensor,
    w: Tensor,
    b: Tensor | None = None,
    activation: object = None,
    *,
    sums: Sums = FP32_SUMS,
    exact: bool = False,
) -> Result:
    """Holds y [..., N] to activation(x [..., K] @ w [N, K].T + b [N]), inputs taken as stored; AssertionError if not.

    `exact` demands the sums to the last bit, for inputs whose every partial sum is representable (`exact_case`), and
    the output to be the nearest of its format.
    """
    act = activations.resolve(activation)
    n, k = w.shape
    assert y.shape == (*x.shape[:-1], n), f"shape {tuple(y.shape)}, not {(*x.shape[:-1], n)}"
    m = math.prod(x.shape[:-1])
    x2, w2 = sums.flushed(x.detach().double().reshape(m, k)), sums.flushed(w.detach().double())
    bias = torch.zeros(n, dtype=torch.float64) if b is None else b.detach().double()
    got = y.detach().double().reshape(m, n)

    c = x2 @ w2.T + bias
    gauge = _finite(x2).abs() @ _finite(w2).abs().T + _finite(bias).abs()
    relative = sums.relative(k)
    error = torch.zeros_like(c) if exact else relative * gauge + sums.absolute(k)

    may_overflow = ~c.isnan() & (gauge * (1 + relative) >= sums.largest)
    one_sign = c.isfinite() & (gauge * (1 - relative) <= c.abs())  # then partial sums only grow, in every order
    must_overflow = may_overflow & one_sign & (c.abs() * (1 - relative) > MAX)
    c = torch.where(must_overflow, c.sign() * math.inf, c)
    want = activate(act, c)
    tolerance = _through_activation(act, c, want, error)
    if exact:
        want = want.float().to(y.dtype).double()
    may_be_infinite, must_be_infinite = _beyond(y.dtype, want, tolerance)
    tolerance = tolerance + (0.0 if exact else half_spacing(want.abs() + tolerance, y.dtype))

    close = (got == want) | ((got - want).abs() <= tolerance) | (may_be_infinite & (got == want.sign() * math.inf))
    special = ~c.isfinite()
    unjudged = may_overflow & ~must_overflow
    wrong = ~torch.where(special, _same_special(act, got, c, want, y.dtype), close) & ~unjudged
    if wrong.any():
        raise AssertionError(
            f"{_explain(wrong, got, want, tolerance, c)}; x {_describe(x)}, w {_describe(w)}, "
            f"bias {'none' if b is None else _describe(b)}, y {y.dtype}, activation {act}"
        )
    compared = ~special & ~unjudged & ~must_be_infinite
    ratio = torch.where(compared & got.isfinite(), (got - want).abs() / tolerance.clamp_min(2.0**-1000), 0.0)
    vacuous = int((want.abs() <= tolerance)[compared].sum())
    count = int(compared.sum())
    return Result(
        worst=float(ratio.max()) if ratio.numel() else 0.0,
        compared=count,
        nonfinite=int((special | must_be_infinite).sum()),
        unjudged=int(unjudged.sum()),
        mistrusted=vacuous > VACUOUS * count,
    )


def half_spacing(values: Tensor, dtype: torch.dtype) -> Tensor:
    """Half the distance of the numbers of a 16-bit format at fp64 values >= 0; 0 for fp32, which results come in."""
    if dtype == torch.float32:
        return torch.zeros_like(values)
    format = torch.finfo(dtype)
    exponent = torch.frexp(values.clamp(format.tiny, format.max)).exponent.double() - 1
    return torch.exp2(exponent) * format.eps / 2


def _beyond(dtype: torch.dtype, want: Tensor, tolerance: Tensor) -> tuple[Tensor, Tensor]:
    """Where a 16-bit output may, and where it must, round to an infinity: from half a spacing past the largest on."""
    largest = torch.tensor(torch.finfo(dtype).max, dtype=torch.float64)
    limit = math.inf if dtype == torch.float32 else largest + half_spacing(largest, dtype)
    return want.abs() + tolerance >= limit, want.isfinite() & (want.abs() - tolerance >= limit)


def _describe(values: Tensor) -> str:
    return f"{values.dtype} {tuple(values.shape)} stride {values.stride()}"


def _finite(values: Tensor) -> Tensor:
    return values.nan_to_num(0.0, 0.0, 0.0)


def steepest(act: activations.Activation, most: Tensor) -> Tensor | float:
    """The steepest slope of an activation up to these values."""
    grows = STEEPEST_UP_TO.get(act.name)
    return LIPSCHITZ[act.name](*act.params) if grows is None else grows(most)


def _through_activation(act: activations.Activation | None, c: Tensor, want: Tensor, error: Tensor) -> Tensor:
    if act is None:
        return error
    spread = steepest(act, c + error) * error
    if act.name == "softplus":  # torch's switch to the identity at x * beta > threshold is a step
        beta, threshold = act.params
        near = (c * beta - threshold).abs() <= abs(beta) * error + 4 * UNIT * abs(threshold)
        spread = spread + near * math.log1p(math.exp(-threshold)) / abs(beta)
    largest = want.abs() + spread
    ulp = torch.exp2(torch.frexp(largest.clamp(2.0**-126, MAX)).exponent.double() - 24)
    return spread + torch.maximum(4 * ulp, 1e-6 * largest)


def _same_special(
    act: activations.Activation | None, got: Tensor, c: Tensor, want: Tensor, dtype: torch.dtype
) -> Tensor:
    """Where c is no number: NaN for NaN; for an infinity the limit of the activation, or what torch itself returns."""
    torchs = activations.apply(act, c)
    tolerance = 1e-6 * want.abs() + half_spacing(want.abs(), dtype)
    close = (got == want) | (want.isfinite() & ((got - want).abs() <= tolerance))
    return torch.where(c.isnan(), got.isnan(), close | (torchs.isnan() & got.isnan()))


def _explain(wrong: Tensor, got: Tensor, want: Tensor, tolerance: Tensor, c: Tensor) -> str:
    i, j = (int(v) for v in wrong.nonzero()[0])
    rows, columns = int(wrong.any(1).sum()), int(wrong.any(0).sum())
    return (
        f"y[{i}, {j}] = {got[i, j].item()!r}, expected {want[i, j].item()!r} +- {tolerance[i, j].item():.3g} "
        f"(sum {c[i, j].item()!r}); {int(wrong.sum())} of {wrong.numel()} wrong, in {rows} rows and {columns} columns"
    )


def random_case(
    m: int, n: int, k: int, dtypes: Dtypes = FP32, *, bias: bool = True
) -> tuple[Tensor, Tensor, Tensor | None]:
    """x [m, k], w [n, k], b [n] as in a trained layer: normal, with sums of about unit variance."""
    x, w = torch.randn(m, k), torch.randn(n, k) / math.sqrt(max(k, 1))
    factor = whole_factor(w, dtypes.weight)
    return stored(dtypes, x / factor, w * factor, torch.randn(n) if bias else None)


def whole_factor(w: Tensor, dtype: torch.dtype) -> float:
    """For int8, which has no fractions: what makes 127 of the largest number of w; else 1."""
    return 127 / float(w.abs().max()) if dtype == torch.int8 and w.any() else 1.0


def stored(dtypes: Dtypes, x: Tensor, w: Tensor, b: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
    """The operands in these formats, to the nearest."""
    w = w if dtypes.weight.is_floating_point else w.round()
    return x.to(dtypes.x), w.to(dtypes.weight), None if b is None else b.to(dtypes.bias)


def exact_case(
    m: int, n: int, k: int, dtypes: Dtypes = FP32, *, sums: Sums = FP32_SUMS, bias: bool = True
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Small non-zero integers whose partial sums are all exact, so that every order of summation gives the same bits.

    In fp32 that is sum |x w| + |b| <= 2^24, in fp16 2^11 for the products of a block.
    """
    limit = min(8, math.isqrt(2**24 // (k + 1)))
    if sums.block:
        limit = min(limit, math.isqrt(2**11 // sums.block))
    assert limit >= 1, f"K = {k} is too long for sums of integers to stay exact in fp32"

    def integers(*shape: int) -> Tensor:
        return (torch.randint(1, limit + 1, shape) * (torch.randint(0, 2, shape) * 2 - 1)).float()

    return stored(dtypes, integers(m, k), integers(n, k), integers(n) if bias else None)


def adversarial_cases(
    k: int, m: int = 5, n: int = 7, dtypes: Dtypes = FP32
) -> Iterator[tuple[str, Tensor, Tensor, Tensor | None]]:
    """(name, x [m, k], w [n, k], b [n] or None) that break careless summation, masking or padding; needs k >= 1.

    What is tiny or huge is so for the format of x and for that of w.
    """
    of_weight = torch.finfo(dtypes.weight if dtypes.weight.is_floating_point else torch.float32)
    for name, x, w, b in _adversarial(k, m, n, torch.finfo(dtypes.x), of_weight):
        if dtypes.weight.is_floating_point or w.isfinite().all():
            yield name, *stored(dtypes, x, w * whole_factor(w, dtypes.weight), b)


def _adversarial(
    k: int, m: int, n: int, of_x: torch.finfo, of_w: torch.finfo
) -> Iterator[tuple[str, Tensor, Tensor, Tensor | None]]:
    x, w, b = random_case(m, n, k)
    sign = torch.ones(k)
    sign[1::2] = -1
    pairs = x.repeat_interleave(2, 1)[:, :k] * sign
    yield "cancellation", pairs, w.repeat_interleave(2, 1)[:, :k] * (1 + 8 * of_w.eps * torch.rand(n, k)), None
    huge = 1e-3 * x
    huge[:, k // 2] = min(1e6, of_x.max / 4)
    yield "one huge, many tiny", huge, w, b
    yield "alternating signs", x.abs() * sign, w.abs(), b
    yield "denormals", x * of_x.tiny * 0.01, w, b * of_x.tiny * 0.01
    yield "denormal weights", x, w * of_w.tiny * 0.1, b * of_w.tiny * 0.1
    yield "products underflow", x * of_x.tiny**0.5 * 1e-3, w * of_w.tiny**0.5 * 1e-3, None
    yield "signed zeros", x * 0.0, w, -b * 0.0
    yield "overflow", x.abs() * of_x.max**0.8, w.abs() * of_w.max**0.8, b
    yield "overflow in the middle", x.abs().clamp_max(3) * sign * (of_x.max / 3.4), w.abs() * 8, b
    # Weights with zeros turn an infinity into NaN in exactly those columns, and nowhere else.
    holed = w.clone()
    holed[::3] = 0.0
    for value in (math.inf, -math.inf, math.nan):
        for row, column in {(0, 0), (m - 1, k - 1), (m // 2, k // 2)}:
            special = x.clone()
            special[row, column] = value
            yield f"{value} at x[{row}, {column}]", special, holed, b
        for row, column in {(0, 0), (n - 1, k - 1)}:
            special = w.clone()
            special[row, column] = value
            yield f"{value} at w[{row}, {column}]", x, special, b
        yield f"{value} in the bias", x, w, torch.cat([b[:-1], torch.tensor([value])])
