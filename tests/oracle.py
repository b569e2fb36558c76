"""What a linear layer may return: the fp64 value, and how far from it an honest fp32 kernel can land.

For sums of K products and a bias accumulated in fp32 in any order, with or without FMA (Higham, Accuracy and Stability
of Numerical Algorithms, section 3.1), with u = 2^-24 and gamma_n = n u / (1 - n u):

    |c - c*| <= E = gamma_{K+2} (sum |x_k w_k| + |b|) + (K+1) 2^-149 + u_out |c*|

where the second term is what products lose to underflow and u_out is 0 for fp32 outputs, 2^-11 for fp16, 2^-8 for bf16.
An activation f widens that to |y - f(c*)| <= L E + max(4 ulp, 1e-6 relative), L being its Lipschitz constant.
"""

import math
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from fastlinear import activations

UNIT = 2.0**-24
MAX = torch.finfo(torch.float32).max
OUTPUT_ROUNDING = {torch.float32: 0.0, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}
VACUOUS = 0.9  # a check of which more than this share would pass for an output of zeros proves little

# The steepest slope of each activation, given its parameters; tests/test_oracle.py measures them.
LIPSCHITZ: dict[str, Callable[..., float]] = {
    "relu": lambda: 1.0,
    "relu6": lambda: 1.0,
    "gelu": lambda: 1.1290,
    "gelu_tanh": lambda: 1.1300,
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

# torch's own formulas, where those cancel even in fp64, rewritten so that they do not.
STABLE: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": lambda c: 0.5 * c * torch.special.erfc(-c / math.sqrt(2)),
    "gelu_tanh": lambda c: c * torch.sigmoid(math.sqrt(8 / math.pi) * (c + 0.044715 * c**3)),
}


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
    y: Tensor, x: Tensor, w: Tensor, b: Tensor | None = None, activation: object = None, *, exact: bool = False
) -> Result:
    """Holds y [..., N] to activation(x [..., K] @ w [N, K].T + b [N]), inputs taken as stored; AssertionError if not.

    `exact` demands the sums to the last bit, for inputs whose every partial sum is representable (`exact_case`).
    """
    act = activations.resolve(activation)
    n, k = w.shape
    assert y.shape == (*x.shape[:-1], n), f"shape {tuple(y.shape)}, not {(*x.shape[:-1], n)}"
    m = math.prod(x.shape[:-1])
    x2, w2 = x.detach().double().reshape(m, k), w.detach().double()
    bias = torch.zeros(n, dtype=torch.float64) if b is None else b.detach().double()
    got = y.detach().double().reshape(m, n)

    c = x2 @ w2.T + bias
    gauge = _finite(x2).abs() @ _finite(w2).abs().T + _finite(bias).abs()
    gamma = (k + 2) * UNIT / (1 - (k + 2) * UNIT)
    error = torch.zeros_like(c) if exact else gamma * gauge + (k + 1) * 2.0**-149 + OUTPUT_ROUNDING[y.dtype] * c.abs()

    may_overflow = ~c.isnan() & (gauge * (1 + gamma) >= MAX)
    one_sign = c.isfinite() & (gauge * (1 - gamma) <= c.abs())  # then partial sums only grow, in every order
    must_overflow = may_overflow & one_sign & (c.abs() * (1 - gamma) > MAX)
    c = torch.where(must_overflow, c.sign() * math.inf, c)
    want = activate(act, c)
    tolerance = _through_activation(act, c, want, error)

    special = ~c.isfinite()
    unjudged = may_overflow & ~must_overflow
    compared = ~special & ~unjudged
    wrong = torch.where(compared, ~((got - want).abs() <= tolerance), ~_same_special(act, got, c, want)) & ~unjudged
    if wrong.any():
        raise AssertionError(
            f"{_explain(wrong, got, want, tolerance, c)}; x {tuple(x.shape)} stride {x.stride()}, w {tuple(w.shape)} "
            f"stride {w.stride()}, bias {'none' if b is None else tuple(b.shape)}, activation {act}"
        )
    ratio = torch.where(compared, (got - want).abs() / tolerance.clamp_min(2.0**-1000), 0.0)
    vacuous = int((want.abs() <= tolerance)[compared].sum())
    count = int(compared.sum())
    return Result(
        worst=float(ratio.max()) if ratio.numel() else 0.0,
        compared=count,
        nonfinite=int(special.sum()),
        unjudged=int(unjudged.sum()),
        mistrusted=vacuous > VACUOUS * count,
    )


def _finite(values: Tensor) -> Tensor:
    return values.nan_to_num(0.0, 0.0, 0.0)


def _through_activation(act: activations.Activation | None, c: Tensor, want: Tensor, error: Tensor) -> Tensor:
    if act is None:
        return error
    spread = LIPSCHITZ[act.name](*act.params) * error
    if act.name == "softplus":  # torch's switch to the identity at x * beta > threshold is a step
        beta, threshold = act.params
        near = (c * beta - threshold).abs() <= abs(beta) * error + 4 * UNIT * abs(threshold)
        spread = spread + near * math.log1p(math.exp(-threshold)) / abs(beta)
    largest = want.abs() + spread
    ulp = torch.exp2(torch.frexp(largest.clamp(2.0**-126, MAX)).exponent.double() - 24)
    return spread + torch.maximum(4 * ulp, 1e-6 * largest)


def _same_special(act: activations.Activation | None, got: Tensor, c: Tensor, want: Tensor) -> Tensor:
    """Where c is no number: NaN for NaN; for an infinity the limit of the activation, or what torch itself returns."""
    torchs = activations.apply(act, c)
    close = (got == want) | (want.isfinite() & ((got - want).abs() <= 1e-6 * want.abs()))
    return torch.where(c.isnan(), got.isnan(), close | (torchs.isnan() & got.isnan()))


def _explain(wrong: Tensor, got: Tensor, want: Tensor, tolerance: Tensor, c: Tensor) -> str:
    i, j = (int(v) for v in wrong.nonzero()[0])
    rows, columns = int(wrong.any(1).sum()), int(wrong.any(0).sum())
    return (
        f"y[{i}, {j}] = {got[i, j].item()!r}, expected {want[i, j].item()!r} +- {tolerance[i, j].item():.3g} "
        f"(sum {c[i, j].item()!r}); {int(wrong.sum())} of {wrong.numel()} wrong, in {rows} rows and {columns} columns"
    )


def random_case(m: int, n: int, k: int, *, bias: bool = True) -> tuple[Tensor, Tensor, Tensor | None]:
    """x [m, k], w [n, k], b [n] as in a trained layer: normal, with sums of about unit variance."""
    return torch.randn(m, k), torch.randn(n, k) / math.sqrt(max(k, 1)), torch.randn(n) if bias else None


def exact_case(m: int, n: int, k: int, *, bias: bool = True) -> tuple[Tensor, Tensor, Tensor | None]:
    """Small non-zero integers with sum |x w| + |b| <= 2^24, so that every order of summation gives the same bits."""
    limit = min(8, math.isqrt(2**24 // (k + 1)))
    assert limit >= 1, f"K = {k} is too long for sums of integers to stay exact in fp32"

    def integers(*shape: int) -> Tensor:
        return (torch.randint(1, limit + 1, shape) * (torch.randint(0, 2, shape) * 2 - 1)).float()

    return integers(m, k), integers(n, k), integers(n) if bias else None


def adversarial_cases(k: int, m: int = 5, n: int = 7) -> Iterator[tuple[str, Tensor, Tensor, Tensor | None]]:
    """(name, x [m, k], w [n, k], b [n] or None) that break careless summation, masking or padding; needs k >= 1."""
    x, w, b = random_case(m, n, k)
    sign = torch.ones(k)
    sign[1::2] = -1
    pairs = x.repeat_interleave(2, 1)[:, :k] * sign
    yield "cancellation", pairs, w.repeat_interleave(2, 1)[:, :k] * (1 + 2.0**-20 * torch.rand(n, k)), None
    huge = 1e-3 * x
    huge[:, k // 2] = 1e6
    yield "one huge, many tiny", huge, w, b
    yield "alternating signs", x.abs() * sign, w.abs(), b
    yield "denormals", x * 1e-40, w, b * 1e-40
    yield "products underflow", x * 1e-22, w * 1e-22, None
    yield "signed zeros", x * 0.0, w, -b * 0.0
    yield "overflow", x.abs() * 1e30, w.abs() * 1e30, b
    yield "overflow in the middle", x.abs().clamp_max(3) * sign * 1e38, w.abs() * 8, b
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
