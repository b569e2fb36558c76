"""One layer, one set of numbers: whichever mode torch is in, a fast layer in eval mode answers alike, and its gradients
are those of the numbers that it multiplies."""

import copy
import functools
import itertools
import pickle
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from models import OFF
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils.checkpoint import checkpoint
from transformers.pytorch_utils import Conv1D

import fastlinear
import fastlinear._products as _products
from fastlinear import Int4WeightOnly, Int8Dynamic, Int8Static, Int8WeightOnly
from fastlinear.spec import activations, grouping, int4
from fastlinear.spec.int8 import (
    TINY,
    dequantize,
    dequantize_rows,
    quantize_rows,
    quantize_weight,
    signal_to_noise,
)
from fastlinear.spec.reference import Reference

K, N = 24, 20
SAME = 100  # dB between two modes: the rounding of fp32 sums

SCHEMES: dict[str, Callable[[nn.Module, Tensor], dict[str, Any]]] = {
    "fp32": lambda model, x: {},
    **{str(d)[6:]: lambda model, x, d=d: {"dtype": d} for d in (torch.bfloat16, torch.float16)},
    "dynamic": lambda model, x: {"quantize": Int8Dynamic()},
    "asymmetric": lambda model, x: {"quantize": Int8Dynamic(asymmetric=True)},
    "smoothed": lambda model, x: {"quantize": Int8Dynamic(calibration=fastlinear.calibrate(model, [x], smooth=0.5))},
    "static": lambda model, x: {"quantize": Int8Static(fastlinear.calibrate(model, [x]))},
    "static, smoothed": lambda model, x: {"quantize": Int8Static(fastlinear.calibrate(model, [x], smooth=0.5))},
    "weight-only": lambda model, x: {"quantize": Int8WeightOnly()},
    "4 bits": lambda model, x: {"quantize": Int4WeightOnly(16, offsets=True)},
}
KINDS: dict[str, Callable[[], nn.Module]] = {"linear": lambda: nn.Linear(K, N), "conv1d": lambda: Conv1D(N, K)}
every_scheme = pytest.mark.parametrize("scheme", SCHEMES)
every_activation = pytest.mark.parametrize("activation", [None, *activations.names()])
frozen_or_not = pytest.mark.parametrize("freeze", [False, True], ids=["held", "frozen"])


def layer_of(scheme: str, activation: str | None = None, freeze: bool = False, kind: str = "linear") -> Any:
    """A fast layer in eval mode whose Parameters require gradients, as they do in a model that was just made."""
    stock = KINDS[kind]().eval()
    with torch.no_grad():
        stock.weight.normal_()
        stock.bias.normal_()
    fast = OFF(stock, inplace=True, **SCHEMES[scheme](stock, torch.randn(64, K)))
    fast.activation = activations.resolve(activation)
    fast._reset()
    return fastlinear.freeze(fast) if freeze else fast


def traced(layer: nn.Module, x: Tensor) -> Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        warnings.simplefilter("error", torch.jit.TracerWarning)
        return torch.jit.trace(layer, (x[:3],))(x)


def dual(layer: nn.Module, x: Tensor) -> Tensor:
    with forward_ad.dual_level():
        return forward_ad.unpack_dual(layer(forward_ad.make_dual(x, torch.ones_like(x)))).primal


def under(mode: Callable[[], Any]) -> Callable[[nn.Module, Tensor], Tensor]:
    def call(layer: nn.Module, x: Tensor) -> Tensor:
        with mode():
            return layer(x)

    return call


def exported(layer: nn.Module, x: Tensor, strict: bool) -> Tensor:
    y: Tensor = torch.export.export(layer, (x,), strict=strict).module()(x)
    return y


MODES: dict[str, Callable[[nn.Module, Tensor], Tensor]] = {
    "grad mode": lambda m, x: m(x),
    "x wants gradients": lambda m, x: m(x.clone().requires_grad_()),
    "inference mode": under(torch.inference_mode),
    "default device": under(lambda: torch.device("cpu")),
    "autocast, off": under(lambda: torch.autocast("cpu", enabled=False)),
    "vmap": lambda m, x: torch.vmap(m)(x),
    "functional_call": lambda m, x: torch.func.functional_call(m, dict(m.named_parameters()), (x,)),
    "vjp": lambda m, x: torch.func.vjp(m, x)[0],
    "jvp": lambda m, x: torch.func.jvp(m, (x,), (x,))[0],
    "forward-mode AD": dual,
    "checkpoint": lambda m, x: checkpoint(m, x.clone().requires_grad_(), use_reentrant=False),
}
TRACERS: dict[str, Callable[[nn.Module, Tensor], Tensor]] = {
    "profiler": under(torch.profiler.profile),
    "functionalize": lambda m, x: torch.func.functionalize(m)(x),
    "make_fx": lambda m, x: make_fx(m)(torch.ones_like(x))(x),
    "FX": lambda m, x: torch.fx.symbolic_trace(m)(x),
    "jit.trace": traced,
    "export": functools.partial(exported, strict=False),
    "strict export": functools.partial(exported, strict=True),
    "compile": lambda m, x: torch.compile(m, backend="aot_eager", fullgraph=True)(x),
    "compile, for gradients": lambda m, x: torch.compile(m, backend="aot_eager")(x.clone().requires_grad_()),
}


# One factor each, of which a sample has every value.
every_state = list(itertools.product(SCHEMES, (False, True)))
every_kind = [("linear", False), ("conv1d", True)]


def answers_alike(layer: Any, modes: dict[str, Callable[[nn.Module, Tensor], Tensor]]) -> None:
    x = torch.randn(5, K)
    with torch.no_grad():
        expected = layer(x)
    assert layer.plans
    noise = {name: signal_to_noise(expected, mode(layer, x).detach()) for name, mode in modes.items()}
    assert {name: dB for name, dB in noise.items() if not dB > SAME} == {}


@every_activation
@pytest.mark.parametrize(("scheme", "freeze"), every_state)
def test_all_modes_give_the_same_numbers(scheme: str, freeze: bool, activation: str | None) -> None:
    """Whatever mode torch is in: those of the kernels, to the rounding of fp32 sums."""
    answers_alike(layer_of(scheme, activation, freeze), MODES)


@pytest.mark.costly
@every_scheme
@pytest.mark.parametrize("tracer", TRACERS)
@pytest.mark.parametrize(("kind", "freeze"), every_kind)
def test_tracers_give_the_same_numbers(scheme: str, tracer: str, kind: str, freeze: bool) -> None:
    """So do those that trace and watch, torch.export and torch.compile, and both kinds of layer; and the modes, after
    them."""
    answers_alike(layer_of(scheme, "gelu", freeze, kind), {tracer: TRACERS[tracer], **MODES})


def test_tracing_after_a_patch() -> None:
    """Also after torch has patched nn.Module.__call__ for a while, as make_fx and torch.compile do."""
    layer, x = nn.Sequential(layer_of("fp32"), nn.ReLU()), torch.randn(5, K)
    make_fx(layer)(x)
    torch.testing.assert_close(torch.jit.trace(layer, (x,))(x), layer(x))  # it traces twice and compares


@every_scheme
@frozen_or_not
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_gives_the_same_numbers(scheme: str, freeze: bool, dtype: torch.dtype) -> None:
    """Within autocast, all modes agree to the rounding of its dtype, and grad mode to the bit."""
    layer, x = layer_of(scheme, "gelu", freeze), torch.randn(5, K)
    with torch.autocast("cpu", dtype):
        with torch.no_grad():
            expected = layer(x)
        assert expected.dtype == dtype and torch.equal(layer(x), expected)
        for mode in (torch.vmap(layer), lambda x: torch.func.vjp(layer, x)[0]):
            assert signal_to_noise(expected, mode(x).detach()) > -20 * torch.log10(torch.tensor(torch.finfo(dtype).eps))


@every_scheme
def test_grad_mode_runs_the_kernels(scheme: str) -> None:
    """In torch's default mode, of Parameters that require gradients, the very bits of the kernels."""
    layer, x = layer_of(scheme, "silu"), torch.randn(5, K)
    y = layer(x)
    assert layer.plans and not layer._elsewhere and y.requires_grad
    with torch.no_grad():
        assert torch.equal(layer(x), y)


@every_scheme
@every_activation
def test_the_backward_multiplies_once(scheme: str, activation: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """What an activation's derivative is told by is kept by the forward, whose bits are those without gradients: the
    backward of x is one product, by the weight, for every format."""
    layer, x = layer_of(scheme, activation, True), torch.randn(5, K, requires_grad=True)
    wanted = torch.autograd.grad(layer(x).sum(), x)  # cold, which packs the weight for the way back
    products = []
    real = _products.run
    monkeypatch.setattr(_products, "run", lambda *args, **more: products.append(args) or real(*args, **more))
    monkeypatch.setattr(Reference, "sums", None)
    y = layer(x)
    with torch.no_grad():
        assert torch.equal(layer(x), y)
    torch.testing.assert_close(torch.autograd.grad(y.sum(), x), wanted)
    assert len(products) == 1 and not layer._elsewhere


# ---- gradients -------------------------------------------------------------------------------------------------------


def numbers(layer: Any, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """x [M, K] and the weight [N, K] as the layer multiplies them, in fp64, by the specification; and the smoothing."""
    precision = layer._precision
    smooth = torch.ones(K) if precision.smooth is None else precision.smooth
    rows = x if precision.rows is None else dequantize_rows(*quantize_rows(x, precision.rows))
    weight = (layer.weight.t() if layer._transposed else layer.weight).detach()
    if precision.packed is None:
        pass
    elif precision.coding is not None:
        weight = int4.dequantize(grouping.quantize_weight(weight, precision.coding))
    elif precision.packed in ("int8", "w8f"):
        weight = dequantize(quantize_weight(weight, precision.smooth))
    else:
        weight = weight.to({"bf16": torch.bfloat16, "fp16": torch.float16}[precision.packed])
    return rows.double(), weight.double(), smooth.double()


@every_scheme
@pytest.mark.parametrize(
    ("kind", "activation"), [("conv1d", "gelu"), *(("linear", name) for name in (None, *activations.names()))]
)
def test_gradients_are_those_of_the_numbers(scheme: str, kind: str, activation: str | None) -> None:
    """dx through the weight as it is packed, dW through x as it is quantized, db, the activation's derivative: those of
    fp64, for each choice of what wants gradients."""
    layer, x = layer_of(scheme, activation, kind=kind), torch.randn(2, 3, K)
    rows, weight, smooth = numbers(layer, x.flatten(0, 1))
    z = (rows @ weight.t() + layer.bias.detach().double()).requires_grad_()
    upstream = torch.randn(6, N)
    (g,) = torch.autograd.grad(activations.apply(layer.activation, z), z, upstream.double())
    dw = g.t() @ rows / smooth
    wanted = {"x": (g @ weight * smooth).view(x.shape), "weight": dw.t() if kind == "conv1d" else dw, "bias": g.sum(0)}
    for of in [of for size in (1, 2, 3) for of in itertools.combinations(wanted, size)]:
        operands = {"x": x.clone().requires_grad_("x" in of), "weight": layer.weight, "bias": layer.bias}
        layer.weight.requires_grad_("weight" in of), layer.bias.requires_grad_("bias" in of)
        y = layer(operands["x"])
        for _ in range(2):  # the second with a graph that was kept
            found = torch.autograd.grad(y, [operands[name] for name in of], upstream.view_as(y), retain_graph=True)
            for name, gradient in zip(of, found, strict=True):
                torch.testing.assert_close(gradient, wanted[name].float(), rtol=1e-4, atol=1e-4)
    assert not layer._elsewhere


@every_scheme
@pytest.mark.parametrize(("activation", "freeze"), [(None, True), ("gelu", False), ("relu", True)])
def test_gradients_of_every_way_agree(scheme: str, activation: str | None, freeze: bool) -> None:
    """torch.func, double backward, checkpoints, profiles, compiled code and batches of gradients: one derivative."""
    layer, x = layer_of(scheme, activation, freeze), torch.randn(5, K, requires_grad=True)
    weights = torch.randn(5, N)

    def loss(call: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        return (call(x) * weights).sum()

    (wanted,) = torch.autograd.grad(loss(layer, x), x)
    close = functools.partial(torch.testing.assert_close, rtol=1e-4, atol=1e-4)
    for call in (
        lambda x: checkpoint(layer, x, use_reentrant=False),
        torch.compile(layer, backend="aot_eager", fullgraph=True),
        lambda x: layer(x * 1.0),
        lambda x: layer(x.t().contiguous().t()),
        lambda x: torch.cat([layer(x[:2]), layer(x[2:])]),
    ):
        close(torch.autograd.grad(loss(call, x), x)[0], wanted)
    with torch.profiler.profile():
        close(torch.autograd.grad(loss(layer, x), x)[0], wanted)
    plain = x.detach()
    close(torch.func.grad(functools.partial(loss, layer))(plain), wanted)
    close(torch.func.vjp(layer, plain)[1](weights)[0], wanted)
    close(torch.func.jvp(functools.partial(loss, layer), (plain,), (plain,))[1], (wanted * plain).sum())
    close(torch.func.jacrev(layer)(plain[0]), torch.func.jacfwd(layer)(plain[0]))
    batch = torch.stack([weights, -weights])
    (several,) = torch.autograd.grad(layer(x), x, batch, is_grads_batched=True)
    close(several, torch.stack([wanted, -wanted]))
    (once,) = torch.autograd.grad(loss(layer, x), x, create_graph=True)
    close(once, wanted)
    twice = torch.func.grad(lambda x: torch.func.grad(functools.partial(loss, layer))(x).square().sum())(plain)
    if once.requires_grad:
        (found,) = torch.autograd.grad(once.square().sum(), x, allow_unused=True)
        close(torch.zeros_like(twice) if found is None else found, twice)


@every_scheme
def test_double_backward_reaches_the_weight(scheme: str) -> None:
    """A gradient penalty trains the weight as it does with torch's ops on the same numbers."""
    layer, x = layer_of(scheme, "tanh"), torch.randn(5, K, requires_grad=True)

    def penalty(call: Callable[[Tensor], Tensor]) -> Tensor:
        (dx,) = torch.autograd.grad(call(x).sum(), x, create_graph=True)
        found: Tensor = torch.autograd.grad(dx.square().sum(), layer.weight)[0]
        return found

    torch.testing.assert_close(penalty(layer), penalty(layer._torch), rtol=1e-4, atol=1e-4)


def test_fp64_passes_gradcheck() -> None:
    """What the kernels do not take is torch's to the last digit, twice differentiated, too."""
    layer, x = layer_of("fp32", "gelu").double(), torch.randn(3, K, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(layer, x) and torch.autograd.gradgradcheck(layer, x)


def test_a_change_before_the_backward_is_told() -> None:
    """A weight that changed in place between forward and backward is torch's own error, not a wrong gradient."""
    for scheme in SCHEMES:
        layer, x = layer_of(scheme), torch.randn(5, K, requires_grad=True)
        y = layer(x).sum()
        with torch.no_grad():
            layer.weight.mul_(2)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            y.backward()


@every_scheme
@frozen_or_not
def test_a_backbone_under_lora_learns(scheme: str, freeze: bool) -> None:
    """An adapter beside and layers before a frozen backbone in eval mode are trained through it, on the kernels."""
    stock = nn.Sequential(nn.Linear(K, 32), nn.GELU(), nn.Linear(32, N)).eval()
    options = SCHEMES[scheme](stock, torch.randn(64, K))
    backbone = OFF(stock, freeze=freeze, **options).requires_grad_(False)
    before, down, up = nn.Linear(K, K), nn.Linear(K, 4, bias=False), nn.Linear(4, N, bias=False)
    nn.init.zeros_(up.weight)
    optimizer = torch.optim.Adam([*before.parameters(), *down.parameters(), *up.parameters()], lr=1e-2)
    x, target, losses = torch.randn(16, K), torch.randn(16, N), []
    for _ in range(30):
        h = before(x)
        loss = F.mse_loss(backbone(h) + up(down(h)), target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0] and all(p.grad is None for p in backbone.parameters())
    assert before.weight.grad.abs().min() > TINY and not any(m._elsewhere for m in (backbone[0], backbone[2]))


def test_training_is_on_the_parameter_and_frozen_on_what_it_says() -> None:
    """In training mode a layer is F.linear of its weight: the Parameter, or what a frozen one is packed in."""
    for scheme, freeze in itertools.product(SCHEMES, (False, True)):
        layer, x = layer_of(scheme, "relu", freeze).train(), torch.randn(5, K)
        assert torch.equal(layer(x), F.linear(x, layer.weight, layer.bias).relu())


# ---- what is told ----------------------------------------------------------------------------------------------------


def test_calls_elsewhere_are_counted_and_reported(capsys: pytest.CaptureFixture[str], monkeypatch: Any) -> None:
    """By reason, in `report` and, the first of each, under FASTLINEAR_VERBOSE; calls of the kernels are not, and no
    pickle and no state dict knows of it."""
    monkeypatch.setenv("FASTLINEAR_VERBOSE", "1")
    layer, x = layer_of("dynamic"), torch.randn(5, K)
    assert "untuned" in str(fastlinear.report(layer))
    for _ in range(12):
        torch.vmap(layer)(x)
    assert layer._elsewhere == {"vmap": 12} and "12 calls elsewhere: vmap" in str(fastlinear.report(layer))
    assert "untuned" not in str(fastlinear.report(layer)) and capsys.readouterr().err.count("vmap") == 1
    traced(layer, x)
    layer.train()(x)
    layer.eval()(torch.func.functionalize(lambda x: x)(x))
    counts = fastlinear.report(layer)[0].elsewhere
    assert (
        counts["training"] == 1
        and counts["torch.jit.trace"] >= 1
        and set(counts) == {"vmap", "training", "torch.jit.trace"}
    )
    with pytest.raises(RuntimeError):
        layer(x.long())
    assert layer._elsewhere["an input of torch.int64"] == 1
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert other._elsewhere == {}
    assert set(layer.state_dict()) == {"weight", "bias"}
    layer._reset()
    assert layer._elsewhere["vmap"] == 12


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning")
@pytest.mark.parametrize("layout", [torch.strided, torch.jagged])
def test_nested_inputs(layout: torch.layout) -> None:
    """Each part of a nested tensor is quantized by its own rows, as if it came alone."""
    layer, parts = layer_of("asymmetric", "gelu"), [torch.randn(2, K), torch.randn(3, K)]
    for y, part in zip(layer(torch.nested.nested_tensor(parts, layout=layout)).unbind(), parts, strict=True):
        torch.testing.assert_close(y, layer(part), rtol=0, atol=0)
