"""freeze and unfreeze: the weight exists once, packed, and whoever asks for it gets what it was.

That frozen layers do what nn.Linear does, for every input and mode and after every change, is in test_linear.py.
"""

import copy
import functools
import gc
import io
import pickle
import threading
import warnings
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import zygote
from models import FEW_PAIRINGS, OFF, PAIRINGS, Model, Pairing, fast_names, inputs, mlp, same_tensors
from oracle import check
from torch import Tensor, nn
from torch.nn.utils import parametrize
from transformers.pytorch_utils import Conv1D

import fastlinear
import fastlinear._kernels as _kernels
import fastlinear._tensors as _tensors
from fastlinear import FastLinear
from fastlinear.layer import frozen, linear, packs
from fastlinear.plan import decide, rivals
from fastlinear.spec import activations
from fastlinear.spec.precision import Precision

K, N = 37, 70
EVERY_PAIRING = pytest.mark.parametrize("pairing", PAIRINGS)
EVERY_LAYER = pytest.mark.parametrize("transposed", [False, True], ids=["linear", "conv1d"])
FP32 = Pairing(torch.float32, torch.float32, torch.float32)


def layer_of(transposed: bool = False, pairing: Pairing = FP32, activation: str = "gelu", tune: str = "off") -> Any:
    layer: Any = (Conv1D(N, K) if transposed else nn.Linear(K, N)).to(pairing.held).eval()
    nn.init.normal_(layer.bias)
    dtype = None if pairing.held == pairing.packed else pairing.packed
    linear.adopt(layer, activations.resolve(activation), tune, "fc", Precision(dtype and _tensors.FORMATS[dtype]))
    return layer.requires_grad_(False)


def formula(layer: Any, x: Tensor) -> Tensor:
    """What torch makes of the layer's weight as it tells it."""
    weight, bias = layer.weight.to(x.dtype), layer.bias.to(x.dtype)
    return activations.apply(layer.activation, F.linear(x, weight.t() if layer._transposed else weight, bias))


def tied() -> nn.Sequential:
    """Two linear layers with one Parameter, and one of its own."""
    model = nn.Sequential(nn.Linear(K, K), nn.ReLU(), nn.Linear(K, K), nn.Linear(K, N)).eval()
    model[2].weight = model[0].weight
    return model


def saved(thing: object) -> bytes:
    buffer = io.BytesIO()
    torch.save(thing, buffer)
    return buffer.getvalue()


def frozen_names(model: nn.Module) -> set[str]:
    return {name for name, module in model.named_modules() if frozen.is_frozen(module)}


# ---- what is kept, and what goes -------------------------------------------------------------------------------------


@EVERY_PAIRING
@EVERY_LAYER
def test_weights_come_back_bit_for_bit(transposed: bool, pairing: Pairing) -> None:
    """A frozen layer's weight, and an unfrozen one's Parameter, are the original, or what it was rounded to: shape,
    strides and requires_grad too."""
    for requires_grad in (False, True):
        layer = layer_of(transposed, pairing)
        weight = layer.weight.requires_grad_(requires_grad)
        expected = weight.detach().to(pairing.packed).to(pairing.held)
        fastlinear.freeze(layer)
        assert [name for name, _ in layer.named_parameters()] == ["bias"]
        for got in (layer.weight, layer.state_dict()["weight"], fastlinear.unfreeze(layer).weight):
            assert got is not weight and torch.equal(got, expected)
            assert (got.dtype, got.stride()) == (weight.dtype, weight.stride())
        assert isinstance(layer.weight, nn.Parameter) and layer.weight.requires_grad == requires_grad
        assert list(dict(layer.named_parameters())) == ["weight", "bias"]


@EVERY_PAIRING
@EVERY_LAYER
def test_outputs_keep_their_bits(transposed: bool, pairing: Pairing) -> None:
    """The kernels that ran before run after, on the same panels: not a bit changes, there and back."""
    layer, x = layer_of(transposed, pairing), torch.randn(5, K).to(pairing.x)
    y, plans = layer(x), layer.plans
    fastlinear.freeze(layer)
    assert layer.plans == plans
    assert torch.equal(layer(x), y) and torch.equal(layer(torch.cat([x, x]))[:5], y)
    check(y, x, layer.weight.t() if transposed else layer.weight, layer.bias, layer.activation)
    assert torch.equal(fastlinear.unfreeze(layer)(x), y)


def test_memory_is_that_of_the_packs() -> None:
    """After freeze no tensor of the size of a weight is left but the packs, which are as large as the weights."""
    model = OFF(mlp(256, 512, 512)).eval()
    sizes = {p.numel() for p in model.parameters() if p.dim() == 2}
    refs = [weakref.ref(p) for p in model.parameters() if p.dim() == 2]
    nbytes = sum(p.nbytes for p in model.parameters() if p.dim() == 2)
    with torch.no_grad():
        model(torch.randn(5, 256))

    def big() -> int:
        return len([t for t in gc.get_objects() if type(t) in (Tensor, nn.Parameter) and t.numel() in sizes])

    before = big()
    assert fastlinear.freeze(model) is model
    assert before - big() == 2 and all(ref() is None for ref in refs)
    assert sum(layer.pack_nbytes for layer in model if linear.is_fast(layer)) == nbytes


MEASURE = """
import gc, sys, torch, fastlinear
from torch import nn

def rss(field):
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith(field))

dtype, ran = getattr(torch, sys.argv[1]), sys.argv[2] == "ran"
torch.set_num_threads(1)
small = fastlinear.convert(nn.Linear(64, 64).eval(), tune="off", inplace=True, freeze=True)
with torch.inference_mode():
    small(torch.randn(4, 64))
gc.collect()
base = rss("VmRSS")
model = nn.Sequential(*(nn.Linear(1024, 2048) if i % 2 == 0 else nn.Linear(2048, 1024) for i in range(30))).eval()
stock = rss("VmRSS") - base
weights = sum(p.nbytes for p in model.parameters())
assert 0.99 * weights < stock < 1.05 * weights
x = torch.randn(4, 1024)
with torch.inference_mode():
    expected = model(x)
with open("/proc/self/clear_refs", "w") as file:
    file.write("5")  # VmHWM starts again
if ran:
    fastlinear.convert(model, tune="off", dtype=None if dtype is torch.float32 else dtype, inplace=True)
    with torch.inference_mode():
        model(x)
    fastlinear.freeze(model)
else:
    only = None if dtype is torch.float32 else dtype
    fastlinear.convert(model, tune="off", dtype=only, inplace=True, freeze=True)
peak = rss("VmHWM") - base
with torch.inference_mode():
    y = model(x)
print(peak / stock, (rss("VmRSS") - base) / stock, ((y - expected).norm() / expected.norm()).item())
"""


@pytest.mark.parametrize(
    ("dtype", "most"),
    [("float32", 1.05), *(pytest.param(name, 0.53, marks=pytest.mark.exhaustive) for name in ("bfloat16", "float16"))],
)
def test_resident_memory(dtype: str, most: float) -> None:
    """In a fresh process with 240 MB of weights: converting and freezing in place peaks at most at 1.15 times the stock
    weights, and what stays is at most 1.05 times them, or 0.53 times in 16 bits."""
    peak, left, error = measured(dtype, "in one go")
    assert peak <= 1.15 and left <= most and error < 0.02


@pytest.mark.parametrize(
    ("dtype", "most"),
    [pytest.param(*case, marks=pytest.mark.exhaustive) for case in (("float32", 1.05), ("bfloat16", 0.53))],
)
def test_resident_memory_of_a_model_that_ran(dtype: str, most: float) -> None:
    """The same is left where the model had packed its weights before."""
    _, left, error = measured(dtype, "ran")
    assert left <= most and error < 0.02


def measured(*arguments: str) -> list[float]:
    return [float(word) for word in zygote.checked(MEASURE, *arguments, imported="fastlinear").split()]


def test_each_weight_goes_before_the_next_is_packed(monkeypatch: pytest.MonkeyPatch) -> None:
    """convert(inplace=True, freeze=True) holds the weights that are still to come, and the one at hand."""
    model = mlp(*[16] * 6).eval()
    weights = [weakref.ref(p) for p in model.parameters() if p.dim() == 2]
    alive: list[int] = []

    def counting(*args: Any, **kwargs: Any) -> Any:
        alive.append(sum(ref() is not None for ref in weights))
        return packs.pack(*args, **kwargs)

    monkeypatch.setattr(linear, "pack", counting)
    assert OFF(model, inplace=True, freeze=True) is model
    assert alive == [5, 4, 3, 2, 1] and not any(ref() for ref in weights)


class Curious(nn.Module):
    """Reads its layer's weight in every call, as T5's feed-forward does."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x.to(self.fc.weight.dtype))


def test_a_weight_that_is_read_often_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """After some calls nothing is unpacked any more."""
    fast, unpacked = OFF(Curious().eval(), freeze=True), []
    weight = fast.fc.weight.clone()
    real = frozen.operator.unpack
    monkeypatch.setattr(frozen.operator, "unpack", lambda *args: unpacked.append(args) or real(*args))
    with torch.inference_mode():
        y = fast(inputs())
        assert len(unpacked) == 1 and fast.fc._frozen.kept is None
        for _ in range(40):
            assert fast(inputs()).shape == y.shape
        count = len(unpacked)
        fast(inputs())
    assert len(unpacked) == count < 40 and torch.equal(fast.fc.weight, weight)
    assert copy.deepcopy(fast.fc)._frozen.kept is None and list(fast.fc.state_dict()) == ["weight", "bias"]


# ---- convert, unconvert, refresh, tune -------------------------------------------------------------------------------


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_convert_and_freeze(inplace: bool, dtype: torch.dtype | None) -> None:
    """One call converts and freezes every layer, in place or in a copy that leaves the original whole."""
    model, x = Model().eval(), inputs()
    state = {key: value.clone() for key, value in model.state_dict().items()}
    attributes = [dict(vars(module)) for module in model.modules()]
    with torch.no_grad():
        expected = model(x)
        fast = OFF(model, dtype=dtype, inplace=inplace, freeze=True)
        torch.testing.assert_close(fast(x), expected, **({} if dtype is None else {"rtol": 0.05, "atol": 0.05}))
    assert (fast is model) == inplace and frozen_names(fast) == fast_names(fast) and len(fast_names(fast)) == 23
    if not inplace:
        assert same_tensors(model.state_dict(), state)
        assert [dict(vars(module)) for module in model.modules()] == attributes
    if dtype is None:
        assert same_tensors(fast.state_dict(), state)
        assert type(fastlinear.unconvert(fast).head) is nn.Linear and same_tensors(fast.state_dict(), state)
        assert str(fast) == str(Model())


def test_unconvert_leaves_no_trace() -> None:
    """Frozen and back, every module has its class and attributes, and its parameters their values and order."""
    model = nn.Sequential(Model(), mlp(8, 8), nn.TransformerEncoderLayer(8, 2, 16, batch_first=True))
    before = [{key: value for key, value in vars(m).items() if key != "_parameters"} for m in model.modules()]
    state = {key: value.clone() for key, value in model.state_dict().items()}
    grads = [(name, p.requires_grad) for name, p in model.named_parameters()]
    fastlinear.unconvert(OFF(model, inplace=True, freeze=True))
    after = [{key: value for key, value in vars(m).items() if key != "_parameters"} for m in model.modules()]
    assert after == before and same_tensors(model.state_dict(), state)
    assert [(name, p.requires_grad) for name, p in model.named_parameters()] == grads


def test_encoders_and_their_fast_path() -> None:
    """nn.TransformerEncoder, which would read the weights, runs frozen."""
    stock = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 2).eval()
    fast, x = OFF(stock, freeze=True), torch.randn(2, 5, 8)
    with torch.no_grad():
        torch.testing.assert_close(fast(x), stock(x))
    assert len(frozen_names(fast)) == 8


def test_freezing_again_and_refreshing_change_nothing() -> None:
    """What is frozen stays as it is under freeze, refresh and convert, the pack itself too."""
    fast, x = OFF(mlp(8, 8, 8), freeze=True).eval(), inputs()
    kept = [fast[i]._frozen for i in (0, 2)]
    with torch.no_grad():
        y = fast(x)
        for again in (fastlinear.freeze, fastlinear.refresh, functools.partial(OFF, inplace=True, freeze=True)):
            assert again(fast) is fast and [fast[i]._frozen for i in (0, 2)] == kept
            assert torch.equal(fast(x), y)
        assert OFF(fast)[0]._frozen.packed is kept[0].packed


def test_freeze_sees_writes_that_torch_does_not_count() -> None:
    """What is kept is the weight as it is, not as it was when it was packed."""
    layer, x = layer_of(), torch.randn(5, K)
    layer(x)
    layer.weight.data.mul_(-1)
    expected = layer.weight.detach().clone()
    assert torch.equal(fastlinear.freeze(layer).weight, expected)
    torch.testing.assert_close(layer(x), formula(layer, x))


def test_another_precision_is_refused() -> None:
    """A frozen layer stays in its precision, and convert says why."""
    fast = OFF(mlp(8, 8), freeze=True)
    with pytest.warns(UserWarning, match="frozen in another precision"):
        OFF(fast, dtype=torch.bfloat16, inplace=True)
    assert fast[0].packed_as == "fp32"
    with pytest.raises(ValueError, match="cannot become a FastLinear: it is frozen"):
        FastLinear.from_linear(fast[0])


@pytest.mark.parametrize("error", [ZeroDivisionError])
def test_an_error_in_tuning_leaves_a_whole_model(error: type[Exception]) -> None:
    """What is frozen cannot be brought back if it was rounded, so convert ends with a converted, frozen model."""

    class Failing(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            raise error

    model = nn.Sequential(nn.Linear(8, 8), Failing()).eval()
    with pytest.raises(error):
        fastlinear.convert(model, inplace=True, freeze=True, tune="now", example_inputs=inputs())
    assert frozen_names(model) == {"0"}
    with torch.no_grad():
        assert model[0](inputs()).shape == (5, 8)


def test_mistakes_are_told() -> None:
    """Wrong kinds of arguments, models with nothing to freeze, and layers that cannot be frozen."""
    for function in (fastlinear.freeze, fastlinear.unfreeze):
        with pytest.raises(TypeError, match=f"{function.__name__}\\(\\) takes an nn.Module, but was given int"):
            function(3)  # type: ignore[type-var]
    with pytest.raises(TypeError, match="freeze must be True or False"):
        fastlinear.convert(mlp(8, 8), freeze=1)  # type: ignore[arg-type]
    with pytest.warns(UserWarning, match="nothing to freeze: Sequential has no fast layer"):
        fastlinear.freeze(mlp(8, 8))
    layer = FastLinear(8, 8, dtype=torch.float64)
    with pytest.raises(ValueError, match=r"FastLinear cannot be frozen: its weight is torch.float64"):
        linear.freeze_layer(layer)
    assert not frozen.is_frozen(fastlinear.freeze(layer))
    pack = packs.pack(torch.randn(8, 9), Precision("fp32"))
    with pytest.raises(ValueError, match="8 in and 8 out features cannot hold a weight of 8 x 9"):
        frozen.hold(layer, frozen.Frozen(pack, torch.float32))


def test_adopting_over_a_pack() -> None:
    """A layer on the meta device becomes a frozen one over a pack; others over the same record are tied to it."""
    weight, x = torch.randn(N, K), torch.randn(5, K)
    record = frozen.Frozen(packs.pack(weight, Precision("bf16")), torch.float32, origin="repacked from bf16/64x2")
    layers = [nn.Linear(K, N, bias=False, device="meta").eval() for _ in range(2)]
    for layer in layers:
        linear.adopt(layer, activations.resolve("relu"), "off", "fc", Precision("bf16"), over=record)
    with torch.no_grad():
        check(layers[0](x), x, weight.bfloat16(), None, layers[0].activation)
    (row,) = fastlinear.report(layers[0])
    assert row.frozen and row.origin == "repacked from bf16/64x2" and row.dtype == "float32 as bfloat16"
    fastlinear.unfreeze(layers[0])
    assert layers[1].weight is layers[0].weight and torch.equal(layers[0].weight, weight.bfloat16().float())
    with pytest.raises(ValueError, match="neither"):
        linear.adopt(nn.Bilinear(2, 2, 2), over=record)


# ---- plans -----------------------------------------------------------------------------------------------------------


def test_torchs_own_ways_go(monkeypatch: pytest.MonkeyPatch) -> None:
    """A layer that ran on torch's kernel runs on a native one once it is frozen, even if that is asked for by name."""
    layer, x = layer_of(), torch.randn(5, K)
    monkeypatch.setenv("FASTLINEAR_KERNEL", rivals.BASELINE)
    y = layer(x)
    assert [chosen.name for chosen in layer.plans] == [rivals.BASELINE]
    fastlinear.freeze(layer)
    assert layer.plans == ()
    torch.testing.assert_close(layer(x), y)
    assert {chosen.name for chosen in layer.plans} <= {row["name"] for row in _kernels.kernels()}


@EVERY_PAIRING
def test_tuning_measures_kernels_only(pairing: Pairing) -> None:
    """A frozen layer is tuned among the kernels, and remembered; one that was tuned before is not tuned again."""
    layer, x = layer_of(pairing=pairing, activation="relu", tune="lazy"), torch.randn(40, K).to(pairing.x)
    decide.cache().clear()
    fastlinear.freeze(layer)
    layer(x)
    (chosen,) = layer.plans
    assert chosen.speedup is None and chosen.table and not any(name.startswith("torch/") for name, _ in chosen.table)
    assert chosen.source == "tuned"
    layer._reset()
    layer(x)
    assert layer.plans[0].source in ("equal", "tuned")  # tuned again, where noise had hidden the answer
    before = layer_of(pairing=pairing, activation="relu", tune="lazy")
    decide.cache().clear()
    before(x)
    (known,) = before.plans
    again = frozen.Frozen(packs.pack(before.weight, before.precision), pairing.held)
    after = layer_of(pairing=pairing, activation="relu", tune="lazy")
    frozen.hold(after, again)
    after(x)
    (chosen,) = after.plans
    if known.name not in rivals.NAMES:
        assert (chosen.source, chosen.name, chosen.speedup) == ("equal", known.name, known.speedup)
    assert chosen.name not in rivals.NAMES


def test_disable(monkeypatch: pytest.MonkeyPatch) -> None:
    """FASTLINEAR_DISABLE=1 computes with torch's ops, bit for bit."""
    layer, x = fastlinear.freeze(layer_of()), torch.randn(5, K)
    monkeypatch.setenv("FASTLINEAR_DISABLE", "1")
    assert torch.equal(layer(x), formula(layer, x)) and layer.plans == ()


# ---- ties ------------------------------------------------------------------------------------------------------------


def test_weights_with_another_use_are_kept() -> None:
    """A weight that an embedding has too, as a Parameter or as a buffer over its memory, stays a Parameter."""
    model = nn.ModuleDict({"embed": nn.Embedding(10, 8), "head": nn.Linear(8, 10), "fc": nn.Linear(8, 8)}).eval()
    model["head"].weight = model["embed"].weight
    fast = OFF(model, freeze=True)
    assert frozen_names(fast) == {"fc"} and fast["head"].weight is fast["embed"].weight
    with torch.no_grad():
        torch.testing.assert_close(fast["head"](torch.ones(1, 8)), model["head"](torch.ones(1, 8)))
    fast = OFF(mlp(8, 8, 8))
    fast.register_buffer("view", fast[2].weight.detach())
    assert frozen_names(fastlinear.freeze(fast)) == {"0"}


def test_layers_with_one_weight_and_two_packs_are_kept() -> None:
    """Where two layers pack one Parameter in two formats, the Parameter stays the one truth."""
    fast = OFF(tied(), dtype=torch.bfloat16, include="0")
    fast = OFF(fast, include=["2", "3"])
    assert frozen_names(fastlinear.freeze(fast)) == {"3"} and fast[0].weight is fast[2].weight


WAYS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "itself": lambda model: model,
    "deepcopy": copy.deepcopy,
    "convert": OFF,
    "pickle": lambda model: pickle.loads(pickle.dumps(model)),
    "torch.save": lambda model: torch.load(io.BytesIO(saved(model)), weights_only=False),
}


@pytest.mark.parametrize("way", WAYS)
def test_ties_last(way: str) -> None:
    """Layers with one Parameter share one pack, and one Parameter again whatever thaws one of them; so do copies."""
    model = tied()
    weight = model[0].weight.detach().clone()
    x = torch.randn(5, K)
    with torch.no_grad():
        expected = model(x)
        fast = WAYS[way](OFF(model, freeze=True))
        assert fast[0]._frozen is fast[2]._frozen is not None and fast[3]._frozen is not fast[0]._frozen
        torch.testing.assert_close(fast(x), expected)
        fastlinear.unfreeze(fast[2])
        assert fast[0].weight is fast[2].weight and torch.equal(fast[0].weight, weight)
        assert frozen_names(fast) == {"3"}
        torch.testing.assert_close(fast(x), expected)
    fast = WAYS[way](OFF(model, freeze=True))
    fast.double()
    assert fast[0].weight is fast[2].weight and fast[0].weight.dtype == torch.float64 and not frozen_names(fast)


def test_a_loaded_tie_is_one_weight() -> None:
    """A state dict that names only one of two tied layers loads both, as it would in a stock model."""
    model, x = tied(), torch.randn(5, K)
    fast = OFF(model, freeze=True)
    state = {"0.weight": torch.randn(K, K)}
    for m in (model, fast):
        m.load_state_dict(state, strict=False)
    with torch.no_grad():
        torch.testing.assert_close(fast(x), model(x))


def test_copies_go_their_own_way() -> None:
    """A copy shares the pack and nothing else: thawing or changing it leaves the original frozen and as it was."""
    fast, x = OFF(mlp(8, 8), freeze=True).eval(), inputs()
    with torch.no_grad():
        y = fast(x)
        for way in (copy.copy, copy.deepcopy):
            other = way(fast[0])
            assert other._frozen.packed is fast[0]._frozen.packed and torch.equal(other(x).relu(), y)
        other.weight = nn.Parameter(2 * other.weight)
        torch.testing.assert_close(other(x), F.linear(x, 2 * fast[0].weight, fast[0].bias))
        assert frozen.is_frozen(fast[0]) and torch.equal(fast(x), y)


# ---- state dicts, pickles, changes -----------------------------------------------------------------------------------


@EVERY_PAIRING
def test_state_dicts_are_the_stock_models(pairing: Pairing) -> None:
    """Keys, order, dtypes and values; torch.save gives it to a stock model, strictly; and none of it is packed."""
    stock = Model().to(pairing.held)
    dtype = None if pairing.packed == pairing.held else pairing.packed
    fast = OFF(stock, dtype=dtype, include="*", freeze=True)
    state = fast.state_dict()
    expected = {
        key: value.to(pairing.packed).to(value.dtype) if key.endswith("weight") and value.dim() == 2 else value
        for key, value in stock.state_dict().items()
    }
    assert same_tensors(state, expected)
    assert list(fast.state_dict(prefix="a.", keep_vars=True)) == [f"a.{key}" for key in expected]
    other = Model().to(pairing.held)
    other.load_state_dict(torch.load(io.BytesIO(saved(state)), weights_only=True))
    assert same_tensors(other.state_dict(), expected)


@pytest.mark.parametrize("name", ["bert", "gpt2", "t5"])
def test_save_pretrained(name: str, tmp_path: Path) -> None:
    """What transformers saves of a frozen model is what it saves of the stock one, and loads into its class."""
    transformers = pytest.importorskip("transformers", reason="transformers is an optional dependency")
    t = transformers
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    makers = {
        "bert": lambda: t.BertForMaskedLM(t.BertConfig(vocab_size=50, **sizes)),
        "gpt2": lambda: t.GPT2LMHeadModel(t.GPT2Config(vocab_size=50, n_embd=32, n_layer=2, n_head=2, n_positions=16)),
        "t5": lambda: t.T5ForConditionalGeneration(
            t.T5Config(vocab_size=50, d_model=32, d_ff=64, d_kv=16, num_layers=1, num_heads=2)
        ),
    }
    model = makers[name]().eval()
    fast = OFF(model, freeze=True)
    assert frozen_names(fast)
    ids = {"input_ids": torch.arange(14).reshape(2, 7)} | (
        {"decoder_input_ids": torch.arange(6).reshape(2, 3)} if name == "t5" else {}
    )
    with torch.no_grad():
        torch.testing.assert_close(fast(**ids).logits, model(**ids).logits, rtol=1e-4, atol=1e-4)
    for which, each in (("stock", model), ("frozen", fast)):
        each.save_pretrained(tmp_path / which)
    weights = [(tmp_path / which / "model.safetensors").read_bytes() for which in ("stock", "frozen")]
    assert weights[0] == weights[1]
    loaded = type(model).from_pretrained(tmp_path / "frozen")
    assert same_tensors(dict(loaded.state_dict()), dict(model.state_dict()))
    assert frozen_names(fast)


def test_loading_thaws() -> None:
    """Layers that a state dict has a weight for are thawed and loaded, others stay; what is missing is missing."""
    fast, other = OFF(Model(2), freeze=True), Model(2)
    part = {key: t for key, t in other.state_dict().items() if key.startswith(("head.", "norm."))}
    result = fast.load_state_dict(part, strict=False)
    assert set(result.missing_keys) == other.state_dict().keys() - part.keys() and not result.unexpected_keys
    assert frozen_names(fast) == fast_names(fast) - {"head"}
    with pytest.raises(RuntimeError, match=r"Missing key.*layers\.0\.fc1\.weight"):
        fast.load_state_dict(part)
    for assign in (False, True):
        fastlinear.freeze(fast)
        fast.load_state_dict(other.state_dict(), assign=assign)
        assert same_tensors(fast.state_dict(), other.state_dict()) and not frozen_names(fast)
    fastlinear.freeze(fast)
    with pytest.raises(RuntimeError, match=r"size mismatch for head\.weight"):
        fast.load_state_dict({**other.state_dict(), "head.weight": torch.zeros(2, 2)})
    assert torch.equal(fast.head.weight, other.head.weight)


@pytest.mark.parametrize("way", ["pickle", "torch.save"])
@EVERY_PAIRING
def test_pickles_hold_no_packed_bytes(way: str, pairing: Pairing) -> None:
    """A pickled frozen model has its weights once, row by row, and arrives frozen, packed for the machine it is on."""
    dtype = None if pairing.packed == pairing.held else pairing.packed
    fast = OFF(mlp(64, 80, 64).to(pairing.held), dtype=dtype, freeze=True).eval()
    x = torch.randn(5, 64).to(pairing.x)
    for ran in (False, True):
        data = pickle.dumps(fast) if way == "pickle" else saved(fast)
        panels = bytes(fast[0]._frozen.packed.data.numpy())
        rows = fast[0]._frozen.packed.unpack().view(torch.uint8).numpy().tobytes()
        assert rows in data and panels[:256] not in data
        assert len(data) < fast[0].pack_nbytes + fast[2].pack_nbytes + 20000
        other = pickle.loads(data) if way == "pickle" else torch.load(io.BytesIO(data), weights_only=False)
        assert frozen_names(other) == {"0", "2"} and same_tensors(other.state_dict(), fast.state_dict())
        with torch.no_grad():
            assert torch.equal(other(x), fast(x)) or ran is None


@pytest.mark.parametrize("quantize", [None, fastlinear.Int8Dynamic(), fastlinear.Int8WeightOnly()])
@pytest.mark.parametrize("shape", [(8, 0), (0, 8)])
def test_a_layer_without_weights_goes_to_another_process(shape: tuple[int, int], quantize: Any) -> None:
    """A frozen layer of no outputs, as MobileBERT has where its two widths are equal, is pickled as any other."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's, of nothing to initialize
        fast = OFF(nn.Sequential(nn.Linear(*shape)), quantize=quantize, freeze=True).eval()
    other, x = pickle.loads(pickle.dumps(fast)), torch.randn(3, shape[0])
    with torch.no_grad():
        assert torch.equal(other(x), fast(x)) and frozen_names(other) == {"0"}


SAME: dict[str, Callable[[nn.Module], object]] = {
    "to(cpu)": lambda m: m.to("cpu"),
    "to its dtype": lambda m: m.to(torch.float32),
    "float()": lambda m: m.float(),
    "cpu()": lambda m: m.cpu(),
    "train and eval": lambda m: m.train().eval(),
    "requires_grad_": lambda m: m.requires_grad_(False),
    "zero_grad": lambda m: m.zero_grad(),
    "share_memory": lambda m: m.share_memory(),
    "bias replaced": lambda m: setattr(m[0], "bias", nn.Parameter(torch.ones(8), requires_grad=False)),
}
THAWING: dict[str, Callable[[nn.Module], object]] = {
    "half()": lambda m: m.half(),
    "double()": lambda m: m.double(),
    "to(meta)": lambda m: m.to("meta"),
    "unfreeze": fastlinear.unfreeze,
    "a new Parameter": lambda m: setattr(m[0], "weight", nn.Parameter(torch.ones(8, 8))),
    "None": lambda m: setattr(m[0], "weight", None),
    "del": lambda m: delattr(m[0], "weight"),
    "parametrized": lambda m: parametrize.register_parametrization(m[0], "weight", nn.Identity()),
}


@pytest.mark.parametrize("change", [*SAME, *THAWING])
def test_what_thaws(change: str) -> None:
    """Only what needs a weight to write to thaws a layer, and then it is nn.Linear's in every respect."""
    stock = mlp(8, 8).eval().requires_grad_(False)
    fast = OFF(stock, freeze=True)
    for model in (stock, fast):
        {**SAME, **THAWING}[change](model)
    assert frozen.is_frozen(fast[0]) == (change in SAME)
    weight = getattr(stock[0], "weight", "none")
    assert type(getattr(fast[0], "weight", "none")) is type(weight) or change in SAME or change == "parametrized"
    if isinstance(weight, Tensor) and weight.device.type == "cpu":
        x = inputs().to(weight.dtype)
        torch.testing.assert_close(fast(x), stock(x))


def test_a_wrong_assignment_changes_nothing() -> None:
    """What nn.Linear refuses as its weight, a frozen one refuses, and stays frozen."""
    layer = fastlinear.freeze(layer_of())
    with pytest.raises(TypeError, match=r"cannot assign .* as parameter 'weight'"):
        layer.weight = torch.randn(N, K)
    assert frozen.is_frozen(layer)
    with pytest.raises(AttributeError, match="'FastLinear' object has no attribute 'wait'"):
        layer.wait  # noqa: B018


# ---- all of torch ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("training", [False, True])
@EVERY_LAYER
def test_gradients(transposed: bool, training: bool) -> None:
    """Input and bias have the gradients of the stock layer; the weight, no Parameter, has none."""
    layer = layer_of(transposed).requires_grad_().train(training)
    x = torch.linspace(-1, 1, 5 * K).view(5, K).requires_grad_()
    wanted = torch.autograd.grad(formula(layer, x).square().sum(), (x, layer.bias))
    fastlinear.freeze(layer)
    y = layer(x)
    torch.testing.assert_close(torch.autograd.grad(y.square().sum(), (x, layer.bias)), wanted)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@EVERY_PAIRING
@EVERY_LAYER
def test_autocast(transposed: bool, pairing: Pairing, dtype: torch.dtype) -> None:
    """Under autocast the frozen weight is cast as a Parameter would be, on the kernels, and packed so but once."""
    layer = fastlinear.freeze(layer_of(transposed, pairing))
    x = torch.randn(5, K).to(pairing.x)
    plain = layer(x)
    for _ in range(2):
        with torch.autocast("cpu", dtype):
            y = layer(x)
        weight = layer.weight.to(dtype)
        check(y, x.to(dtype), weight.t() if transposed else weight, layer.bias, layer.activation)
        assert y.dtype == dtype
    engines = dict(layer._casting)
    assert set(engines) == {_tensors.FORMATS[d] for d in {dtype} - {pairing.packed}}
    with torch.autocast("cpu", dtype):
        layer(x)
    assert dict(layer._casting) == engines
    assert torch.equal(layer(x), plain)


@pytest.mark.parametrize("pairing", FEW_PAIRINGS)
def test_the_op_takes_panels(pairing: Pairing) -> None:
    """The dispatcher's op, given panels, passes opcheck, is the layer's kernel for its own and right for others'."""
    layer = fastlinear.freeze(layer_of(pairing=pairing))
    x = torch.randn(5, K).to(pairing.x)
    y = layer(x)
    op, record = torch.ops.fastlinear.linear.default, layer._frozen
    rest = ("gelu", [], False, layer.packed_as, "fp32", *record.form)
    assert torch.equal(op(x, record.panels, layer.bias, *rest), y)
    torch.testing.assert_close(
        op(x, record.panels, layer.bias + 1, *rest),
        F.gelu(F.linear(x.float(), layer.weight.float(), (layer.bias + 1).float())).to(x.dtype),
    )
    for grad in (False, True):
        inputs = x.detach().clone().requires_grad_(grad)
        torch.library.opcheck(op, (inputs, record.panels, layer.bias, *rest))
    torch.library.opcheck(torch.ops.fastlinear.unpack.default, (record.panels, *record.form))


@pytest.mark.costly
@pytest.mark.parametrize("backend", ["eager", "aot_eager", pytest.param("inductor", marks=pytest.mark.exhaustive)])
@EVERY_LAYER
def test_compile(transposed: bool, backend: str) -> None:
    """Compiled without graph breaks and with any batch, a frozen layer runs its kernel: the same bits as eagerly."""
    torch._dynamo.reset()
    layer = fastlinear.freeze(layer_of(transposed))
    compiled = torch.compile(layer, backend=backend, fullgraph=True, dynamic=True)
    for rows in (5, 7, 64):
        x = torch.randn(rows, K)
        y = compiled(x)
        assert layer.plans and torch.equal(y, layer(x))
        torch.testing.assert_close(y, formula(layer, x))
    x = torch.randn(5, K, requires_grad=True)
    wanted = torch.autograd.grad(formula(layer, x).sum(), x)
    torch.testing.assert_close(torch.autograd.grad(compiled(x).sum(), x), wanted)
    with torch.autocast("cpu"):
        x = torch.randn(5, K)
        assert torch.equal(compiled(x), layer(x)) and compiled(x).dtype == torch.bfloat16


@pytest.mark.parametrize("backend", ["eager", pytest.param("inductor", marks=pytest.mark.exhaustive)])
def test_compiled_code_follows_freeze_and_unfreeze(backend: str) -> None:
    """A model that was compiled before is right after."""
    torch._dynamo.reset()
    stock = mlp(8, 8, 8).eval().requires_grad_(False)
    fast = OFF(stock)
    compiled = torch.compile(fast, backend=backend, fullgraph=True)
    x = inputs()
    for step in (fastlinear.freeze, fastlinear.unfreeze, fastlinear.freeze):
        torch.testing.assert_close(compiled(x), stock(x))
        step(fast)
        torch.testing.assert_close(compiled(x), stock(x))
    fast[0].weight = nn.Parameter(torch.eye(8), requires_grad=False)
    stock[0].weight = fast[0].weight
    torch.testing.assert_close(compiled(x), stock(x))


@pytest.mark.parametrize("strict", [False, True])
def test_export(strict: bool) -> None:
    """An exported frozen layer computes the same."""
    layer, x = fastlinear.freeze(layer_of()), torch.randn(5, K)
    program = torch.export.export(layer, (x,), strict=strict)
    torch.testing.assert_close(program.module()(x), layer(x))


def test_profiles_show_the_op() -> None:
    """Profiled, a frozen layer runs its kernel as fastlinear::linear, and its weight is not unpacked."""
    layer, x = fastlinear.freeze(layer_of()), torch.randn(5, K)
    with torch.profiler.profile() as profile:
        y = layer(x)
    torch.testing.assert_close(y, formula(layer, x))
    keys = {event.key for event in profile.key_averages()}
    assert layer.plans and "fastlinear::linear" in keys and "fastlinear::unpack" not in keys


def test_functional_call_and_transforms() -> None:
    """A weight that functional_call lends is used, and gone afterwards; vmap, grad and jvp are torch's."""
    layer, x, other = fastlinear.freeze(layer_of()), torch.randn(5, K), torch.randn(N, K)
    y = layer(x)
    lent = torch.func.functional_call(layer, {"weight": other}, (x,))
    torch.testing.assert_close(lent, F.gelu(F.linear(x, other, layer.bias)))
    assert frozen.is_frozen(layer) and torch.equal(layer(x), y)
    batch = torch.randn(3, 5, K)
    torch.testing.assert_close(torch.vmap(layer)(batch), torch.stack([layer(x) for x in batch]))
    wanted = torch.func.grad(lambda x: formula(layer, x).sum())(x)
    torch.testing.assert_close(torch.func.grad(lambda x: layer(x).sum())(x), wanted)
    for got, expected in zip(
        torch.func.jvp(layer, (x,), (x,)), torch.func.jvp(lambda x: formula(layer, x), (x,), (x,)), strict=True
    ):
        torch.testing.assert_close(got, expected)


def test_inference_mode() -> None:
    """Freezing and thawing within inference mode leave normal Parameters behind."""
    layer, x = layer_of(), torch.randn(5, K)
    with torch.inference_mode():
        y = fastlinear.freeze(layer)(x)
        assert torch.equal(layer(x), y) and torch.equal(fastlinear.unfreeze(layer)(x), y)
    assert not layer.weight.is_inference()
    layer.requires_grad_()(x).sum().backward()


# ---- threads, report -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("grad", [False, True])
def test_freezing_while_others_compute(grad: bool) -> None:
    """Threads that call a model while it is frozen and thawed, over and over, never see a wrong output."""
    model, x = OFF(mlp(64, 64, 64)).eval().requires_grad_(False), torch.randn(5, 64, requires_grad=grad)
    expected = model(x).detach()
    failures: list[object] = []
    done = threading.Event()

    def work() -> None:
        while not done.is_set():
            try:
                with torch.autocast("cpu", enabled=False):
                    y = model(x)
                if not torch.allclose(y, expected, atol=1e-5):
                    failures.append(y)
            except Exception as error:
                failures.append(error)
                raise

    threads = [threading.Thread(target=work) for _ in range(3)]
    for thread in threads:
        thread.start()
    for _ in range(100):
        fastlinear.freeze(model)
        fastlinear.unfreeze(model)
    done.set()
    for thread in threads:
        thread.join()
    assert not failures


def test_the_report_tells() -> None:
    """Frozen layers say so, in data, in the table, in their repr; their memory is told apart."""
    model = OFF(mlp(512, 512, 512), dtype=torch.bfloat16).eval()
    linear.freeze_layer(model[0])
    rows = fastlinear.report(model)
    assert [(row.frozen, row.origin, row.dtype) for row in rows] == [
        (True, "", "float32 as bfloat16"),
        (False, "", "float32 as bfloat16"),
    ]
    assert rows[0].pack_mib == 0.5
    text = str(rows)
    assert "fp32 as bf16 frozen" in text and "extra memory: 0.0 MiB" in text
    assert "frozen: 1 layers, 0.5 MiB of packed weights instead of parameters" in text
    assert "dtype=float32 as bfloat16, frozen=True" in repr(model[0]) and "frozen" not in repr(model[2])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert all(row.frozen for row in fastlinear.report(fastlinear.freeze(model)))
