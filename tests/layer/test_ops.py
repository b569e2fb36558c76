"""The op fastlinear::linear, and a converted model under everything in torch that traces, transforms or watches."""

import functools
import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from models import FEW_PAIRINGS, OFF, PAIRINGS, Pairing
from oracle import check
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils.flop_counter import FlopCounterMode
from transformers.pytorch_utils import Conv1D

import fastlinear._tensors as _tensors
from fastlinear import FastLinear
from fastlinear.layer import linear, lookup
from fastlinear.spec import activations
from fastlinear.spec.formats import DTYPES
from fastlinear.spec.precision import Precision

K, N = 16, 32
OP = torch.ops.fastlinear.linear.default


def layer_of(
    transposed: bool = False,
    bias: bool = True,
    activation: object = ("leaky_relu", 0.2),
    held: torch.dtype = torch.float32,
    packed: torch.dtype | None = None,
) -> nn.Module:
    layer = (Conv1D(N, K) if transposed else nn.Linear(K, N, bias)).to(held)
    linear.adopt(layer, activations.resolve(activation), "off", "fc", Precision(packed and _tensors.FORMATS[packed]))
    return layer.eval().requires_grad_(False)


def arguments(layer: nn.Module, x: Tensor) -> tuple[Any, ...]:
    name, params = layer.activation or ("identity", ())
    return x, layer.weight, layer.bias, name, list(params), layer._transposed, layer.packed_as, "fp32"


def formula(layer: nn.Module, x: Tensor, weight: Tensor | None = None) -> Tensor:
    weight = (layer.weight if weight is None else weight).to(x.dtype)
    bias = None if layer.bias is None else layer.bias.to(x.dtype)
    return activations.apply(layer.activation, F.linear(x, weight.t() if layer._transposed else weight, bias))


def bounded(
    y: Tensor, layer: nn.Module, x: Tensor, packed: torch.dtype | None = None, weight: Tensor | None = None
) -> None:
    """Holds y to the bound of a kernel that runs on the packed weight; with another than the layer's, if given."""
    weight = (layer.weight if weight is None else weight).to(packed or DTYPES[layer.packed_as])
    check(y, x, weight.t() if layer._transposed else weight, layer.bias, layer.activation)


def model(**options: Any) -> tuple[nn.Module, nn.Module]:
    """A stock model, and its converted copy with a fused GELU."""
    stock = nn.Sequential(nn.Linear(K, N), nn.GELU(), nn.LayerNorm(N), nn.Linear(N, 8, bias=False)).eval()
    fast = OFF(stock, **options)
    assert fast[0].activation == ("gelu", ())
    return stock, fast


@pytest.fixture(autouse=True)
def no_compiled_code_from_before() -> None:
    torch._dynamo.reset()


# ---- the op itself ---------------------------------------------------------------------------------------------------


@pytest.mark.costly
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("shape", [(K,), (5, K), (2, 3, K), (0, K)])
@pytest.mark.parametrize("grad", [False, True])
def test_the_op_keeps_the_rules_of_operators(transposed: bool, bias: bool, shape: tuple[int, ...], grad: bool) -> None:
    """Schema, fake and autograd registrations, and AOT dispatch with dynamic shapes pass torch's own opcheck."""
    layer = layer_of(transposed, bias).requires_grad_(grad)
    torch.library.opcheck(OP, arguments(layer, torch.randn(shape, requires_grad=grad)))


@pytest.mark.parametrize("pairing", FEW_PAIRINGS)
@pytest.mark.parametrize("grad", [False, True])
def test_the_rules_for_every_pairing(pairing: Pairing, grad: bool) -> None:
    """The same for every dtype of x, parameter and pack, of which the output has that of x."""
    layer = layer_of(held=pairing.held, packed=pairing.packed).requires_grad_(grad)
    x = torch.randn(5, K, dtype=pairing.x, requires_grad=grad)
    torch.library.opcheck(OP, arguments(layer, x))
    assert OP(*arguments(layer, x)).dtype == pairing.x


@pytest.mark.parametrize("pairing", PAIRINGS)
@pytest.mark.parametrize("transposed", [False, True])
def test_meaning_of_every_pairing(pairing: Pairing, transposed: bool) -> None:
    """For a layer's own parameters the op is its kernel, for others torch's, with the weight rounded alike."""
    layer, x = layer_of(transposed, held=pairing.held, packed=pairing.packed), torch.randn(5, K).to(pairing.x)
    y = OP(*arguments(layer, x))
    bounded(y, layer, x)
    assert [chosen.x for chosen in layer.plans] == [_tensors.FORMATS[pairing.x]]
    foreign = torch.randn_like(layer.weight)
    x, _, *rest = arguments(layer, x)
    bounded(OP(x, foreign, *rest), layer, x, weight=foreign)


def test_the_op_finds_the_right_pack() -> None:
    """Of two fast layers with the same parameters the one that was told to pack as the op says answers; where there is
    none, another one packs once more."""
    exact, rounded = layer_of(), layer_of(packed=torch.bfloat16)
    rounded.weight, rounded.bias = exact.weight, exact.bias
    x = torch.randn(5, K)
    for layer in (rounded, exact):
        y = OP(*arguments(layer, x))
        bounded(y, layer, x)
        assert torch.equal(y, layer(x)) and len(layer.plans) == 1
    *rest, _, _ = arguments(exact, x)
    bounded(OP(*rest, "fp16", "fp32"), exact, x, torch.float16)
    assert len(exact.plans) + len(rounded.plans) == 3


@pytest.mark.parametrize("activation", [None, *activations.names()])
@pytest.mark.parametrize("transposed", [False, True])
def test_meaning(activation: str | None, transposed: bool) -> None:
    """The op is activation(F.linear(...)), for a layer's own parameters and for anybody's."""
    layer, x = layer_of(transposed, activation=activation), torch.randn(2, 3, K).mT.contiguous().mT
    y = OP(*arguments(layer, x))
    assert layer.pack_nbytes > 0 and y.is_contiguous()
    torch.testing.assert_close(y, formula(layer, x))
    foreign = torch.randn_like(layer.weight)
    x, _, *rest = arguments(layer, x)
    torch.testing.assert_close(OP(x, foreign, *rest), formula(layer, x, foreign))


def test_a_layer_is_found_by_all_that_makes_it() -> None:
    """Equal memory is not enough: bias, activation, shape and strides must agree too, and changes are followed."""
    layer, x = layer_of(), torch.randn(5, K)
    other = layer_of(activation="relu")
    other.weight = layer.weight
    _, weight, bias, name, params, transposed, *_ = arguments(layer, x)
    half = weight[: N // 2]
    for w, b, act in (
        (weight, bias, ("relu", ())),
        (weight, other.bias, ("relu", ())),
        (weight, bias + 1, ("leaky_relu", (0.2,))),
        (weight, bias, ("leaky_relu", (0.3,))),
        (half, bias[: N // 2], ("leaky_relu", (0.2,))),
        (weight.view(K, N).t(), bias, ("leaky_relu", (0.2,))),
    ):
        expected = activations.apply(activations.Activation(*act), F.linear(x, w, b))
        torch.testing.assert_close(OP(x, w, b, act[0], list(act[1]), False), expected)
    with torch.no_grad():
        layer.weight.mul_(-2)
        torch.testing.assert_close(OP(x, weight, bias, name, params, transposed), formula(layer, x))
        layer.weight.data = torch.randn(N, K)
        for _ in range(10):  # torch answers until the weight has stood still
            torch.testing.assert_close(OP(*arguments(layer, x)), formula(layer, x))
    assert layer._engine.fresh(layer)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_dtypes_run_too(dtype: torch.dtype) -> None:
    """The result has the dtype of x, to which the others are cast; a wrong width is an error, on fake tensors too."""
    layer = layer_of()
    linear.release(layer)
    w, b, x = layer.weight.to(dtype), layer.bias.to(dtype), torch.randn(5, K, dtype=dtype)
    for weight in (w, w.float()):
        torch.testing.assert_close(OP(x, weight, b, "relu", [], False), F.linear(x, weight.to(dtype), b).relu())
    for device in ("cpu", "meta"):
        assert OP(x.to(device), w.float().to(device), None, "relu", [], False).dtype == dtype
        with pytest.raises(RuntimeError):
            OP(x[:, 1:].to(device), w.to(device), None, "relu", [], False)


def test_forward_ad_and_gradients() -> None:
    """Gradients and tangents are those of torch's ops."""
    layer, x = layer_of(), torch.randn(5, K)
    _, *rest = arguments(layer, x)
    grad = torch.func.grad(lambda x: OP(x, *rest).sum())
    torch.testing.assert_close(grad(x), torch.func.grad(lambda x: formula(layer, x).sum())(x))
    torch.testing.assert_close(
        torch.func.jvp(lambda x: OP(x, *rest), (x,), (x,)), torch.func.jvp(lambda x: formula(layer, x), (x,), (x,))
    )
    torch.autograd.gradcheck(
        lambda *a: OP(*a, "tanh", [], False), [*random_double(3, K), *random_double(2, K)], eps=1e-6
    )


def random_double(*shape: int) -> tuple[Tensor, ...]:
    return (torch.randn(shape, dtype=torch.float64, requires_grad=True), None)[: 1 + (shape[0] == 2)]


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize(
    "in_dims", [(0, None, None), (1, None, None), (0, 0, None), (None, 1, 0), (0, None, 0), (1, 0, 0)]
)
@pytest.mark.parametrize("ndim", [1, 2, 3])
def test_vmap(transposed: bool, in_dims: tuple[int | None, ...], ndim: int) -> None:
    """Batched inputs, weights, biases and mixtures of them give what a loop over the batch gives."""
    batch = 4
    shapes = ((2, 3, K)[-ndim:], (K, N) if transposed else (N, K), (N,))
    operands = [
        torch.randn(shape if d is None else (*shape[:d], batch, *shape[d:]))
        for shape, d in zip(shapes, in_dims, strict=True)
    ]
    call = functools.partial(torch.vmap(lambda x, w, b: OP(x, w, b, "tanh", [], transposed), in_dims), *operands)
    loop = [
        OP(
            *(t if d is None else t.select(d, i) for t, d in zip(operands, in_dims, strict=True)),
            "tanh",
            [],
            transposed,
        )
        for i in range(batch)
    ]
    torch.testing.assert_close(call(), torch.stack(loop))


@pytest.mark.parametrize("in_dims", [(0, None, None), (0, 0, None), (None, 1, 0), (0, None, 0)])
@pytest.mark.parametrize("pairing", PAIRINGS)
def test_vmap_of_every_pairing(pairing: Pairing, in_dims: tuple[int | None, ...]) -> None:
    """The same where dtypes are mixed: a batch has the dtype of x."""
    x, w, b = torch.randn(4, 4, K).to(pairing.x), torch.randn(N, 4, K).to(pairing.held), torch.randn(4, N)
    x, b = (t if d == 0 else t[0] for t, d in ((x, in_dims[0]), (b, in_dims[2])))
    w = w if in_dims[1] == 1 else w[:, 0] if in_dims[1] is None else w.transpose(0, 1)
    y = torch.vmap(lambda x, w, b: OP(x, w, b, "tanh", [], False), in_dims)(x, w, b)
    operands = [t.to(pairing.x) for t in (x, w, b)]
    loop = [
        F.linear(*(t if d is None else t.select(d, i) for t, d in zip(operands, in_dims, strict=True)))
        for i in range(4)
    ]
    eps = max(torch.finfo(pairing.x).eps, 1e-5)
    torch.testing.assert_close(y, torch.stack(loop).tanh(), rtol=4 * eps, atol=16 * eps)


@pytest.mark.costly
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("activation", ["relu", "softplus"])
@pytest.mark.parametrize("compiled", [False, True])
def test_autocast(dtype: torch.dtype, activation: str, compiled: bool) -> None:
    """Under autocast the op is what a stock layer is, everything cast to its dtype; differentiated, the same bits."""
    layer, x = layer_of(activation=activation), torch.randn(5, K)
    call = torch.compile(OP, backend="aot_eager", fullgraph=True) if compiled else OP
    with torch.autocast("cpu", dtype):
        y, expected = call(*arguments(layer, x)), formula(layer, x)
        assert torch.equal(call(*arguments(layer, x.requires_grad_())), y)
        assert call(*arguments(layer, x.double())).dtype == torch.float64
    assert y.dtype == expected.dtype
    bounded(y, layer, x.to(dtype), dtype)
    assert [chosen.x for chosen in layer.plans] == [_tensors.FORMATS[dtype]]


# ---- compilers -------------------------------------------------------------------------------------------------------


class Recorder:
    """A Dynamo backend that runs the graphs as they are and keeps them."""

    def __init__(self) -> None:
        self.graphs: list[torch.fx.GraphModule] = []

    def __call__(self, graph: torch.fx.GraphModule, _: Any) -> Callable[..., Any]:
        self.graphs.append(graph)
        return graph

    def count(self, target: object) -> int:
        return sum(node.target is target for graph in self.graphs for node in graph.graph.nodes)


@pytest.mark.costly
@pytest.mark.parametrize("backend", ["eager", "aot_eager", "inductor"])
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_compile(backend: str, mode: Callable[[], Any]) -> None:
    """Without graph breaks and with a dynamic batch, a model that never ran eagerly runs on its packed weights."""
    stock, fast = model()
    compiled = torch.compile(fast, backend=backend, fullgraph=True, dynamic=True)
    with mode():
        for rows in (5, 7, 64):
            x = torch.randn(rows, K)
            torch.testing.assert_close(compiled(x), stock(x))
    assert fast[0].plans and fast[3].plans


@pytest.mark.parametrize("backend", ["eager", pytest.param("inductor", marks=pytest.mark.exhaustive)])
@pytest.mark.parametrize("pairing", FEW_PAIRINGS)
def test_compile_gives_what_eager_gives(backend: str, pairing: Pairing) -> None:
    """For every dtype of x, parameter and pack, compiled code runs the same kernels: the same bits."""
    layer = layer_of(held=pairing.held, packed=pairing.packed)
    compiled = torch.compile(layer, backend=backend, fullgraph=True, dynamic=True)
    for rows in (5, 64):
        x = torch.randn(rows, K).to(pairing.x)
        y = compiled(x)
        bounded(y, layer, x)
        assert torch.equal(y, layer(x))


@pytest.mark.parametrize("backend", ["eager", pytest.param("inductor", marks=pytest.mark.exhaustive)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_compile_under_autocast(backend: str, dtype: torch.dtype) -> None:
    """The same around autocast and within it, for which the layer packs its weight once more."""
    layer, x = layer_of(), torch.randn(5, K)

    def within(x: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype):
            return layer(x)

    expected = within(x)
    assert torch.equal(torch.compile(within, backend=backend, fullgraph=True)(x), expected)
    with torch.autocast("cpu", dtype):
        assert torch.equal(torch.compile(layer, backend=backend, fullgraph=True)(x), expected)
    bounded(expected, layer, x.to(dtype), dtype)


@pytest.mark.parametrize("transposed", [False, pytest.param(True, marks=pytest.mark.exhaustive)])
def test_what_dynamo_captures(transposed: bool) -> None:
    """Eval mode captures one op a layer, with no recompilation for another batch; all else captures torch's ops."""
    layer, x = layer_of(transposed), torch.randn(5, K)
    record = Recorder()
    compiled = torch.compile(layer, backend=record, fullgraph=True, dynamic=True)
    torch.testing.assert_close(compiled(x), formula(layer, x))
    torch.testing.assert_close(compiled(x[:3]), formula(layer, x[:3]))
    assert len(record.graphs) == record.count(OP) == 1
    layer.requires_grad_(True)
    compiled(x).sum().backward()
    with torch.autocast("cpu"):
        compiled(x).sum().backward()
    assert len(record.graphs) == 3 and record.count(OP) == 3
    with torch.autocast("cpu"), torch.no_grad():
        assert compiled(x).dtype == torch.bfloat16
    assert len(record.graphs) == 4 and record.count(OP) == 4
    layer.train()(x)
    layer.eval().double()
    compiled(x.double())
    assert len(record.graphs) == 5 and record.count(OP) == 4


def test_compiled_code_follows_the_parameters() -> None:
    """After an optimizer step, a new Parameter or functional_call, compiled code uses the values of the moment."""
    layer, x = layer_of(), torch.randn(5, K)
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    compiled(x)
    layer.weight.add_(1)
    torch.testing.assert_close(compiled(x), formula(layer, x))
    layer.weight = nn.Parameter(torch.randn(N, K), requires_grad=False)
    torch.testing.assert_close(compiled(x), formula(layer, x))
    other = torch.randn(N, K)
    call = torch.compile(lambda w, x: torch.func.functional_call(layer, {"weight": w}, (x,)), backend="aot_eager")
    torch.testing.assert_close(call(other, x), formula(layer, x, other))


def test_compiled_transforms() -> None:
    """vmap, grad and jvp inside compiled code."""
    layer, x = layer_of(), torch.randn(5, K)

    def grad(x: Tensor) -> Tensor:
        return torch.func.grad(lambda x: layer(x).sum())(x)

    def tangent(x: Tensor) -> Tensor:
        return torch.func.jvp(layer, (x,), (x,))[1]

    for function in (torch.vmap(layer), grad, tangent):
        torch.testing.assert_close(torch.compile(function, backend="aot_eager")(x), function(x))


@pytest.mark.parametrize("strict", [False, True])
def test_export_is_portable(strict: bool) -> None:
    """An exported program holds torch's own ops and the parameters only, and survives a file."""
    stock, fast = model()
    x = torch.randn(5, K)
    with torch.no_grad():
        fast(x)  # packed: the bytes must not end up in the program
    batch = ({0: torch.export.Dim("batch")},)
    program = torch.export.export(fast, (x,), dynamic_shapes=batch, strict=strict)
    called = {str(node.target) for node in program.graph.nodes if node.op == "call_function"}
    assert "aten.linear.default" in called and not any("fastlinear" in name for name in called)
    assert set(program.state_dict) == set(stock.state_dict()) and not program.constants
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    loaded = torch.export.load(file).module()
    torch.testing.assert_close(loaded(x[:3]), stock(x[:3]))


@pytest.mark.parametrize("pairing", FEW_PAIRINGS)
def test_export_of_every_pairing(pairing: Pairing) -> None:
    """What is exported computes with the parameters as they are packed, in fp32, and answers in the dtype of x."""
    layer, x = layer_of(held=pairing.held, packed=pairing.packed), torch.randn(5, K).to(pairing.x)
    expected = layer(x)
    program = torch.export.export(layer, (x,))
    torch.testing.assert_close(program.module()(x), expected, rtol=torch.finfo(pairing.x).eps, atol=1e-5)
    assert not program.constants


@pytest.mark.filterwarnings("error::torch.jit.TracerWarning")
def test_jit_trace() -> None:
    """A trace computes from its input and from live parameters; nothing is baked in."""
    stock, fast = model()
    x = torch.randn(5, K)
    with torch.no_grad():
        fast(x)
        traced = torch.jit.trace(fast, (x,))
        fast[0].weight.mul_(2)
        torch.testing.assert_close(traced(x[:2] + 1), stock(x[:2] + 1))
    assert "aten::linear" in str(traced.inlined_graph) and "value=<Tensor>" not in str(traced.inlined_graph)


# ---- transforms and modes --------------------------------------------------------------------------------------------

TRANSFORMS: dict[str, Callable[[nn.Module, Tensor], Any]] = {
    "vmap": lambda m, x: torch.vmap(m)(x),
    "vmap over dim 1": lambda m, x: torch.vmap(m, in_dims=1)(x[None]),
    "grad": lambda m, x: torch.func.grad(lambda x: m(x).sum())(x),
    "jvp": lambda m, x: torch.func.jvp(m, (x,), (x,)),
    "vjp": lambda m, x: torch.func.vjp(m, x)[1](m(x))[0],
    "jacrev": lambda m, x: torch.func.jacrev(m)(x[0]),
    "hessian": lambda m, x: torch.func.hessian(lambda x: m(x).sum())(x[0]),
    "functionalize": lambda m, x: torch.func.functionalize(m)(x),
    "make_fx": lambda m, x: make_fx(m)(torch.ones_like(x))(x),
    "functional_call": lambda m, x: torch.func.functional_call(m, {key: -t for key, t in m.state_dict().items()}, (x,)),
    "ensemble": lambda m, x: torch.vmap(
        lambda p: torch.func.functional_call(m, p, (x,)),
    )({key: torch.stack([t, -t]) for key, t in m.state_dict().items()}),
    "checkpoint": lambda m, x: torch.utils.checkpoint.checkpoint(m, x, use_reentrant=False),
}


@pytest.mark.parametrize("name", TRANSFORMS)
@pytest.mark.parametrize("grad", [False, True])
def test_transforms(name: str, grad: bool) -> None:
    """A packed model under torch.func and its kin gives what the stock model gives."""
    stock, fast = model()
    x = torch.randn(5, K)
    with torch.no_grad():
        fast(x)
    with torch.set_grad_enabled(grad):
        torch.testing.assert_close(TRANSFORMS[name](fast, x), TRANSFORMS[name](stock, x))


def test_make_fx_records_torch_ops() -> None:
    """Tracing a packed layer yields aten operator, not a call into nowhere."""
    layer, x = layer_of(), torch.randn(5, K)
    layer(x)
    targets = {str(node.target) for node in make_fx(layer)(x).graph.nodes if node.op == "call_function"}
    assert any(name.startswith("aten.") for name in targets) and not any("fastlinear" in name for name in targets)


def test_fake_tensors() -> None:
    """Shapes propagate through a packed model and through the op without any data."""
    _, fast = model()
    layer = layer_of()
    with torch.no_grad():
        fast(torch.randn(5, K))
        with FakeTensorMode(allow_non_fake_inputs=True):
            x = torch.empty(5, K)
            assert fast(x).shape == (5, 8) and type(fast(x)) is type(x)
            assert OP(*arguments(layer, x)).shape == (5, N)
    assert OP(*(t.to("meta") for t in (torch.empty(5, K), layer.weight)), None, "relu", [], False).shape == (5, N)


def test_flops_are_counted() -> None:
    """FlopCounterMode sees the products of a packed model."""
    counts = []
    for m in model():
        with torch.no_grad():
            m(torch.randn(5, K))
            with FlopCounterMode(display=False) as counter:
                m(torch.randn(5, K))
        counts.append(counter.get_total_flops())
    assert counts[0] == counts[1] == 2 * 5 * (K * N + N * 8)


def test_profiles_show_the_op() -> None:
    """Profiled, a layer still runs its kernel and is called fastlinear::linear; in training, aten::linear."""
    layer, x = layer_of(), torch.randn(5, K)
    with torch.profiler.profile() as profile:
        torch.testing.assert_close(layer(x), formula(layer, x))
    assert layer.plans and "fastlinear::linear" in {event.key for event in profile.key_averages()}
    with torch.profiler.profile() as profile, torch.autocast("cpu"):
        assert layer(x).dtype == torch.bfloat16
    assert "fastlinear::linear" in {event.key for event in profile.key_averages()}
    with torch.profiler.profile() as profile:
        layer(x.requires_grad_()).sum().backward()
    assert "fastlinear::linear" in {event.key for event in profile.key_averages()}
    with torch.profiler.profile() as profile:
        layer.train()(x).sum().backward()
    assert "fastlinear::linear" not in {event.key for event in profile.key_averages()}


def test_layers_without_memory_are_passed_over() -> None:
    """Fast layers whose weights are fake, meta, sparse or no parameters do not hinder the search for another's."""
    with FakeTensorMode():
        odd: list[nn.Module] = [FastLinear(K, N)]
    odd += [FastLinear(K, N).to("meta"), FastLinear(K, N), FastLinear(K, N)]
    odd[2].weight = nn.Parameter(odd[2].weight.detach().to_sparse())
    del odd[3].weight
    x, weight = torch.randn(5, K), torch.randn(N, K)
    torch.testing.assert_close(OP(x, weight, None, "relu", [], False), F.linear(x, weight).relu())


def test_the_registry_keeps_nothing_alive() -> None:
    """Layers that were registered and looked up are freed with their last owner."""
    layer = FastLinear(K, N).eval().requires_grad_(False)
    layer._tune = "off"
    OP(*arguments(layer, torch.randn(5, K)))
    key = id(layer)
    assert lookup._layers[key] is layer and layer in lookup._found.values()
    before = len(lookup._found)
    del layer
    assert key not in lookup._layers and len(lookup._found) == before - 1
