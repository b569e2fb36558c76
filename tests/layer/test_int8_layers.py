"""Layers and models in int8: every scheme computes what int8.py says, in every state, on every way to get
there."""

import copy
import functools
import itertools
import pickle
import sys
import types
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from models import OFF, VIEWS, Model, fast_names, inputs, mlp, same_tensors
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

import fastlinear
import fastlinear._kernels as _kernels
import fastlinear._tensors as _tensors
import fastlinear._weights as _weights
from fastlinear import FastLinear, Int8Dynamic, Int8Static, Int8WeightOnly
from fastlinear.layer import linear
from fastlinear.layer.module import FastModule
from fastlinear.plan import decide, rivals
from fastlinear.plan.candidates import native_candidates
from fastlinear.plan.problem import Problem
from fastlinear.spec import activations, int8
from fastlinear.spec.formats import DTYPES
from fastlinear.spec.precision import wanted
from fastlinear.spec.schemes import Scheme

K, N = 37, 70

# What a scheme is made from: a model and inputs to calibrate it with.
SCHEMES: dict[str, Callable[[nn.Module, Tensor], Scheme]] = {
    "dynamic": lambda model, x: Int8Dynamic(),
    "asymmetric": lambda model, x: Int8Dynamic(asymmetric=True),
    "smoothed": lambda model, x: Int8Dynamic(calibration=fastlinear.calibrate(model, [x], smooth=0.5)),
    "static u8": lambda model, x: Int8Static(fastlinear.calibrate(model, [x])),
    "static s8": lambda model, x: Int8Static(fastlinear.calibrate(model, [x], symmetric=True)),
    "static, smoothed": lambda model, x: Int8Static(fastlinear.calibrate(model, [x], smooth=0.5)),
    "weight-only": lambda model, x: Int8WeightOnly(),
}
STATIC = [name for name in SCHEMES if name.startswith("static")]
FLOATS = list(_tensors.FORMATS)
KINDS: dict[str, Callable[[int, int], nn.Module]] = {"linear": nn.Linear, "conv1d": lambda k, n: Conv1D(n, k)}
every_scheme = pytest.mark.parametrize("scheme", SCHEMES)
every_kind = pytest.mark.parametrize("kind", KINDS)
every_float = pytest.mark.parametrize("dtype", FLOATS)


def layer_of(
    scheme: str,
    activation: object = "relu",
    kind: str = "linear",
    held: torch.dtype = torch.float32,
    bias: bool = True,
    tune: str = "off",
    k: int = K,
    n: int = N,
) -> Any:
    """A fast layer with random parameters, under a scheme whose calibration saw normal inputs."""
    stock = KINDS[kind](k, n).to(held).eval().requires_grad_(False)
    stock.weight.normal_()
    asked = wanted(quantize=SCHEMES[scheme](stock, torch.randn(64, k).to(held)))
    if not bias:
        stock.bias = None
    linear.adopt(stock, activations.resolve(activation), tune, "fc", asked.of("", stock.weight.dtype))
    return stock


def spec(layer: Any, x: Tensor, weight: Tensor | None = None) -> Tensor:
    """What int8.py says that the layer makes of x; with another weight in the place of its own, if one is given."""
    weight = layer.weight if weight is None else weight
    precision = layer._precision
    quantized = int8.quantize_weight(weight.t() if layer._transposed else weight, precision.smooth)
    function = None if layer.activation is None else lambda y: activations.apply(layer.activation, y)
    return int8.linear(x, quantized, precision.rows, layer.bias, function, precision.out)


def agrees(layer: Any, y: Tensor, x: Tensor, weight: Tensor | None = None) -> None:
    """Holds y to the specification: bit for bit where sums are of integers and the activation is exact."""
    want = spec(layer, x, weight)
    assert y.dtype == want.dtype and y.shape == want.shape
    exact = layer._precision.rows is not None and (layer.activation is None or layer.activation.name == "relu")
    tolerance = 0 if exact else max(1e-5, 4 * torch.finfo(y.dtype).eps)
    torch.testing.assert_close(y, want, rtol=tolerance, atol=tolerance * 30, equal_nan=True)


def is_native(layer: Any) -> bool:
    """Whether everything so far ran on kernels that read the layer's own pack."""
    return bool(layer.plans) and all(
        layer._engine.packed.layout in row["reads"]
        for row in _kernels.kernels()
        for chosen in layer.plans
        if row["name"] == chosen.name
    )


# ---- one layer -------------------------------------------------------------------------------------------------------


@every_scheme
@every_kind
@every_float
def test_the_layer_is_the_specification(scheme: str, kind: str, dtype: torch.dtype) -> None:
    """fp32, bf16 and fp16 inputs of a layer of either dtype, with and without bias, for small and large M."""
    for held, bias in ((torch.float32, True), (torch.bfloat16, True), (torch.float16, False)):
        layer = layer_of(scheme, kind=kind, held=held, bias=bias)
        for m in (0, 1, 3, 16, 67):
            x = torch.randn(m, K).to(dtype)
            agrees(layer, layer(x), x)
        assert is_native(layer) and layer.pack_nbytes > 0 and layer.weight.dtype == held


@every_scheme
@pytest.mark.parametrize("activation", [None, *activations.names()])
def test_every_activation(scheme: str, activation: str | None) -> None:
    """The activation follows in fp32 and is rounded once."""
    layer = layer_of(scheme, activation)
    for dtype in FLOATS:
        x = torch.randn(2, 3, K).to(dtype)
        agrees(layer, layer(x), x)


@pytest.mark.parametrize("view", VIEWS)
@every_scheme
def test_inputs_of_every_form(scheme: str, view: str) -> None:
    """Any shape and stride."""
    layer, x = layer_of(scheme), VIEWS[view](torch.randn(6, K))
    agrees(layer, layer(x), x.contiguous())


@every_scheme
def test_odd_rows(scheme: str) -> None:
    """Rows of zeros, of one value, huge and tiny ones, with infinities and NaN: what the specification says."""
    layer, x = layer_of(scheme, None), torch.randn(8, K)
    x[0], x[1], x[2] = 0, 3.5, 1e-40
    x[3] *= 1e30
    x[4, 5], x[5, 7], x[6, 0] = torch.inf, -torch.inf, torch.nan
    agrees(layer, layer(x), x)


@pytest.mark.parametrize("scheme", STATIC)
@pytest.mark.parametrize("dtype", int8.BYTES)
def test_static_layers_take_integers(scheme: str, dtype: torch.dtype) -> None:
    """uint8 and int8 inputs are what the scheme would have made of x; the output is fp32."""
    layer = layer_of(scheme)
    x = torch.randint(0, 256, (5, K)).sub(128 if dtype == torch.int8 else 0).to(dtype)
    y = layer(x)
    agrees(layer, y, x)
    assert y.dtype == torch.float32 and [chosen.x for chosen in layer.plans] == [str(dtype).removeprefix("torch.")]
    u = int8.quantize_rows(torch.randn(5, K), layer._precision.rows)[0]
    torch.testing.assert_close(layer._torch(u), layer(u), rtol=0.1, atol=0.3)


@pytest.mark.parametrize("scheme", ["dynamic", "weight-only"])
def test_others_do_not_take_integers(scheme: str) -> None:
    """Without a scale for them integers are torch's own error, as in nn.Linear."""
    x = torch.ones(5, K, dtype=torch.uint8)
    with pytest.raises(RuntimeError) as expected:
        nn.Linear(K, N)(x)
    with pytest.raises(RuntimeError) as error:
        layer_of(scheme, None)(x)
    assert str(error.value) == str(expected.value)


@every_scheme
def test_memory(scheme: str) -> None:
    """A packed weight takes 1.02 bytes a parameter at most, beside 4 bytes for each scale, sum and zero point."""
    layer = layer_of(scheme, k=512, n=1024)
    layer(torch.randn(3, 512))
    assert layer.pack_nbytes <= 1.02 * 512 * 1024 + 3 * 4 * 1024


@every_scheme
def test_threads_change_no_bit(scheme: str) -> None:
    """Two threads of torch's pool compute what one does."""
    layer, x = layer_of(scheme, k=512, n=300), torch.randn(64, 512)
    expected = layer(x)
    torch.set_num_threads(2)
    assert torch.equal(layer(x), expected)


# ---- what torch computes instead -------------------------------------------------------------------------------------


@every_scheme
def test_training_is_on_the_parameter(scheme: str) -> None:
    """In training mode the layer is nn.Linear with its own weight; what eval mode does is in environment/test_modes."""
    layer = layer_of(scheme, "tanh").requires_grad_().train()
    results = []
    for call in (layer, lambda x: F.linear(x, layer.weight, layer.bias).tanh()):
        leaf = torch.ones(5, K).requires_grad_()
        layer.zero_grad()
        y = call(leaf)
        y.sum().backward()
        results.append((y, leaf.grad, layer.weight.grad, layer.bias.grad))
    torch.testing.assert_close(*results, rtol=0, atol=0)
    assert layer.pack_nbytes == 0


@every_scheme
def test_disable(scheme: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """FASTLINEAR_DISABLE=1 leaves all to torch and the parameter."""
    monkeypatch.setenv("FASTLINEAR_DISABLE", "1")
    layer, x = layer_of(scheme), torch.randn(5, K)
    assert torch.equal(layer(x), F.linear(x, layer.weight, layer.bias).relu()) and layer.pack_nbytes == 0


CHANGES: dict[str, Callable[[Any], object]] = {
    "in place": lambda m: m.weight.mul_(-2),
    ".data = t": lambda m: setattr(m.weight, "data", torch.randn_like(m.weight)),
    "written through .data, and refresh": lambda m: (m.weight.data.mul_(3), fastlinear.refresh(m)),
    "a new Parameter": lambda m: setattr(m, "weight", nn.Parameter(torch.randn(N, K), requires_grad=False)),
    "half": lambda m: m.half(),
    "load_state_dict": lambda m: m.load_state_dict({"weight": torch.ones(N, K), "bias": torch.ones(N)}),
    "bias replaced": lambda m: setattr(m, "bias", nn.Parameter(torch.randn(N), requires_grad=False)),
}


@every_scheme
@pytest.mark.parametrize("change", CHANGES)
def test_changes_of_state(scheme: str, change: str) -> None:
    """The very next call has the new values, quantized anew."""
    layer, x = layer_of(scheme), torch.randn(5, K)
    layer(x)
    with torch.no_grad():
        CHANGES[change](layer)
        for _ in range(2):
            agrees(layer, layer(x), x)


@every_scheme
@pytest.mark.parametrize(
    "way", [copy.copy, copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["copy", "deepcopy", "pickle"]
)
@pytest.mark.parametrize("freeze", [False, True])
def test_copies(scheme: str, way: Callable[[Any], Any], freeze: bool) -> None:
    """Copies keep the scheme, and a frozen one its integers."""
    layer, x = layer_of(scheme), torch.randn(5, K)
    expected = layer(x)
    other = way(fastlinear.freeze(layer) if freeze else layer)
    assert torch.equal(other(x), expected) and other.precision.is_as(layer.precision)
    assert other.packed_as == layer.packed_as and torch.equal(other.weight, layer.weight)


def test_a_weight_that_cannot_be_quantized() -> None:
    """An infinity that comes into a weight is told at the call that would have to quantize it."""
    layer = layer_of("dynamic")
    layer.weight[3, 5] = torch.inf
    with pytest.raises(ValueError, match=r"a weight with inf \(at \[3, 5\]\) cannot be quantized to int8"):
        layer(torch.randn(5, K))


# ---- modes of torch --------------------------------------------------------------------------------------------------


@every_scheme
@pytest.mark.parametrize("cast", [torch.bfloat16, torch.float16])
def test_autocast(scheme: str, cast: torch.dtype) -> None:
    """Under autocast x is cast, the output is of its dtype, and the integers stay what they are."""
    layer, x = layer_of(scheme), torch.randn(5, K)
    with torch.autocast("cpu", cast):
        y = layer(x)
        agrees(layer, y, x.to(cast))
        if scheme in STATIC:
            u = torch.randint(0, 256, (5, K), dtype=torch.uint8)
            agrees(layer, layer(u), u)
    assert not layer._casting


@every_scheme
@pytest.mark.parametrize(
    ("kind", "freeze", "cast"), list(itertools.product(KINDS, (False, True), (None, torch.bfloat16)))
)
def test_the_op(scheme: str, kind: str, freeze: bool, cast: torch.dtype | None) -> None:
    """A profile shows the op, a compiled layer is one: the same bits as in an eager call, frozen or not."""
    layer, x = layer_of(scheme, kind=kind), torch.randn(5, K)
    if freeze:
        fastlinear.freeze(layer)
    torch._dynamo.reset()
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    xs = [x, torch.randint(0, 256, (5, K), dtype=torch.uint8)] if scheme in STATIC else [x]
    for each in xs:
        with torch.no_grad(), torch.autocast("cpu", cast or torch.bfloat16, enabled=cast is not None):
            expected = layer(each)
            with torch.autograd.profiler.profile() as profile:
                assert torch.equal(layer(each), expected)
            assert "fastlinear::linear" in {event.name for event in profile.function_events}
            assert torch.equal(compiled(each), expected)


@pytest.mark.costly
@pytest.mark.parametrize("freeze", [False, True])
@pytest.mark.parametrize(
    "scheme",
    [
        pytest.param(name, marks=[] if name in ("smoothed", "static u8", "weight-only") else [pytest.mark.exhaustive])
        for name in SCHEMES
    ],
)
def test_the_op_keeps_the_rules_of_operators(scheme: str, freeze: bool) -> None:
    """Schema, fake tensors, dispatch and gradients pass torch's own opcheck; with a weight that is no layer's, torch
    computes the layer's own numbers and gradients, within the rounding of fp32 sums."""
    from fastlinear.layer.form import arguments

    layer, x = layer_of(scheme), torch.randn(5, K)
    weight, form = layer.weight, ("", 0, 0)
    if freeze:
        fastlinear.freeze(layer)
        weight, form = layer._frozen.panels, layer._frozen.form
    rest = arguments(layer.activation, False, layer.packed_as, layer._precision, form)
    op = torch.ops.fastlinear.linear.default
    torch.library.opcheck(op, (x, weight, layer.bias, *rest))
    assert torch.equal(op(x, weight, layer.bias, *rest), layer(x))
    foreign = weight.clone()  # nobody's: torch computes it
    agree = functools.partial(torch.testing.assert_close, rtol=1e-5, atol=1e-4)
    agree(op(x, foreign, layer.bias, *rest), layer(x))
    leaf, g = x.clone().requires_grad_(), torch.randn(5, N)
    torch.library.opcheck(op, (leaf, weight, layer.bias, *rest))
    (want,) = torch.autograd.grad(layer(leaf), leaf, g)
    for each in (weight, foreign):
        agree(torch.autograd.grad(op(leaf, each, layer.bias, *rest), leaf, g)[0], want)
    if scheme in STATIC:
        u = int8.quantize_rows(x, layer._precision.rows)[0]
        torch.library.opcheck(op, (u, weight, layer.bias, *rest))
        to_bytes = rest._replace(out=torch.uint8, out_scale=0.1, out_zero=3)
        torch.library.opcheck(op, (u, weight, layer.bias, *to_bytes))
        assert op(x, weight, layer.bias, *to_bytes).dtype == torch.uint8


@every_scheme
@pytest.mark.parametrize("freeze", [False, True])
def test_vmap_export_and_functional_call(scheme: str, freeze: bool) -> None:
    """What transforms torch's calls sees nn.Linear's numbers, within the error of the scheme."""
    layer, x = layer_of(scheme), torch.randn(4, 5, K)
    close = {"rtol": 0.05, "atol": 0.5}
    want = F.linear(x, layer.weight, layer.bias).relu()
    if freeze:
        fastlinear.freeze(layer)
    torch.testing.assert_close(torch.vmap(layer)(x), want, **close)
    torch._dynamo.reset()
    torch.testing.assert_close(torch.export.export(layer, (x,)).module()(x), want, **close)
    lent = {"weight": torch.randn(N, K), "bias": torch.randn(N)}
    y = torch.func.functional_call(layer, lent, (x,))
    torch.testing.assert_close(y, F.linear(x, lent["weight"], lent["bias"]).relu(), **close)
    torch.testing.assert_close(layer(x), want, **close)


# ---- frozen ----------------------------------------------------------------------------------------------------------


@every_scheme
@every_kind
def test_freeze_keeps_the_integers(scheme: str, kind: str) -> None:
    """The same bits out, a weight that is the dequantized one, and a Parameter of it after unfreeze."""
    layer, x = layer_of(scheme, kind=kind), torch.randn(5, K)
    smooth, weight = layer._precision.smooth, layer.weight.t() if kind == "conv1d" else layer.weight
    wanted = int8.dequantize(int8.quantize_weight(weight, smooth))
    wanted = wanted if smooth is None else wanted * smooth
    wanted = wanted.t() if kind == "conv1d" else wanted
    expected = layer(x)
    fastlinear.freeze(layer)
    assert torch.equal(layer(x), expected)
    assert torch.equal(layer.weight, wanted) and torch.equal(layer.state_dict()["weight"], wanted)
    assert "weight" not in dict(layer.named_parameters())
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(x).dtype == torch.bfloat16
    layer.requires_grad_()
    assert torch.equal(layer(x.requires_grad_()), expected)
    y = layer.train()(x)  # in training, through the dequantized weight
    torch.testing.assert_close(y, F.linear(x, wanted.t() if kind == "conv1d" else wanted, layer.bias).relu())
    fastlinear.unfreeze(layer)
    assert torch.equal(layer.weight, wanted) and isinstance(layer.weight, nn.Parameter)


def test_a_calibration_is_let_go() -> None:
    """Inputs that a calibration kept serve the report; a frozen layer needs them no more."""
    layer = layer_of("static u8")
    assert layer._precision.sample is not None
    (before,) = fastlinear.report(layer)
    fastlinear.freeze(layer)
    (after,) = fastlinear.report(layer)
    assert layer._precision.sample is None and before.quality == (None, None)
    assert None not in after.quality and after.quality == fastlinear.report(copy.copy(layer))[0].quality


# ---- weights of others -----------------------------------------------------------------------------------------------


def theirs(zeros: bool) -> int8.Quantized:
    values = torch.randint(-128, 128, (N, K)).to(torch.int8)
    zero = torch.randint(-128, 128, (N,), dtype=torch.int32) if zeros else None
    return int8.Quantized(values, torch.rand(N) / 64, zero)


@pytest.mark.parametrize("zeros", [False, True])
@pytest.mark.parametrize("scheme", [Int8Dynamic(), Int8Dynamic(asymmetric=True), Int8WeightOnly()], ids=repr)
@every_float
def test_weights_of_others(zeros: bool, scheme: Scheme, dtype: torch.dtype) -> None:
    """Integers and scales that somebody else produced are computed with as they are, zero points included."""
    weight, bias, x = theirs(zeros), torch.randn(N), torch.randn(5, K).to(dtype)
    arguments = (weight.values, weight.scale, weight.zero, bias, "relu")
    if zeros and scheme.rows("") is None:
        with pytest.raises(ValueError, match="Int8WeightOnly has no zero points, which its weight has"):
            FastLinear.from_quantized(*arguments, quantize=scheme)
        return
    layer = FastLinear.from_quantized(*arguments, quantize=scheme).eval()
    layer._tune = "off"
    want = int8.linear(x, weight, scheme.rows(""), bias, torch.relu)
    tolerance = 1e-4 if scheme.rows("") is None else 0
    with torch.no_grad():
        torch.testing.assert_close(layer(x), want, rtol=max(tolerance, 0.02 * (tolerance > 0)), atol=tolerance)
    assert isinstance(layer, FastLinear) and torch.equal(layer.weight, int8.dequantize(weight))


class FromTorchao(Tensor):
    """The parts of torchao's integer tensors that are looked at."""

    @staticmethod
    def __new__(cls, weight: int8.Quantized) -> "FromTorchao":
        made = Tensor._make_wrapper_subclass(cls, weight.values.shape, dtype=torch.float32)
        made.whole, made.qdata, made.scale, made.zero_point = weight, weight.values, weight.scale, weight.zero
        made.block_size = (1, weight.values.shape[1])
        return made

    def __repr__(self, **_: object) -> str:
        return "FromTorchao()"

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert func is torch.ops.aten.detach.default, f"{func} would need the numbers"
        return cls(args[0].whole)


def test_models_that_torchao_quantized() -> None:
    """convert takes their integers over, beside layers that it quantizes itself; what fails leaves theirs in place."""
    weight, x = theirs(True), torch.randn(5, K)
    model = nn.Sequential(nn.Linear(K, N), nn.ReLU(), nn.Linear(N, 8)).eval()
    model[0].weight = nn.Parameter(FromTorchao(weight), requires_grad=False)
    with pytest.warns(UserWarning, match="FromTorchao"):
        assert fast_names(OFF(nn.Sequential(model[0]), inplace=True)) == set()
    with pytest.raises(RuntimeError):
        fastlinear.convert(model, quantize=Int8Dynamic(), inplace=True, tune="now", example_inputs=torch.ones(1, 99))
    assert not fast_names(model) and type(model[0].weight.data) is FromTorchao
    fast = OFF(model, quantize=Int8Dynamic(), inplace=True)
    assert fast_names(fast) == {"0", "2"}
    with torch.no_grad():
        want = int8.linear(x, weight, int8.Rows(), fast[0].bias, torch.relu)
        assert torch.equal(fast[:2](x), want)
        agrees(fast[2], fast(x), want)
    assert torch.equal(fast[0].weight, int8.dequantize(weight))


def test_what_is_quantized_already_cannot_be_smoothed() -> None:
    """Smoothing divides the weight's columns, which somebody else's integers were not: refused, never wrong."""
    stock, weight = nn.Sequential(nn.Linear(K, N)).eval(), theirs(False)
    smoothed = SCHEMES["smoothed"](stock, torch.randn(64, K))
    stock[0].weight = nn.Parameter(FromTorchao(weight), requires_grad=False)
    with pytest.warns(UserWarning, match="nothing to convert .*quantized already, and so cannot be smoothed"):
        OFF(stock, quantize=smoothed, inplace=True)
    alone = SCHEMES["smoothed"](nn.Linear(K, N), torch.randn(64, K))
    with pytest.raises(ValueError, match="quantized already, and so cannot be smoothed"):
        FastLinear.from_quantized(weight.values, weight.scale, quantize=alone)


# ---- models ----------------------------------------------------------------------------------------------------------


@every_scheme
@pytest.mark.parametrize("inplace", [False, True])
def test_convert(scheme: str, inplace: bool) -> None:
    """Parameters and state dict stay as they are, every layer is quantized, and the model says nearly the same."""
    model, x = Model(3).eval(), inputs()
    state = {key: value.clone() for key, value in model.state_dict().items()}
    parameters = dict(model.named_parameters())
    made = SCHEMES[scheme](model, torch.randn(50, 8))
    with torch.no_grad():
        want = model(x)
        fast = OFF(model, quantize=made, inplace=inplace)
        y = fast(x)
    assert (y - want).abs().max() <= 0.1 * want.abs().max()
    assert same_tensors(fast.state_dict(), state)
    assert all(parameter is parameters[name] for name, parameter in fast.named_parameters())
    layers = [layer for layer in fast.modules() if linear.is_fast(layer)]
    assert len(layers) == 7 and all(layer._engine.packed.format == made.packed for layer in layers)
    for layer in layers:
        x = torch.randn(5, layer.in_features)
        with torch.no_grad():
            agrees(layer, layer(x), x)
    assert str(fastlinear.unconvert(fast)) == str(Model(3).eval())


@every_scheme
def test_converting_once_more(scheme: str) -> None:
    """A fast model takes a scheme, and leaves it again for a dtype; the same scheme again changes nothing."""
    stock = mlp(8, 16, 8).eval()
    made = SCHEMES[scheme](stock, torch.randn(20, 8))
    fast = OFF(stock, quantize=made)
    engines = [fast[i]._engine for i in (0, 2)]
    same = OFF(fast, quantize=made, inplace=True)
    assert same is fast and [fast[i]._engine for i in (0, 2)] == engines
    other = OFF(fast, quantize=Int8WeightOnly())
    assert [other[i].packed_as for i in (0, 2)] == [Int8WeightOnly.packed] * 2
    narrow = OFF(fast, dtype=torch.bfloat16)
    assert narrow[0].packed_as == "bf16" and narrow[0]._precision.rows is None
    assert OFF(fast)[0].packed_as == made.packed and OFF(OFF(stock), quantize=made)[0].packed_as == made.packed
    assert vars(fastlinear.unconvert(fast)[0]).keys() == vars(stock[0]).keys()


class Language(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.body = nn.Embedding(8, 8), mlp(8, 8)
        self.out, self.lm_head = nn.Linear(8, 8, bias=False), nn.Linear(8, 8, bias=False)
        self.out.weight = self.embed.weight


def reasons(model: nn.Module) -> dict[str, str | None]:
    return {row.name: row.reason for row in fastlinear.report(model)}


@pytest.mark.parametrize("scheme", [Int8Dynamic(), Int8WeightOnly()], ids=repr)
def test_what_is_lossy_has_to_be_asked_for(scheme: Scheme) -> None:
    """Tied weights and lm_head are left alone unless they are included, as with dtype=."""
    fast = OFF(Language().eval(), quantize=scheme)
    assert fast_names(fast) == {"body.0"}
    said = reasons(fast)
    assert "embed.weight and out.weight" in str(said["out"]) and f"as {scheme.packed} is lossy" in str(said["lm_head"])
    assert fast_names(OFF(Language().eval(), quantize=scheme, include="*")) == {"body.0", "out", "lm_head"}


def test_what_cannot_be_quantized_is_left_alone() -> None:
    """Layers that the calibration did not see, too many columns, infinities: a reason each, beside converted ones."""
    most = _weights.dot_limit()
    model = nn.ModuleDict({"far": nn.Linear(4, 4), "near": nn.Linear(4, 4), "long": nn.Linear(most + 1, 1)}).eval()
    calibration = fastlinear.calibrate(nn.ModuleDict({"near": model["near"]})["near"], [torch.randn(5, 4)])
    calibration = type(calibration)({"near": calibration.layers[""]}, {"far": "no batch reached it"})
    fast = OFF(model, quantize=Int8Static(calibration))
    assert fast_names(fast) == {"near"}
    assert reasons(fast)["far"] == "no batch reached it" and "of this name" in str(reasons(fast)["long"])
    fast = OFF(model, quantize=Int8Dynamic())
    assert fast_names(fast) == {"near", "far"} and f"more than the {most}" in str(reasons(fast)["long"])
    assert fast_names(OFF(model, quantize=Int8WeightOnly())) == {"near", "far", "long"}
    with torch.no_grad():
        model["far"].weight[1, 2] = torch.nan
    fast = OFF(model, quantize=Int8Dynamic())
    assert fast_names(fast) == {"near"} and "infinities or NaN" in str(reasons(fast)["far"])
    with pytest.raises(ValueError, match="cannot become a FastLinear: its weight has infinities"):
        FastLinear.from_linear(model["far"], quantize=Int8Dynamic())


def test_bad_arguments() -> None:
    """One clear error each, before anything has changed."""
    model = mlp(8, 8)
    for arguments, error, message in (
        ({"quantize": "int8"}, TypeError, "quantize must be None or one of fastlinear's Int8Dynamic, .* but is 'int8'"),
        ({"quantize": Int8Dynamic}, TypeError, "quantize must be a scheme, such as .* but is the class Int8Dynamic"),
        (
            {"quantize": Int8Dynamic(), "dtype": torch.half},
            ValueError,
            "by dtype=torch.float16 or by .* not by both",
        ),
    ):
        with pytest.raises(error, match=message):
            fastlinear.convert(model, inplace=True, **arguments)
        with pytest.raises(error, match=message):
            FastLinear.from_linear(model[0], **arguments)
    assert not fast_names(model)
    for scheme in ("smoothed", "static u8"):
        asked = SCHEMES[scheme](model[0], torch.randn(5, 8))
        with pytest.raises(ValueError, match="it was calibrated with 8 input features, but has 9"):
            FastLinear.from_linear(nn.Linear(9, 8), quantize=asked)


# ---- static chains ---------------------------------------------------------------------------------------------------


def chained(model: nn.Module, x: Tensor, **options: Any) -> Any:
    calibration = fastlinear.calibrate(model, [x], **options)
    return OFF(model, quantize=Int8Static(calibration, chain=True), include="*")


def middles(model: nn.Module, x: Tensor) -> list[torch.dtype]:
    """The dtypes of what the fast layers return; hooks would see no integers."""
    return [y.dtype for y in returned(model, x)]


def returned(model: nn.Module, x: Tensor) -> list[Tensor]:
    """What the fast layers of sequences return, as the loop over them sees it; hooks would change what they see."""
    loop = nn.Sequential.forward.__code__
    seen: list[Tensor] = []

    def note(frame: types.FrameType, event: str, value: Any) -> Any:
        if frame.f_code is not loop:
            return None
        state = frame.f_locals
        new = state["input"] is not before.get(id(frame))
        if new and event in ("line", "return") and isinstance(state.get("module"), FastModule):
            seen.append(state["input"])
        before[id(frame)] = state["input"]
        return note

    before: dict[int, Tensor] = {}
    sys.settrace(note)
    try:
        with torch.no_grad():
            model(x)
    finally:
        sys.settrace(None)
    return seen


@pytest.mark.parametrize("symmetric", [False, True])
@every_float
def test_a_chain_is_never_floating_point(symmetric: bool, dtype: torch.dtype) -> None:
    """In a two-layer MLP the first layer hands bytes to the second, which are those of the specification."""
    model, x = nn.Sequential(nn.Linear(K, N), nn.ReLU(), nn.Linear(N, 8)).eval(), torch.randn(64, K)
    fast = chained(model, x, symmetric=symmetric)
    x = x[:5].to(dtype)
    assert middles(fast, x) == [torch.uint8, torch.float32]
    with torch.no_grad():
        middle = returned(fast, x)[0]
        agrees(fast[0], middle, x)
        assert middle.dtype == torch.uint8 and middle.float().std() > 1
        agrees(fast[2], fast(x), middle)
        torch.testing.assert_close(fast(x), model(x.float()), rtol=0.05, atol=0.05)
        assert is_native(fast[0]) and is_native(fast[2])


def test_what_may_stand_between() -> None:
    """Activations that are absorbed, nn.Identity, Dropout in eval mode, nested sequences; nothing that computes."""
    x = torch.randn(50, 8)

    def links(*between: nn.Module, **options: Any) -> int:
        fast = chained(nn.Sequential(nn.Linear(8, 8), *between, nn.Linear(8, 8)).eval(), x, **options)
        return sum(dtype == torch.uint8 for dtype in middles(fast, x))

    assert links() == links(nn.GELU()) == links(nn.ReLU(), nn.Identity(), nn.Dropout()) == 1
    assert links(nn.Sequential(nn.ReLU(), nn.Sequential(nn.Linear(8, 8), nn.Identity()))) == 2
    assert links(nn.ReLU(), nn.LayerNorm(8)) == links(nn.Softmax(-1)) == links(nn.ReLU(), nn.Tanh()) == 0
    assert links(nn.ReLU(), smooth=0.5) == 0
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8)).eval()
    calibration = fastlinear.calibrate(model, [x])
    assert middles(OFF(model, quantize=Int8Static(calibration)), x) == [torch.float32] * 2
    twice = nn.Sequential(model[0], model[0], model[2])
    assert middles(chained(twice, x), x) == [torch.float32] * 3
    hooked = copy.deepcopy(model)
    hooked[0].register_forward_hook(lambda m, x, y: None)
    assert middles(chained(hooked, x), x) == [torch.float32] * 2


def test_surgery_on_a_chain() -> None:
    """Integers go to the layer that was found to take them, and to nobody else: to no hook, nor to what comes later."""
    model, x = mlp(8, 16, 4).eval(), torch.randn(50, 8)
    want = [model[0](x), model[:2](x), model(x)]
    for fast in (chained(model, x), copy.deepcopy(chained(model, x)), pickle.loads(pickle.dumps(chained(model, x)))):
        assert middles(fast, x) == [torch.uint8, torch.float32]
        for got, expected in zip((fast[0](x), fast[:2](x), fast(x)), want, strict=True):
            torch.testing.assert_close(got, expected, rtol=0.05, atol=0.05)
        seen: list[Tensor] = []
        hook = fast[0].register_forward_hook(lambda m, x, y, seen=seen: seen.append(y))
        torch.testing.assert_close(fast(x), want[2], rtol=0.05, atol=0.05)
        torch.testing.assert_close(seen[0], want[0], rtol=0.05, atol=0.05)
        hook.remove()
        fast[2] = nn.Linear(16, 4).eval()
        torch.testing.assert_close(fast(x), fast[2:](want[1]), rtol=0.05, atol=0.05)


def test_chains_train_export_and_end() -> None:
    """In training and after unconvert all is floating point; where gradients are wanted, and exported, so is what is
    handed on, with the numbers of the integers; compiled it is as in eager."""
    model, x = mlp(8, 16, 4).eval(), torch.randn(50, 8)
    fast = chained(model, x)
    with torch.no_grad():
        expected = fast(x)
        torch._dynamo.reset()
        assert torch.equal(torch.compile(fast, backend="aot_eager", fullgraph=True)(x), expected)
        exported = torch.export.export(fast, (x,)).module()(x)
        torch.testing.assert_close(exported, expected)
    compiled = torch.compile(fast, backend="aot_eager", fullgraph=True)
    for differentiated in (fast, compiled, fast.train()):
        y = differentiated(x)
        torch.testing.assert_close(y, model(x) if fast.training else expected)
        fast.zero_grad()
        y.sum().backward()
        assert all(p.grad is not None and p.grad.any() for p in fast.parameters())
    with torch.no_grad():
        assert torch.equal(fastlinear.unconvert(fast).eval()(x), model(x))


# ---- tuning ----------------------------------------------------------------------------------------------------------


@every_scheme
def test_tuning_measures_kernels_of_the_pack(scheme: str) -> None:
    """Candidates are the kernels that read the layout, integers of the best ISA for single rows and of the best for
    whole tiles; torch computes other numbers, and is what the speed-up is over."""
    layer, x = layer_of(scheme, tune="lazy", n=71), torch.randn(40, K)
    decide.cache().clear()
    agrees(layer, layer(x), x)
    (chosen,) = layer.plans
    names = {name.split()[0] for name, _ in chosen.table}
    rows = [row for row in _kernels.kernels() if row["name"] in names]
    layout = layer._engine.packed.layout
    assert chosen.source == "tuned" and chosen.speedup is not None and not names & {*rivals.NAMES}
    assert rows and len(rows) == len(names) and all(layout in row["reads"] for row in rows)
    if layer._precision.rows is not None:
        assert len({(row["isa"], row["row_step"] > 1) for row in rows}) == len({row["row_step"] > 1 for row in rows})
    layer._reset()
    layer(x)
    assert layer.plans[0].source in ("equal", "tuned")


def test_no_two_schemes_share_a_plan() -> None:
    """What quantizes rows otherwise, smooths or requantizes is another problem, as is what may fall back."""
    layers = [layer_of(scheme) for scheme in SCHEMES]
    chain = chained(mlp(K, N, 8).eval(), torch.randn(5, K))
    falling = FastLinear.from_linear(nn.Linear(K, N), "relu", quantize=Int8Dynamic(fallback=True)).eval()
    with torch.no_grad():
        for layer in (*layers, falling):
            layer._tune = "off"
            layer(torch.randn(5, K))
        chain(torch.randn(5, K))  # whole: called alone, its first layer hands no integers on
    planned = (*layers, chain[0], falling)
    keys = [each.problem(each._engine, each._engine.packed, 5, "fp32", 1).key() for each in planned]
    assert len(set(keys)) == len(keys) - 1  # static u8 and s8 are one kind of work


@pytest.mark.parametrize("scheme", SCHEMES)
def test_override(scheme: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """FASTLINEAR_KERNEL names the kernel, and with it the layout, of int8 as of all else; torch's ways do not apply."""
    packed = layer_of(scheme).packed_as
    for row in _kernels.kernels():
        if row["runnable"] and row["format"] == packed:
            monkeypatch.setenv("FASTLINEAR_KERNEL", row["name"])
            layer, x = layer_of(scheme), torch.randn(5, K)
            agrees(layer, layer(x), x)
            assert [(c.name, c.source) for c in layer.plans] == [(row["name"], "override")]
            assert layer._engine.packed.layout == row["layout"]
    monkeypatch.setenv("FASTLINEAR_KERNEL", rivals.BASELINE)
    layer = layer_of(scheme)
    agrees(layer, layer(x), x)
    assert layer.plans[0].name != rivals.BASELINE


def falling_back(monkeypatch: pytest.MonkeyPatch, winner: Callable[[str], bool]) -> list[list[str]]:
    """From here on every tuning is won by the first candidate whose name `winner` accepts; what ran in each."""
    from fastlinear.plan import race

    ran: list[list[str]] = []

    def choose(candidates: Any, baseline: str, **_: Any) -> race.Verdict:
        for candidate in candidates:
            candidate.run()
        names = [candidate.name for candidate in candidates]
        ran.append(names)
        return race.Verdict(next(filter(winner, names)), ((names[0], 1.0),), 2.0, True, 1, 1, 0.0)

    monkeypatch.setattr(race, "choose", choose)
    decide.cache().clear()
    return ran


@pytest.mark.parametrize("held", FLOATS)
@pytest.mark.parametrize("of_x", FLOATS)
def test_fallback(held: torch.dtype, of_x: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """With fallback=True the parameter's own format competes, native and in torch; where it wins it runs, the report
    says that int8 was refused, and its pack is counted; a frozen layer has nothing to fall back on."""
    stock = nn.Linear(K, N).to(held).eval().requires_grad_(False)
    x, form = torch.randn(2, 3, K).to(of_x), _tensors.FORMATS[held]
    want = F.linear(x, stock.weight.to(of_x), stock.bias.to(of_x)).relu()
    plain = FastLinear.from_linear(stock, "relu").eval()
    natives = {row["name"] for row in _kernels.kernels()} if plain.precision.takes(of_x) else set()
    for kind in ("torch", "native"):
        if kind == "native" and not natives:
            continue

        def winner(name: str, kind: str = kind) -> bool:
            return name == rivals.BASELINE if kind == "torch" else DTYPES.keys() & {name.split("/")[0]} != set()

        ran = falling_back(monkeypatch, winner)
        layer = FastLinear.from_linear(stock, "relu", quantize=Int8Dynamic(fallback=True)).eval()
        y = layer(x)
        torch.testing.assert_close(y, want, rtol=0.02, atol=0.02)
        (chosen,) = layer.plans
        assert chosen.refused == "int8" and (chosen.name in rivals.NAMES) == (kind == "torch")
        assert "(int8 refused)" in str(fastlinear.report(layer))
        assert any(name.startswith("int8/") for name in ran[0]) and rivals.BASELINE in ran[0]
        counted = {form} if kind == "native" else set()
        assert {engine.packed.format for engine in layer._casting.values()} == counted
        layer._reset()
        assert torch.equal(layer(x), y) and layer.plans[0].source == "equal" and layer.plans[0].refused == "int8"
        assert len(ran) == 1
        layer._tune = "off"
        fastlinear.freeze(layer)
        layer(x)
        assert not layer.plans[0].refused and layer.plans[0].name.startswith("int8/")
        fastlinear.unfreeze(layer)


def test_int8_that_wins_refuses_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """With fallback=True, too, the report is silent where int8 is faster, and no second pack stays."""
    falling_back(monkeypatch, lambda name: name.startswith("int8/"))
    layer, x = (
        FastLinear.from_linear(nn.Linear(K, N), "relu", quantize=Int8Dynamic(fallback=True)).eval(),
        torch.ones(5, K),
    )
    with torch.no_grad():
        agrees(layer, layer(x), x)
    assert not layer.plans[0].refused and not layer._casting and "refused" not in str(fastlinear.report(layer))
    assert layer.plans[0].speedup == 2.0


# ---- the report ------------------------------------------------------------------------------------------------------


@every_scheme
@pytest.mark.parametrize("freeze", [False, True])
def test_the_report_tells_the_error(scheme: str, freeze: bool) -> None:
    """Signal to noise of the weight, and of the output where calibration ran; of repeated layers the least."""
    model, x = Model(2).eval(), torch.randn(50, 8)
    fast = OFF(model, quantize=SCHEMES[scheme](model, x))
    assert all(row.quality == (None, None) for row in fastlinear.report(fast))
    with torch.no_grad():
        fast(x)
    weights = {name: layer.weight.detach().clone() for name, layer in fast.named_modules() if linear.is_fast(layer)}
    if freeze:
        fastlinear.freeze(fast)
    calibrated = "static" in scheme or scheme == "smoothed"
    for row in fastlinear.report(fast):
        smooth = fast.get_submodule(row.name)._precision.smooth
        quantized = int8.quantize_weight(weights[row.name], smooth)
        assert row.quality.weight == pytest.approx(int8.weight_snr(weights[row.name], quantized, smooth))
        assert (row.quality.output is not None) == calibrated and 25 < row.quality.weight < 70
        assert not calibrated or 15 < row.quality.output < 70
    text = str(fastlinear.report(fast))
    assert " dB " in text.splitlines()[2] and "dB: signal to noise" in text
    assert max(map(len, text.splitlines())) <= 120
    assert f"quantized={fast.head._precision.scheme}" in repr(fast.head) or not fast.head._precision.scheme


def test_reports_without_int8_have_no_such_column() -> None:
    """Models of floats are reported as ever."""
    assert " dB " not in str(fastlinear.report(OFF(Model(1).eval())))


def test_candidates_are_told_by_the_table() -> None:
    """A problem in each integer format has native candidates for every M, from the best ISA that has them."""
    integers = {str(row["format"]) for row in _kernels.kernels() if row["accumulate"] == "int32"}
    for packed, scheme in itertools.product(integers, ("symmetric", "static-smooth")):
        problem = Problem(1, N, K, "fp32", packed, "fp32", "fp32", True, None, False, 1, scheme)
        for m in (1, 16, 512):
            found = native_candidates(problem._replace(m=m))
            assert found and {c.name.split("/")[1] for c in found} <= {
                row["isa"] for row in _kernels.kernels() if row["runnable"]
            }
