"""FastGatedLinear: gate, activation and multiplication in one product, in every way a layer may be run."""

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fastlinear
from fastlinear import FastGatedLinear
from fastlinear.spec import activations, programs

K, N = 24, 45
ROUNDING = {torch.float32: 1e-5, torch.bfloat16: 3e-2, torch.float16: 4e-3}
QUANTIZE = [fastlinear.Int8Dynamic(), fastlinear.Int8Dynamic(asymmetric=True), fastlinear.Int8WeightOnly()]


def made(activation: str = "silu", dtype: torch.dtype = torch.float32, **options: Any) -> tuple[Any, ...]:
    gate, up = nn.Linear(K, N).to(dtype), nn.Linear(K, N).to(dtype)
    return FastGatedLinear.from_linears(gate, up, activation, **options).eval(), gate, up


def expected(activation: str, gate: nn.Linear, up: nn.Linear, x: Tensor) -> Tensor:
    gate, up = copy.deepcopy(gate).double(), copy.deepcopy(up).double()
    return activations.apply(activations.resolve(activation), gate(x.double())) * up(x.double())


@pytest.mark.parametrize("dtype", ROUNDING)
@pytest.mark.parametrize("activation", [each.name for each in programs.GATES.values()])
def test_meaning(activation: str, dtype: torch.dtype) -> None:
    """Each gate, for every format and any number of rows, on the kernels; the answer is half as wide as the weight."""
    fast, gate, up = made(activation, dtype)
    for shape in ((), (1,), (2, 5), (0,), (40,)):
        x = torch.randn(*shape, K).to(dtype)
        with torch.no_grad():
            y = fast(x)
        assert y.shape == (*shape, N) and y.dtype is dtype and y.is_contiguous() and not fast._elsewhere
        near = {"rtol": ROUNDING[dtype], "atol": ROUNDING[dtype]}
        torch.testing.assert_close(y.double(), expected(activation, gate, up, x), **near)


@pytest.mark.parametrize("quantize", QUANTIZE, ids=str)
def test_int8(quantize: Any) -> None:
    """The integers are those of the two layers, frozen or not; gradients go through them."""
    fast, gate, up = made(quantize=quantize)
    alone = [fastlinear.FastLinear.from_linear(layer, quantize=quantize).eval() for layer in (gate, up)]
    x, g = torch.randn(5, K, requires_grad=True), torch.randn(5, N)
    want = nn.functional.silu(alone[0](x)) * alone[1](x)
    (dx,) = torch.autograd.grad(want, x, g)
    for _ in range(2):
        y = fast(x)
        torch.testing.assert_close(y, want, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(torch.autograd.grad(y, x, g)[0], dx, rtol=1e-4, atol=1e-5)
        fastlinear.freeze(nn.Sequential(fast))
        assert fast._frozen is not None and not fast._elsewhere


@pytest.mark.parametrize("training", [False, True])
def test_gradients(training: bool) -> None:
    """Of x, weight and bias, as torch has them."""
    fast, gate, up = made()
    fast.train(training)
    x = torch.randn(3, K, requires_grad=True)
    ours = torch.autograd.grad(fast(x).square().sum(), [x, fast.weight, fast.bias])
    parameters = [x, gate.weight, up.weight, gate.bias, up.bias]
    theirs = torch.autograd.grad((nn.functional.silu(gate(x)) * up(x)).square().sum(), parameters)
    for mine, part in zip(ours, (theirs[:1], theirs[1:3], theirs[3:]), strict=True):
        torch.testing.assert_close(mine, torch.cat(part), rtol=1e-4, atol=1e-4)


def test_modes() -> None:
    """vmap, autocast, trace, export, compile and opcheck, of a layer and of a frozen one."""
    fast, gate, up = made()
    x = torch.randn(3, 5, K)
    want, near = expected("silu", gate, up, x).float(), {"rtol": 1e-5, "atol": 1e-5}
    for _ in range(2):
        with torch.no_grad():
            torch.testing.assert_close(torch.vmap(fast)(x), want, **near)
            torch.testing.assert_close(torch.jit.trace(fast, x)(x), want, **near)
            torch.testing.assert_close(torch.export.export(fast, (x,)).module()(x), want, **near)
            torch._dynamo.reset()
            torch.testing.assert_close(torch.compile(fast, backend="aot_eager", fullgraph=True)(x), want, **near)
            with torch.autocast("cpu", torch.bfloat16):
                torch.testing.assert_close(fast(x).float(), want, rtol=0.05, atol=0.05)
        fastlinear.freeze(nn.Sequential(fast))


@pytest.mark.parametrize("quantize", [None, *QUANTIZE], ids=str)
def test_copies_and_files(quantize: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A copy, a pickle, a state dict, a frozen, saved, loaded and thawed layer are the same, bit for bit."""
    monkeypatch.setenv("FASTLINEAR_AUTOTUNE", "off")  # a frozen layer, measured anew, may run another kernel
    fast, gate, up = made(quantize=quantize)
    x, state = torch.randn(3, K), fast.state_dict()
    assert torch.equal(state["weight"], torch.cat([gate.weight, up.weight]))
    with torch.no_grad():
        y = fast(x)
    path, frozen = tmp_path / "m.safetensors", fastlinear.freeze(nn.Sequential(copy.deepcopy(fast)))
    fastlinear.save(frozen, path)
    same = [copy.deepcopy(fast), pickle.loads(pickle.dumps(fast)), frozen[0], pickle.loads(pickle.dumps(frozen[0]))]
    same.append(fastlinear.load(path, nn.Sequential(FastGatedLinear(K, N))).eval()[0])
    for each in same:
        with torch.no_grad():
            assert torch.equal(each(x), y)
        torch.testing.assert_close(each.weight.float(), state["weight"], rtol=0.02, atol=0.02)
        if quantize is None:
            assert torch.equal(each.weight, state["weight"])
    row = fastlinear.report(frozen)[0]
    assert (row.in_features, row.out_features, row.decision) == (K, N, "fast") and row.activation.name == "swiglu"
    fastlinear.unfreeze(frozen)
    assert type(frozen[0]._parameters["weight"]) is nn.Parameter and frozen[0].weight.shape == (2 * N, K)


def test_one_layer_for_both() -> None:
    """A linear layer whose output is chunked shares its parameters; a change of them is seen."""
    both = nn.Linear(K, 2 * N)
    fast, x = FastGatedLinear.from_linear(both, "gelu").eval(), torch.randn(2, K)
    assert fast.weight is both.weight and fast.out_features == N and "activation='geglu'" in repr(fast)
    for _ in range(2):
        with torch.no_grad():
            a, b = both(x).chunk(2, -1)
            torch.testing.assert_close(fast(x), nn.functional.gelu(a) * b, rtol=1e-5, atol=1e-5)
            both.weight.mul_(2)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: FastGatedLinear(4, 4, activation="tanh"), "takes one of sigmoid, relu, relu2, gelu, .*, silu as its"),
        (lambda: FastGatedLinear.from_linear(nn.Linear(4, 5)), "two channels for each output, but the weight has 5"),
        (lambda: FastGatedLinear.from_linears(nn.Linear(4, 5), nn.Linear(4, 6)), "alike, but are 4 x 5 .* and 4 x 6"),
        (lambda: FastGatedLinear.from_linears(nn.Linear(4, 5), nn.Linear(4, 5, bias=False)), "bias and .* without"),
        (lambda: FastGatedLinear.from_linears(nn.Linear(4, 5), nn.ReLU()), "modules, but was given ReLU"),
    ],
)  # fmt: skip
def test_what_cannot_be_one_is_refused(make: Any, message: str) -> None:
    """The message says what was given and what is allowed."""
    with pytest.raises((TypeError, ValueError), match=message):
        make()
