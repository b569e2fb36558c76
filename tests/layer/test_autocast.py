"""Under torch.autocast("cpu") a converted model is what a stock one is, on the 16-bit kernels."""

import copy
import pickle
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from models import OFF, PAIRINGS, Pairing, inputs, mlp
from oracle import check
from torch import Tensor, nn
from transformers.activations import QuickGELUActivation, ReLUSquaredActivation
from transformers.pytorch_utils import Conv1D

import fastlinear
import fastlinear._tensors as _tensors
from fastlinear import FastLinear
from fastlinear.layer import linear
from fastlinear.spec import activations
from fastlinear.spec.precision import Precision

K, N = 37, 70
DTYPES = [torch.bfloat16, torch.float16]
EVERY_DTYPE = pytest.mark.parametrize("dtype", DTYPES)
ACTIVATIONS: list[nn.Module] = [
    nn.ReLU(), nn.ReLU6(), nn.GELU(), nn.GELU("tanh"), nn.SiLU(), nn.Sigmoid(), nn.Tanh(), nn.Hardswish(),
    nn.Hardsigmoid(), nn.Hardtanh(), nn.LeakyReLU(0.2), nn.ELU(), nn.Softplus(), nn.Mish(), QuickGELUActivation(),
    ReLUSquaredActivation(),
]  # fmt: skip
assert {a.name for module in ACTIVATIONS if (a := activations.recognize(module))} == set(activations.names())


def autocast(dtype: torch.dtype) -> torch.autocast:
    return torch.autocast("cpu", dtype)


def twins(activation: nn.Module | None = None) -> tuple[nn.Module, nn.Module]:
    """A stock layer with the activation that follows it, and the same converted; neither wants gradients."""
    stock = nn.Sequential(nn.Linear(K, N), activation or nn.Identity()).eval().requires_grad_(False)
    return stock, OFF(stock)


def bounded(y: Tensor, layer: FastLinear, x: Tensor, dtype: torch.dtype) -> None:
    """Holds y to the bound of a kernel for x and the weight as autocast casts them."""
    assert y.dtype == dtype
    weight = layer.weight.to(dtype)
    check(y, x.to(dtype), weight.t() if layer._transposed else weight, layer.bias, layer.activation)


@EVERY_DTYPE
@pytest.mark.parametrize("activation", ACTIVATIONS, ids=lambda module: repr(module))
@pytest.mark.parametrize("of_x", _tensors.FORMATS)
def test_every_activation(dtype: torch.dtype, activation: nn.Module, of_x: torch.dtype) -> None:
    """Whatever x is in: the dtype that stock autocast gives for this activation, and values within the bound."""
    stock, fast = twins(activation)
    for m in (1, 5, 64):
        x = torch.randn(m, K).to(of_x)
        with autocast(dtype):
            y, expected = fast(x), stock(x)
        assert y.dtype == expected.dtype
        bounded(y, fast[0], x, dtype)
        torch.testing.assert_close(y, expected, rtol=4 * torch.finfo(dtype).eps, atol=4 * torch.finfo(dtype).eps)
    assert {(c.x, c.source) for c in fast[0].plans} == {(_tensors.FORMATS[dtype], "heuristic")}


@EVERY_DTYPE
@pytest.mark.parametrize("pairing", PAIRINGS)
def test_every_parameter_and_pack(dtype: torch.dtype, pairing: Pairing) -> None:
    """The parameter is cast as autocast casts it, whatever it is in and is packed in otherwise."""
    stock = nn.Linear(K, N).to(pairing.held).eval().requires_grad_(False)
    fast = OFF(stock, **({} if pairing.packed == pairing.held else {"dtype": pairing.packed}))
    x = torch.randn(5, K).to(pairing.x)
    with autocast(dtype):
        bounded(fast(x), fast, x, dtype)
    assert not torch.is_autocast_enabled("cpu")
    before = fast(x)
    with autocast(dtype):
        bounded(fast(x), fast, x, dtype)
    assert torch.equal(fast(x), before) and before.dtype == pairing.x


@EVERY_DTYPE
def test_conv1d(dtype: torch.dtype) -> None:
    """GPT-2's Conv1D too."""
    conv = Conv1D(N, K).eval().requires_grad_(False)
    x = torch.randn(2, 3, K)
    with autocast(dtype):
        expected = conv(x)
        linear.adopt(conv, tune="off")
        y = conv(x)
    bounded(y, conv, x, dtype)
    assert y.dtype == expected.dtype and conv.pack_nbytes > 0


@EVERY_DTYPE
@pytest.mark.parametrize("mode", [torch.enable_grad, torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("inside", [False, True])
def test_grad_modes(dtype: torch.dtype, mode: Callable[[], Any], inside: bool) -> None:
    """In every grad mode, entered before autocast or after, with parameters that would want gradients elsewhere."""
    _, fast = twins(nn.GELU())
    fast.requires_grad_(mode is not torch.enable_grad)
    x = torch.randn(5, K)
    first, second = (autocast(dtype), mode()) if inside else (mode(), autocast(dtype))
    with first, second:
        y = fast(x)
    assert y.is_inference() == (mode is torch.inference_mode) and not y.requires_grad
    bounded(y, fast[0], x, dtype)
    assert fast[0].plans


@EVERY_DTYPE
def test_nested(dtype: torch.dtype) -> None:
    """Autocast switched off within autocast, and another dtype within, count where they stand."""
    _, fast = twins()
    x = torch.randn(5, K)
    expected = fast(x)
    other = next(d for d in DTYPES if d != dtype)
    with autocast(dtype):
        first = fast(x)
        with torch.autocast("cpu", enabled=False):
            assert torch.equal(fast(x), expected)
        with autocast(other):
            bounded(fast(x), fast[0], x, other)
        assert torch.equal(fast(x), first)
    assert torch.equal(fast(x), expected)
    assert [chosen.x for chosen in fast[0].plans] == ["bf16", "fp16", "fp32"]


@EVERY_DTYPE
def test_training_is_stocks(dtype: torch.dtype) -> None:
    """In training everything is torch's: outputs and gradients bit for bit."""
    stock, fast = twins(nn.GELU())
    results = []
    for model in (stock, fast):
        model.train().requires_grad_()
        model.zero_grad()
        x = torch.linspace(-1, 1, 5 * K).view(5, K).requires_grad_()
        with autocast(dtype):
            y = model(x)
        y.float().square().sum().backward()
        results.append((y, x.grad, *(p.grad.clone() for p in model.parameters())))
    assert all(torch.equal(a, b) and a.dtype == b.dtype for a, b in zip(*results, strict=True))
    assert fast[0].pack_nbytes == 0 and not fast[0].plans


@EVERY_DTYPE
def test_gradients(dtype: torch.dtype) -> None:
    """In eval mode outputs are what they are without gradients, and those are stock's but for rounding."""
    stock, fast = twins(nn.GELU())
    results = []
    for model in (stock, fast):
        x = torch.linspace(-1, 1, 5 * K).view(5, K)
        with autocast(dtype):
            expected = model(x)
            y = model.requires_grad_()(x.requires_grad_())
        assert torch.equal(y, expected)
        results.append(torch.autograd.grad(y.float().square().sum(), (x, *model.parameters())))
    for of_stock, of_fast in zip(*results, strict=True):
        bound = 8 * torch.finfo(dtype).eps * of_stock.abs().max().item()
        torch.testing.assert_close(of_fast, of_stock, rtol=0, atol=bound)
    assert fast[0].plans


@EVERY_DTYPE
def test_training_without_gradients_is_stocks(dtype: torch.dtype) -> None:
    """The same under no_grad: a layer in training mode packs nothing."""
    stock, fast = twins()
    with autocast(dtype):
        assert torch.equal(fast.train()(x := torch.randn(5, K)), stock(x))
    assert fast[0].pack_nbytes == 0


@EVERY_DTYPE
@pytest.mark.parametrize(
    "make",
    [
        lambda: torch.randn(5, K, dtype=torch.float64),
        lambda: torch.ones(5, K, dtype=torch.long),
        lambda: torch.randn(5, K, dtype=torch.complex64),
        lambda: torch.randn(5, K, device="meta"),
        lambda: torch.randn(5, K).to_sparse(),
        lambda: torch.randn(5, K + 1),
        lambda: torch.randn(()),
        lambda: torch.nested.nested_tensor([torch.randn(2, K), torch.randn(3, K)]),
        lambda: [1.0] * K,
        lambda: None,
    ],
    ids=["fp64", "integers", "complex", "meta", "sparse", "too wide", "0-D", "nested", "list", "None"],
)
@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning")
def test_other_inputs_are_stocks(dtype: torch.dtype, make: Callable[[], Any]) -> None:
    """What autocast leaves alone, or refuses, is left alone and refused."""
    stock, fast = twins()

    def outcome(model: nn.Module) -> object:
        try:
            y = model(make())
        except (RuntimeError, TypeError, NotImplementedError) as error:
            return type(error)
        return y.dtype, y.layout, y.device

    with autocast(dtype):
        assert outcome(fast) == outcome(stock)


@contextmanager
def autocast_elsewhere() -> Iterator[None]:
    """As on a machine with a GPU, under autocast for that."""
    torch.set_autocast_enabled("cuda", True)
    try:
        yield
    finally:
        torch.set_autocast_enabled("cuda", False)
        torch.clear_autocast_cache()


@pytest.mark.parametrize("pairing", PAIRINGS)
def test_another_devices_autocast_is_none(pairing: Pairing) -> None:
    """Autocast for another device changes nothing here."""
    fast = OFF(nn.Linear(K, N).to(pairing.held).eval().requires_grad_(False), dtype=None)
    linear.set_precision(fast, Precision(_tensors.FORMATS[pairing.packed]))
    x = torch.randn(5, K).to(pairing.x)
    with autocast_elsewhere():
        y = fast(x)
    assert torch.equal(y, fast(x)) and y.dtype == pairing.x and len(fast.plans) == 1


@EVERY_DTYPE
def test_memory(dtype: torch.dtype) -> None:
    """Only what was called for is packed; the packs for autocast go with the others, and into no copy or file."""
    _, fast = twins()
    x, layer = torch.randn(5, K), fast[0]
    size = len(pickle.dumps(fast))
    with autocast(dtype):
        fast(x)
        narrow = layer.pack_nbytes
        assert 0 < narrow < 0.7 * layer.weight.nbytes * 96 / N
        assert copy.deepcopy(fast)[0].pack_nbytes == 0 and len(pickle.dumps(fast)) == size
    fast(x)
    assert layer.pack_nbytes > 2.5 * narrow
    for drop in (fastlinear.refresh, nn.Module.half, nn.Module.float):
        drop(fast)
        assert layer.pack_nbytes == 0 and not layer.plans
        with autocast(dtype):
            bounded(fast(x), layer, x, dtype)
    assert str(fastlinear.unconvert(fast)[0]) == str(nn.Linear(K, N))
    assert vars(fast[0]).keys() == vars(nn.Linear(K, N)).keys()


@EVERY_DTYPE
def test_changes_are_followed(dtype: torch.dtype) -> None:
    """After the weight changes, each call, within autocast and without, has the new one."""
    _, fast = twins()
    x, layer = torch.randn(5, K), fast[0]
    for _ in range(3):
        check(fast(x), x, layer.weight, layer.bias)
        with autocast(dtype):
            bounded(fast(x), layer, x, dtype)
        layer.weight.mul_(-1.5)
        layer.bias = nn.Parameter(torch.randn(N), requires_grad=False)
    with autocast(dtype):
        layer.weight.data.zero_()
        fastlinear.refresh(fast)
        bounded(fast(x), layer, x, dtype)
        layer.half()
        layer.weight.normal_()
        bounded(fast(x), layer, x, dtype)


@EVERY_DTYPE
def test_hooks_and_ways_to_call(dtype: torch.dtype) -> None:
    """Hooks see the autocast output; forward() and keyword calls are the same call."""
    _, fast = twins()
    x, seen = torch.randn(5, K), []
    with autocast(dtype):
        expected = fast(x)
        assert torch.equal(fast[0].forward(x), expected) and torch.equal(fast[0](input=x), expected)
        fast[0].register_forward_hook(lambda module, args, y: seen.append(y.dtype))
        assert torch.equal(fast(x), expected)
    assert seen == [dtype]


@EVERY_DTYPE
def test_disable(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """FASTLINEAR_DISABLE=1 is stock autocast, bit for bit."""
    monkeypatch.setenv("FASTLINEAR_DISABLE", "1")
    stock, fast = twins(nn.ReLU())
    x = torch.randn(5, K)
    with autocast(dtype):
        assert torch.equal(fast(x), stock(x))
    assert fast[0].pack_nbytes == 0


@EVERY_DTYPE
def test_tuning(dtype: torch.dtype) -> None:
    """A first call under autocast tunes like any other, and leaves autocast as it was."""
    layer, x = FastLinear(K, N + 1, activation="relu").eval().requires_grad_(False), torch.randn(5, K)
    with autocast(dtype):
        y = layer(x)
        assert torch.is_autocast_enabled("cpu") and torch.get_autocast_dtype("cpu") == dtype
    (chosen,) = layer.plans
    assert chosen.source == "tuned" and y.dtype == dtype
    assert {name.split("/")[0] for name, _ in chosen.table} >= {"torch", _tensors.FORMATS[dtype]}
    torch.testing.assert_close(y.float(), x.mm(layer.weight.t()).add(layer.bias).relu(), rtol=0.05, atol=0.05)


def test_threads_have_their_own_autocast() -> None:
    """Python threads under different autocasts share one layer, and each gets its own dtype."""
    _, fast = twins()
    x = torch.randn(5, K)
    expected: dict[Any, Tensor] = {None: fast(x)}
    for dtype in DTYPES:
        with autocast(dtype):
            expected[dtype] = OFF(fastlinear.unconvert(copy.deepcopy(fast)))(x)
        assert expected[dtype].dtype == dtype
    failures: list[object] = []

    def work(dtype: torch.dtype | None) -> None:
        for _ in range(200):
            with torch.autocast("cpu", dtype or torch.bfloat16, enabled=dtype is not None):
                if not torch.equal(fast(x), expected[dtype]):
                    failures.append(dtype)

    threads = [threading.Thread(target=work, args=(dtype,)) for dtype in (None, *DTYPES) * 2]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures


@EVERY_DTYPE
def test_models(dtype: torch.dtype) -> None:
    """A model with other layers between, which autocast runs in other dtypes, is as near to fp64 as the stock model."""
    encoder = nn.TransformerEncoderLayer(64, 4, 128, batch_first=True)
    stock = nn.Sequential(*mlp(8, 64), nn.LayerNorm(64), encoder, nn.Linear(64, 8), nn.Softmax(-1)).eval()
    fast, x = OFF(stock), inputs().view(1, 5, 8)
    with torch.inference_mode():
        want = copy.deepcopy(stock).double()(x.double())
        with autocast(dtype):
            y, expected = fast(x), stock(x)
    assert y.dtype == expected.dtype
    assert (y - want).abs().max() <= (expected - want).abs().max() + 2 * torch.finfo(dtype).eps
    assert fast[0].plans and fast[3].linear1.plans
