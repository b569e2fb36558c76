"""Every activation on every ISA: within 4 ulp or 1e-6 of the fp64 value over the whole range, torch's inf and NaN."""

import math
import os
import subprocess
from collections.abc import Callable
from functools import cache
from pathlib import Path

import oracle
import pytest
import torch
from library import ROOT
from torch import Tensor

import fastlinear._kernels as _kernels
import fastlinear._plans as _plans
import fastlinear._products as _products
import fastlinear._weights as _weights
from fastlinear.spec import activations

FLOATS = 1 << 32

# The best fp32 kernel of each ISA that runs here; the epilogue depends on the ISA alone, and an ISA that only adds
# 16-bit arithmetic uses the epilogue of the one below.
KERNELS = {k["isa"]: k for k in reversed(_kernels.kernels()) if k["runnable"] and k["format"] == "fp32"}

Case = tuple[str, tuple[float, ...]]
CASES: list[Case] = [
    *_kernels.activations().items(),
    ("hardtanh", (-0.3, 7.5)),
    ("hardtanh", (2.0, 2.0)),
    ("leaky_relu", (0.0,)),
    ("leaky_relu", (-1.7,)),
    ("elu", (0.0,)),
    ("elu", (-2.3,)),
    ("softplus", (2.0, 20.0)),
    ("softplus", (0.3, 5.0)),
    ("softplus", (1.0, 200.0)),
    ("softplus", (-1.1, 20.0)),
]

# Where a formula changes branch, leaves the normal range or reaches 0: every float near these, of either sign.
TURNS = [0.0, 2.0**-126, 0.3, 0.3466, 0.5, 1.0, 2.0, 3.0, 5.0, 6.0, 7.5, 10.0, 10.5, 10.9, 13.0, 14.2, 14.37, 14.6]
TURNS += [16.6, 20.0, 25.0, 30.0, 40.0, 87.3, 88.7, 63.6, 103.9, 104.0, 108.6, 126.0, 200.0, math.inf]


def of_bits(bits: Tensor) -> Tensor:
    """The floats with these bit patterns (int64, taken modulo 2^32)."""
    return bits.to(torch.int32).view(torch.float32)


@cache
def inputs() -> Tensor:
    """About 400 000 floats: every 21013th of all, a fine grid where functions bend, all near the turns and the powers
    of two."""
    near = torch.arange(-64, 65)
    turns = torch.tensor([*TURNS, *(-turn for turn in TURNS)]).view(torch.int32).long()
    powers = torch.arange(0, FLOATS, 1 << 23)  # the bit patterns of all, of either sign, and of 0, inf and NaN
    around = torch.cat([(turns[:, None] + near).flatten(), (powers[:, None] + near[::8]).flatten()])
    return torch.cat([of_bits(torch.arange(0, FLOATS, 21013)), torch.linspace(-130, 130, 200_003), of_bits(around)])


def run(isa: str, name: str, params: tuple[float, ...], x: Tensor) -> Tensor:
    """The activation of x [N] on an ISA: one row, K = 1, the values as the weight, so that the sums are exact."""
    kernel = KERNELS[isa]
    packed = _weights.Packed(x[:, None], kernel["layout"])
    out = torch.full((1, len(x)), -7.0)
    epilogue = _plans.Epilogue([(name, params)])
    _products.run(packed, _plans.Plan(kernel["name"]), epilogue, torch.ones(1, 1), None, out)
    return out[0]


def truth(name: str, params: tuple[float, ...], x: Tensor) -> Tensor:
    """torch's formula in fp64 for finite x, torch's own result for the others; parameters rounded to fp32."""
    rounded = tuple(torch.tensor(params).tolist())
    activation = None if name == "identity" else activations.Activation(name, rounded)
    own = activations.apply(activation, x.double())
    stable: Callable[[Tensor], Tensor] | None = oracle.STABLE.get(name)
    return own if stable is None else torch.where(x.isfinite(), stable(x.double()), own)


def wrong(got: Tensor, want: Tensor) -> Tensor:
    """Where fp32 `got` misses fp64 `want` by more than 4 ulp and 1e-6; infinities and NaN must be the same."""
    nearest = want.float()
    ulp = torch.exp2(torch.frexp(want.abs().clamp_min(2.0**-126)).exponent.double() - 24)
    close = (got.double() - want).abs() <= torch.maximum(4 * ulp, 1e-6 * want.abs())
    return ~((close & nearest.isfinite()) | (got == nearest) | (got.isnan() & nearest.isnan()))


@pytest.mark.parametrize("isa", KERNELS)
@pytest.mark.parametrize(("name", "params"), CASES, ids=[f"{name}{list(params)}" for name, params in CASES])
def test_every_activation_is_accurate_on_every_isa(isa: str, name: str, params: tuple[float, ...]) -> None:
    """4 ulp or 1e-6 relative over the whole float range, denormal results, infinities, NaN and -0 included."""
    x = inputs()
    got, want = run(isa, name, params, x), truth(name, params, x)
    bad = wrong(got, want).nonzero().flatten()
    first = [(x[i].item(), got[i].item(), want[i].item()) for i in bad[:5]]
    assert not first, f"{len(bad)} of {len(x)} wrong; (x, got, expected): {first}"


@pytest.mark.parametrize("isa", KERNELS)
@pytest.mark.parametrize("n", range(1, 34))
def test_last_vector_is_as_accurate_as_the_others(isa: str, n: int) -> None:
    """A row's last columns, fewer than a vector, get the same bits as in a full vector."""
    x = torch.linspace(-9, 9, 64)
    assert torch.equal(run(isa, "gelu", (), x[:n]), run(isa, "gelu", (), x)[:n])


@pytest.mark.parametrize("isa", KERNELS)
@pytest.mark.parametrize("name", ["gelu", "swiglu"])
def test_a_row_has_the_same_bits_whichever_rows_are_beside_it(isa: str, name: str) -> None:
    """Some rows are finished at once, those that are left over one by one: 1 to 9 rows, a gate among them."""
    kernel = KERNELS[isa]
    gate = _kernels.functions()[name][2]
    weight, x = torch.linspace(-3, 3, 64).view(64, 1), torch.linspace(0.1, 3, 9).view(9, 1)
    packed = _weights.Packed(weight, kernel["layout"])
    epilogue = _plans.Epilogue([(name, ())])

    def rows(x: Tensor) -> Tensor:
        out = torch.empty(len(x), 32 if gate else 64)
        _products.run(packed, _plans.Plan(kernel["name"]), epilogue, x, None, out)
        return out

    one_by_one = torch.cat([rows(row[None]) for row in x])
    for m in range(1, 10):
        assert torch.equal(rows(x[:m]), one_by_one[:m])


def test_the_kernels_know_every_activation_of_the_specification() -> None:
    """Names, number of parameters and defaults of the native epilogues are those of fastlinear.activations."""
    native = _kernels.activations()
    assert set(native) == {"identity", *activations.names()}
    for name in activations.names():
        assert native[name] == pytest.approx(activations.resolve(name).params, rel=2.0**-24)


def test_the_comparison_rejects_what_is_too_coarse() -> None:
    """torch's fp32 gelu loses its tail to cancellation; a zero, a NaN or a finite number in place of inf are errors."""
    x = torch.linspace(-5.5, -4.5, 1000)
    assert wrong(0.5 * x * (1 + torch.erf(x / math.sqrt(2))), truth("gelu", (), x)).all()
    got = torch.tensor([0.0, math.nan, 1e38, math.inf, -math.inf])
    want = torch.tensor([1e-44, 1.0, math.inf, 1.0, math.inf], dtype=torch.float64)
    assert wrong(got, want).all()


CHECKER = ROOT / "tests/kernel/activations.cpp"


@pytest.fixture(scope="module")
def checker(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The checker with the library's own sources, compiled to run for minutes."""
    binary = tmp_path_factory.mktemp("exhaustive") / "activations"
    compiler = [*os.environ.get("CXX", "g++").split(), "-std=c++20", "-ffp-contract=off", f"-I{ROOT / 'include'}"]
    units = sorted(ROOT.glob("csrc/*.cpp"))
    subprocess.run([*compiler, "-O2", CHECKER, *units, "-ldl", "-o", binary], check=True)
    return binary


@pytest.mark.exhaustive
@pytest.mark.parametrize("name", _kernels.activations())
def test_exhaustive_sweep(checker: Path, name: str) -> None:
    """All 2^32 floats, every ISA; docs/numerics.md holds the figures (shown by pytest -s)."""
    done = subprocess.run([checker, "1", f"{name}("], capture_output=True, text=True)
    print(done.stdout)
    assert done.returncode == 0, done.stderr + done.stdout
