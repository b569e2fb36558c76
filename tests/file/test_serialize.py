"""save and load: the model that comes back computes the same bits, over the file's own pages, or nothing is changed."""

import copy
import gc
import io
import os
import pickle
import warnings
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import zygote
from forge import Small, forge_metadata, on_meta, split
from models import OFF, PAIRINGS, Model, Pairing, fast_names, mlp, same_tensors
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

import fastlinear
import fastlinear._kernels as _kernels
import fastlinear._tensors as _tensors
import fastlinear._weights as _weights
from fastlinear import FastLinear, FormatError
from fastlinear.file import manifest
from fastlinear.file import safetensors as safefile
from fastlinear.layer import linear, packs
from fastlinear.layer.frozen import Frozen, is_frozen, record_of
from fastlinear.model import fusion
from fastlinear.plan import decide, rivals, table
from fastlinear.spec.formats import DTYPES
from fastlinear.spec.precision import Precision

IDS = torch.tensor([0, 3, 4])
X = torch.randn(5, 8, generator=torch.Generator().manual_seed(7))
FP32 = _tensors.FORMATS[torch.float32]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "model.safetensors"


def saved(path: Path, model: nn.Module, **options: Any) -> nn.Module:
    """The model converted and saved; what was saved."""
    fast = OFF(model.eval(), **options)
    fastlinear.save(fast, path)
    return fast


def answers(model: nn.Module, *inputs: Tensor) -> Tensor:
    with torch.inference_mode():
        return model(*inputs).clone()


class Net(nn.Module):
    """A bit of everything that convert takes, and that stands beside it."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv1d(1, 1, 3, padding=1)
        self.up, self.act = Conv1D(24, 16), nn.SiLU()
        self.down = nn.Linear(24, 16, bias=False)
        self.tail = nn.Sequential(nn.Linear(16, 8), nn.LeakyReLU(0.3), nn.Sequential(nn.Linear(8, 5), nn.Tanh()))
        self.norm = nn.BatchNorm1d(5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x.unsqueeze(1)).squeeze(1)
        x = x + self.down(self.act(self.up(x)))
        return self.norm(self.tail(x))


MODELS: dict[str, tuple[Callable[[], nn.Module], Callable[[], Tensor]]] = {
    "mlp": (lambda: mlp(8, 24, 40, 7), lambda: X),
    "blocks": (lambda: Model(3), lambda: X),
    "everything": (Net, lambda: torch.randn(3, 16)),
    "ties": (Small, lambda: IDS),
    "one layer": (lambda: nn.Linear(8, 5), lambda: X),
    "one layer, no bias": (lambda: nn.Linear(8, 5, bias=False), lambda: X),
    "encoder": (lambda: nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), lambda: torch.randn(2, 3, 8)),
}
EVERY_MODEL = pytest.mark.parametrize("which", MODELS)


# ---- what comes back ----


@EVERY_MODEL
@pytest.mark.parametrize("target", ["meta", "real", "converted", "frozen", "same"])
@pytest.mark.parametrize("freeze", [True, False], ids=["of frozen", "of converted"])
def test_the_model_comes_back(path: Path, which: str, target: str, freeze: bool) -> None:
    """Same bits out, same state dict, same fast layers with the same activations, no weight but packed ones, whatever
    was saved and whatever it is loaded into."""
    make, input = MODELS[which]
    torch.manual_seed(1)
    stock = make().eval()
    fast = saved(path, stock, freeze=freeze)
    x = input()
    wanted, state = answers(fast, x), stock.state_dict()
    targets: dict[str, Callable[[], nn.Module]] = {
        "meta": lambda: on_meta(make),
        "real": lambda: make().eval(),
        "converted": lambda: OFF(make().eval()),
        "frozen": lambda: OFF(make().eval(), freeze=True),
        "same": lambda: fast,
    }
    model = targets[target]()
    assert fastlinear.load(path, model) is model
    assert torch.equal(answers(model, x), wanted)
    assert same_tensors(model.state_dict(), state)
    assert fast_names(model) == fast_names(fast)
    for name in fast_names(model):
        layer: Any = model.get_submodule(name)
        assert is_frozen(layer) or any(layer.weight is p for n, p in model.named_parameters() if n != f"{name}.weight")
        assert layer.activation == fast.get_submodule(name).activation
    assert not any(p.requires_grad for p in model.parameters())
    assert all(not t.is_meta for t in (*model.parameters(), *model.buffers()))
    restored = fastlinear.unconvert(model)
    assert not fast_names(restored) and same_tensors(restored.state_dict(), state)
    torch.testing.assert_close(answers(restored, x), answers(stock, x))


@pytest.mark.parametrize("pairing", PAIRINGS)
@pytest.mark.parametrize("transposed", [False, True], ids=["linear", "conv1d"])
@pytest.mark.parametrize("accumulate", ["fp32", "fp16"])
def test_every_format(path: Path, pairing: Pairing, transposed: bool, accumulate: str) -> None:
    """Dtypes of parameter and pack come back, and the precision that was asked for; the weight as it was packed."""

    def make() -> nn.Module:
        return nn.Sequential(Conv1D(70, 37) if transposed else nn.Linear(37, 70), nn.GELU()).to(pairing.held)

    dtype = None if pairing.packed == pairing.held else pairing.packed
    fast = saved(path, make(), include="*", dtype=dtype, accumulate=accumulate)
    model = fastlinear.load(path, on_meta(make))
    x = torch.randn(5, 37).to(pairing.x)
    assert torch.equal(answers(model, x), answers(fast, x))
    assert (DTYPES[model[0].packed_as], model[0].weight.dtype) == (pairing.packed, pairing.held)
    assert linear.precision_of(model[0]) == Precision(dtype and _tensors.FORMATS[dtype], accumulate)
    assert torch.equal(model[0].weight, fast[0].weight.to(pairing.packed).to(pairing.held))
    assert torch.equal(model[0].bias, fast[0].bias) and model[0].bias.dtype == pairing.held


def test_tune_mode_and_names_come_back(path: Path) -> None:
    """A layer that must not measure does not after loading, and messages call it by its name."""
    fast = fastlinear.convert(mlp(8, 4).eval())
    fastlinear.save(fast, path)
    assert fastlinear.load(path, on_meta(lambda: mlp(8, 4)))[0]._tune == "lazy"
    saved(path, mlp(8, 4))
    model = fastlinear.load(path, on_meta(lambda: mlp(8, 4)))
    assert model[0]._tune == "off"
    with pytest.raises(RuntimeError, match="FastLinear '0'"):
        model(torch.zeros(3, 9))


def test_layers_that_were_left_alone_stay(path: Path) -> None:
    """A model of which a part is converted: the rest is plain in the file, stock after loading, and mapped."""
    fast = saved(path, Net(), exclude=["down", "tail"])
    model = fastlinear.load(path, on_meta(Net))
    assert fast_names(model) == {"up"} and type(model.down) is nn.Linear
    assert torch.equal(answers(model, torch.ones(2, 16)), answers(fast, torch.ones(2, 16)))
    assert is_mapped(path, model.down.weight)


def test_a_model_without_fast_layers(path: Path) -> None:
    """It is a file of its tensors."""
    stock = Net().eval()
    fastlinear.save(stock, path)
    assert same_tensors(fastlinear.load(path, on_meta(Net)).state_dict(), stock.state_dict())


def test_a_layer_that_the_kernels_no_longer_take(path: Path) -> None:
    """In float64 it runs as torch's, and is stored and loaded as that: activation, weight and all."""
    fast = OFF(mlp(8, 16, 3).eval())
    fast[0].double()
    fastlinear.save(fast, path)
    model = fastlinear.load(path, on_meta(lambda: mlp(8, 16, 3)))
    assert fast_names(model) == {"2"} and type(model[0]) is nn.Linear and type(model[1]) is nn.ReLU
    x = torch.randn(3, 8)
    assert torch.equal(answers(model[2:], x[:, [0] * 16]), answers(fast[2:], x[:, [0] * 16]))
    assert torch.equal(answers(model[:2], x.double()), answers(fast[:2], x.double()))


def test_layers_made_by_hand(path: Path) -> None:
    """A FastLinear in the architecture itself takes its pack; where the model has a plain layer, its activation would
    be lost, and that is refused."""

    def make() -> nn.Module:
        return nn.Sequential(FastLinear(8, 16, activation=("leaky_relu", 0.25)), nn.Linear(16, 4))

    fast = saved(path, make())
    model = fastlinear.load(path, on_meta(make))
    assert torch.equal(answers(model, X), answers(fast, X))
    with pytest.raises(FormatError, match=r"'0' computes leaky_relu.*built as a FastLinear"):
        fastlinear.load(path, on_meta(lambda: nn.Sequential(nn.Linear(8, 16), nn.Linear(16, 4))))
    other = nn.Sequential(FastLinear(8, 16, activation="relu"), nn.Linear(16, 4))
    with pytest.raises(FormatError, match="'0' was fused with other activations"):
        fastlinear.load(path, other)


def test_transformer_encoders_stay_off_torchs_fast_path(path: Path) -> None:
    """As convert does, load closes what would bypass the converted layers; unconvert opens it again."""

    def make() -> nn.Module:
        return nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 2)

    saved(path, make())
    model = fastlinear.load(path, on_meta(make))
    called = []
    model.layers[1].linear2.register_forward_hook(lambda *_: called.append(1))
    answers(model, torch.randn(2, 3, 8))
    assert called == [1]
    assert fastlinear.unconvert(model).layers[0].activation_relu_or_gelu


def test_modes_are_left_alone(path: Path) -> None:
    """load is about tensors: a model in training stays in training, where its layers run as torch's do."""
    saved(path, mlp(8, 4))
    model = on_meta(lambda: mlp(8, 4)).train()
    fastlinear.load(path, model)
    assert all(module.training for module in model.modules())
    x = X.clone().requires_grad_()
    model(x).sum().backward()
    assert x.grad is not None and x.grad.abs().sum() > 0
    assert not model.eval()[1].training


def test_loading_in_inference_mode(path: Path) -> None:
    """The parameters are ordinary ones: they can be used outside of it."""
    saved(path, Small())
    with torch.inference_mode():
        model = fastlinear.load(path, on_meta(Small))
    assert not any(t.is_inference() for t in (*model.parameters(), *model.buffers()))
    with torch.no_grad():
        model.norm.weight.fill_(1.0)


# ---- ties, buffers ----


def test_tied_weights_are_stored_once_and_tied_again(path: Path) -> None:
    """An embedding and the head that uses its weight share one Parameter again; the head has its pack beside it."""
    fast = saved(path, Small())
    stored = [name for name in split(path)[0] if name.startswith(("embed", "head"))]
    assert stored == ["head.packed", "embed.weight", "head.bias"]
    model = fastlinear.load(path, on_meta(Small))
    assert model.head.weight is model.embed.weight
    assert model.head._engine.fresh(model.head) and is_mapped(path, model.head._engine.packed.data)
    wanted = answers(fast, IDS)
    assert torch.equal(answers(model, IDS), wanted)
    with torch.no_grad():
        model.embed.weight.mul_(2.0)  # and the pack is no longer that of the weight
    assert torch.equal(answers(model.head, torch.ones(1, 8)), answers(OFF(copy.deepcopy(model.head)), torch.ones(1, 8)))
    assert not torch.equal(answers(model, IDS), wanted)


@pytest.mark.parametrize("freeze", [True, False])
def test_layers_tied_to_each_other_share_a_pack(path: Path, freeze: bool) -> None:
    """One entry, one mapped pack, one Parameter again after unfreeze; with a bias each."""

    def make() -> nn.Module:
        model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8), nn.Linear(8, 8))
        model[2].weight = model[0].weight
        return model

    fast = saved(path, make(), freeze=freeze)
    assert [name for name in split(path)[0] if name.endswith("packed")] == ["0.packed", "3.packed"]
    model = fastlinear.load(path, on_meta(make))
    assert record_of(model[0]) is record_of(model[2]) is not record_of(model[3])
    assert torch.equal(answers(model, X), answers(fast, X))
    fastlinear.unfreeze(model)
    assert model[0].weight is model[2].weight and torch.equal(model[0].weight, fast[0].weight)


def test_whatever_shares_memory_is_stored_once(path: Path) -> None:
    """Parameters and buffers that are the same memory; not what merely overlaps, or is equal."""

    class Sharing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.twin = nn.Parameter(torch.ones(1000)), nn.Parameter(torch.zeros(1000))
            self.register_buffer("view", None)
            self.register_buffer("equal", torch.ones(1000))
            self.register_buffer("part", None)

        def tie(self) -> "Sharing":
            self.twin.data = self.a.data
            self.view, self.part = self.a.data, self.a.data[:500]
            return self

    fastlinear.save(Sharing().tie(), path)
    header, _ = split(path)
    assert set(header) == {"__metadata__", "a", "equal", "part"}
    model = fastlinear.load(path, Sharing().tie())
    assert model.twin is model.a and model.view.data_ptr() == model.a.data_ptr()
    assert model.part.data_ptr() != model.a.data_ptr() != model.equal.data_ptr()
    assert isinstance(model.a, nn.Parameter) and not isinstance(model.view, nn.Parameter)


def test_empty_tensors_are_not_tied(path: Path) -> None:
    """Tensors without elements are at no address, so none is another."""
    model = nn.Module()
    model.a, model.b = nn.Parameter(torch.empty(0, 3)), nn.Parameter(torch.empty(0, 3))
    fastlinear.save(model, path)
    fastlinear.load(path, model)
    assert model.a is not model.b and model.a.shape == (0, 3)


@pytest.mark.parametrize(("n", "k"), [(0, 4), (4, 0), (0, 0)])
def test_layers_without_elements(path: Path, n: int, k: int) -> None:
    """They have no packed bytes, and come back."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # torch: initializing nothing is a no-op
        fast = saved(path, nn.Linear(k, n))
        model = fastlinear.load(path, on_meta(lambda: nn.Linear(k, n)))
    assert is_frozen(model) and torch.equal(answers(model, torch.ones(3, k)), answers(fast, torch.ones(3, k)))


def test_buffers_that_no_state_dict_has(path: Path) -> None:
    """They come from the file where the model has them on meta, and are the model's own otherwise; a file without them
    is enough for a model that has them."""
    saved(path, Small())
    assert torch.equal(fastlinear.load(path, on_meta(Small)).positions, torch.arange(3))
    mine = Small().eval()
    mine.positions = torch.tensor([3, 1, 2])
    assert torch.equal(fastlinear.load(path, mine).positions, torch.tensor([3, 1, 2]))

    bare = Small().eval()
    del bare.positions
    fastlinear.save(OFF(bare), path)
    assert torch.equal(fastlinear.load(path, Small().eval()).positions, torch.arange(3))
    with pytest.raises(FormatError, match=r"lacks 1 tensor \(positions\)"):
        fastlinear.load(path, on_meta(Small))


def test_modules_that_watch_their_parameters(path: Path) -> None:
    """An LSTM keeps a list of its weights beside them, which has to be the new ones."""

    def make() -> nn.Module:
        return nn.ModuleDict({"rnn": nn.LSTM(4, 4), "fc": nn.Linear(4, 4)})

    stock = make().eval()
    saved(path, stock)
    model = fastlinear.load(path, on_meta(make))
    x = torch.randn(2, 4)
    with torch.inference_mode():
        assert torch.equal(model["rnn"](x)[0], stock["rnn"](x)[0])


# ---- over the file's pages ----


def is_mapped(path: Path, tensor: Tensor) -> bool:
    """Whether the memory of a tensor is a mapping of the file."""
    for line in Path("/proc/self/maps").read_text().splitlines():
        if line.endswith(str(path)):
            begin, end = (int(address, 16) for address in line.split()[0].split("-"))
            if begin <= tensor.data_ptr() < end:
                return True
    return False


def test_nothing_is_copied(path: Path) -> None:
    """Packs, parameters and buffers all lie in the one mapping, and none of it is resident before it is used."""
    big = lambda: nn.Sequential(nn.Linear(512, 1024), nn.ReLU(), nn.Linear(1024, 512), nn.LayerNorm(512))  # noqa: E731
    saved(path, big())
    model = fastlinear.load(path, on_meta(big))
    tensors = [*model.parameters(), *model.buffers(), *(record_of(model[i]).packed.data for i in (0, 2))]
    assert all(is_mapped(path, tensor) for tensor in tensors)
    assert resident_kib(path) == 0
    answers(model, torch.randn(1, 512))
    assert resident_kib(path) >= 4096
    del model, tensors
    gc.collect()
    assert str(path) not in Path("/proc/self/maps").read_text()


def resident_kib(path: Path) -> int:
    smaps = Path("/proc/self/smaps").read_text().split(str(path))[1]
    return next(int(line.split()[1]) for line in smaps.splitlines() if line.startswith("Rss:"))


def test_processes_share_the_pages(path: Path) -> None:
    """Of a model that two processes have loaded and used, almost nothing is either's own."""
    make = "nn.Sequential(nn.Linear(1024, 1024), nn.Linear(1024, 1024))"
    saved(path, eval(make))
    program = f"""
import os, torch, fastlinear
from torch import nn
loaded, done = os.pipe(), os.pipe()
other = os.fork() == 0
with torch.device("meta"):
    model = {make}.eval()
fastlinear.load({str(path)!r}, model)
with torch.inference_mode():
    model(torch.ones(3, 1024))
if other:
    os.write(loaded[1], b"1")
    os.read(done[0], 1)
    os._exit(0)
os.close(loaded[1])
assert os.read(loaded[0], 1)
text = open("/proc/self/smaps").read().split({str(path)!r})[1].split("rw-p")[0]
os.write(done[1], b"1")
sizes = dict(line.split()[:2] for line in text.splitlines() if line.endswith(" kB"))
print(sizes["Private_Clean:"], sizes["Private_Dirty:"], sizes["Rss:"])
assert os.wait()[1] == 0
"""
    clean, dirty, resident = map(int, zygote.checked(program, imported="fastlinear").split())
    assert resident >= 8192 and clean + dirty <= 0.15 * resident


def test_saving_over_what_is_mapped(path: Path) -> None:
    """A loaded model goes on as it was when its file is replaced, by itself even; the new file is the new model's."""
    fast = saved(path, Small())
    wanted = answers(fast, IDS)
    model = fastlinear.load(path, on_meta(Small))
    fastlinear.save(model, path)
    again = fastlinear.load(path, on_meta(Small))
    torch.manual_seed(5)
    other = saved(path, Small())
    path.unlink()
    assert torch.equal(answers(model, IDS), wanted) and torch.equal(answers(again, IDS), wanted)
    assert not torch.equal(answers(other, IDS), wanted)


def test_saving_again_writes_the_same_bytes(path: Path, tmp_path: Path) -> None:
    """Of the converted model, of the frozen one, and of the one that was loaded."""
    fast = saved(path, Net())
    first = path.read_bytes()
    fastlinear.save(fastlinear.freeze(fast), path)
    assert path.read_bytes() == first
    fastlinear.save(fastlinear.load(path, on_meta(Net)), tmp_path / "again")
    assert (tmp_path / "again").read_bytes() == first


def test_save_holds_one_pack_at_a_time(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a model that was never called, each pack is made for the file and let go, and the model is as it was."""
    model = OFF(mlp(*[16] * 6).eval())
    alive: list[weakref.ref[Any]] = []
    real = packs.pack

    def pack(*arguments: Any, **options: Any) -> Any:
        gc.collect()
        assert not any(ref() is not None for ref in alive)
        packed = real(*arguments, **options)
        alive.append(weakref.ref(packed))
        return packed

    monkeypatch.setattr(packs, "pack", pack)
    fastlinear.save(model, path)
    assert len(alive) == 5
    assert not any(is_frozen(layer) or layer.pack_nbytes for layer in model if linear.is_fast(layer))


def test_a_loaded_model_can_leave_its_file(path: Path) -> None:
    """Copies, pickles and changed dtypes are memory of their own; a state dict goes into the stock class."""
    fast = saved(path, Small())
    wanted = answers(fast, IDS)
    model = fastlinear.load(path, on_meta(Small))
    copied = copy.deepcopy(model)
    pickled = pickle.loads(pickle.dumps(model))
    assert torch.equal(answers(copied, IDS), wanted) and torch.equal(answers(pickled, IDS), wanted)
    assert not any(is_mapped(path, p) for p in (*copied.parameters(), *pickled.parameters()))
    buffer = io.BytesIO()
    torch.save(model.state_dict(), buffer)
    buffer.seek(0)
    stock = Small().eval()
    stock.load_state_dict(torch.load(buffer, weights_only=True))
    assert same_tensors(stock.state_dict(), model.state_dict())
    assert answers(model.bfloat16(), IDS).dtype == torch.bfloat16


def test_a_loaded_model_can_be_trained_again(path: Path) -> None:
    """unfreeze and requires_grad_ make it a model like any other; the file does not change."""
    saved(path, mlp(8, 4))
    before = path.read_bytes()
    model = fastlinear.unfreeze(fastlinear.load(path, on_meta(lambda: mlp(8, 4)))).train().requires_grad_()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    model(X).square().sum().backward()
    optimizer.step()
    assert path.read_bytes() == before
    assert not same_tensors(model.state_dict(), fastlinear.load(path, on_meta(lambda: mlp(8, 4))).state_dict())


# ---- other machines ----


def foreign_layout(format: str) -> str:
    """A layout that this machine does not pack in."""
    layouts = [row["layout"] for row in _kernels.kernels() if row["format"] == format]
    return next(layout for layout in layouts if layout != table.layout(format))


@pytest.mark.parametrize("dtype", _tensors.FORMATS)
def test_a_foreign_layout_is_repacked(path: Path, dtype: torch.dtype) -> None:
    """It is this machine's layout afterwards, bit for bit the same weight, and the report says so."""
    layout = foreign_layout(_tensors.FORMATS[dtype])
    stock = nn.Sequential(nn.Linear(37, 70)).to(dtype).eval()
    elsewhere = copy.deepcopy(stock)
    packed = _weights.Packed(stock[0].weight.detach(), layout)
    linear.adopt(elsewhere[0], None, "off", "0", over=Frozen(packed, dtype))
    fastlinear.save(elsewhere, path)
    model = fastlinear.load(path, on_meta(lambda: nn.Sequential(nn.Linear(37, 70))))
    assert record_of(model[0]).packed.layout == table.layout(_tensors.FORMATS[dtype])
    assert torch.equal(model[0].weight, stock[0].weight)
    x = torch.randn(3, 37, dtype=dtype)
    assert torch.equal(answers(model, x), answers(OFF(stock), x))
    assert f"1 repacked from {layout}" in str(fastlinear.report(model))
    assert not is_mapped(path, record_of(model[0]).packed.data) and is_mapped(path, model[0].bias)


def test_a_file_of_a_smaller_machine(path: Path) -> None:
    """Written by a process that is held to AVX2 or less, whose panels are narrower, it gives the same weights here."""
    program = f"""
import torch, fastlinear
from torch import nn
torch.manual_seed(0)
fastlinear.save(fastlinear.convert(nn.Sequential(nn.Linear(37, 70)), tune="off"), {str(path)!r})
"""
    zygote.checked(program, FASTLINEAR_MAX_ISA="scalar")
    torch.manual_seed(0)
    stock = nn.Sequential(nn.Linear(37, 70))
    model = fastlinear.load(path, on_meta(lambda: nn.Sequential(nn.Linear(37, 70))))
    assert torch.equal(model[0].weight, stock[0].weight)
    (layer,) = split(path)[0]["__metadata__"][manifest.KEY]["layers"]
    repacked = layer["layout"] != table.layout(FP32)
    assert ("repacked from" in str(fastlinear.report(model))) == repacked


@pytest.mark.parametrize("freeze", ["before tuning", "after tuning", "never"])
def test_plans_go_with_the_file(path: Path, tuned: list[str], freeze: str) -> None:
    """A process that loads it measures nothing for what was tuned where it was saved, and does for what was not."""
    fast = fastlinear.convert(mlp(8, 24, 5).eval(), freeze=freeze == "before tuning")
    answers(fast, X)
    wanted = [chosen._replace(source="cache", table=(), speedup=None) for i in (0, 2) for chosen in fast[i].plans]
    assert len(tuned) == 2
    if freeze == "after tuning":
        fastlinear.freeze(fast)
    fastlinear.save(fast, path)
    decide.cache().clear()  # as in another process
    model = fastlinear.load(path, on_meta(lambda: mlp(8, 24, 5)))
    assert torch.equal(answers(model, X), answers(fast, X))
    assert [chosen for i in (0, 2) for chosen in model[i].plans] == wanted
    assert len(tuned) == 2
    answers(model, torch.randn(7, 8))
    assert len(tuned) == 4


def test_plans_of_another_machine_are_not_believed(path: Path, tuned: list[str]) -> None:
    """Another CPU, or another version of torch: everything is measured here."""
    fast = fastlinear.convert(mlp(8, 5).eval())
    answers(fast, X)
    for field in decide.cache().machine:
        fastlinear.save(fast, path)
        forge_metadata(path, lambda said, field=field: said["machine"].update({field: "another"}))
        decide.cache().clear()
        tuned.clear()
        answers(fastlinear.load(path, on_meta(lambda: mlp(8, 5))), X)
        assert len(tuned) == 1, field


def test_poisoned_plans_slow_nothing_but_themselves_down(path: Path, tuned: list[str]) -> None:
    """A plan is believed as one in the cache's own file is: unknown kernels and absurd numbers are measured anew."""
    fast = fastlinear.convert(mlp(8, 5).eval())
    answers(fast, X)
    poisons = [
        None,
        [],
        {"name": "fp32/avx9000/1x1"},
        {"numbers": {"threads": -1}},
        {"surprise": 1},
        {"name": "torch/linear"},
    ]
    for poison in poisons:
        fastlinear.save(fast, path)

        def spoil(said: dict[str, Any], poison: Any = poison) -> None:
            (key,) = said["plans"]
            said["plans"][key] = {**said["plans"][key], **poison} if isinstance(poison, dict) else poison

        forge_metadata(path, spoil)
        decide.cache().clear()
        tuned.clear()
        model = fastlinear.load(path, on_meta(lambda: mlp(8, 5)))
        torch.testing.assert_close(answers(model, X), answers(fast, X))
        assert len(tuned) == 1, poison


def test_torchs_own_plans_stay_behind(path: Path, tuned: list[str]) -> None:
    """A frozen layer has no weight that torch could use, so a layer that torch had won is measured anew."""
    fast = fastlinear.convert(mlp(8, 5).eval())
    answers(fast, X)
    key, chosen = next(iter(fast[0]._plans.items()))
    fast[0]._plans[key] = chosen._replace(name=rivals.BASELINE)
    fastlinear.save(fast, path)
    assert split(path)[0]["__metadata__"][manifest.KEY]["plans"] == {}


# ---- what is refused ----


def fingerprint(model: nn.Module) -> list[Any]:
    """What load might change: the objects that a model is made of."""
    parts: list[Any] = []
    for name, module in model.named_modules():
        held = (*module._parameters.items(), *module._buffers.items(), *module._modules.items())
        parts.append((name, type(module), sorted(vars(module)), [(key, id(value)) for key, value in held]))
    return parts


def refused(path: Path, model: nn.Module) -> str:
    """The message; the model is as it was."""
    before = fingerprint(model)
    with pytest.raises(FormatError) as caught:
        fastlinear.load(path, model)
    assert fingerprint(model) == before
    message = str(caught.value)
    assert message.startswith(f"'{path}' cannot be loaded: ")
    return message


@pytest.mark.parametrize("where", ["meta", "real", "converted", "frozen"])
def test_a_file_of_another_model(path: Path, where: str) -> None:
    """What is missing and what is unexpected is listed, ten names of each and the number."""
    saved(path, Model(12))

    def make() -> nn.Module:
        return nn.ModuleDict({"layers": Model(10).layers, "norm": nn.BatchNorm1d(8), "neck": mlp(*[8] * 13)}).eval()

    model = {
        "meta": lambda: on_meta(make),
        "real": make,
        "converted": lambda: OFF(make()),
        "frozen": lambda: OFF(make(), freeze=True),
    }[where]()
    message = refused(path, model)
    assert "lacks 24 tensors (neck.0.weight, neck.0.bias, neck.2.weight" in message and "and 14 more)" in message
    assert "has 10 tensors (layers.10.fc1.bias, layers.10.fc2.bias, " in message
    assert message.count("neck.") == message.count("layers.") == 10 or message.count("neck.") == 10
    assert "this ModuleDict" in message


MISFITS: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "a wider layer": (lambda: mlp(8, 17, 3), "layer '0' is 8 x 16, but Linear(in_features=8, out_features=17"),
    "a Conv1D instead": (lambda: nn.Sequential(Conv1D(16, 8), nn.ReLU(), nn.Linear(16, 3), nn.ReLU()), "'0' is 8 x 16"),
    "another activation": (
        lambda: nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 3), nn.ReLU()),
        "'0' computes relu, which this model has not got as '1'",
    ),
    "another slope": (
        lambda: nn.Sequential(nn.Linear(8, 16), nn.LeakyReLU(), nn.Linear(16, 3), nn.ReLU()),
        "'0' computes relu",
    ),
    "no activation": (
        lambda: nn.Sequential(nn.Linear(8, 16), nn.Identity(), nn.Linear(16, 3), nn.ReLU()),
        "'0' computes relu",
    ),
    "a subclass": (
        lambda: nn.Sequential(Sub(8, 16), nn.ReLU(), nn.Linear(16, 3), nn.ReLU()),
        "Sub is an nn.Linear with a forward of its own",
    ),
    "no bias": (lambda: nn.Sequential(nn.Linear(8, 16, False), nn.ReLU(), nn.Linear(16, 3), nn.ReLU()), "0.bias"),
    "unfused": (lambda: OFF(mlp(8, 16, 3).eval(), fuse=False), "'0' was fused with other activations"),
}


class Sub(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input)


@pytest.mark.parametrize("case", MISFITS)
def test_a_model_that_does_not_fit(path: Path, case: str) -> None:
    """Shapes, kinds of layers and activations that are not those of the file, on meta or not."""
    saved(path, mlp(8, 16, 3))
    make, said = MISFITS[case]
    assert said in refused(path, make().eval())
    if case != "unfused":
        assert said in refused(path, on_meta(make))


def test_square_layers_are_not_mistaken(path: Path) -> None:
    """A square Linear and a square Conv1D have the same shape, and mean different things."""
    saved(path, nn.Sequential(nn.Linear(8, 8)))
    assert "'0' is 8 x 8" in refused(path, nn.Sequential(Conv1D(8, 8)))
    saved(path, nn.Sequential(Conv1D(8, 8)))
    assert "'0' is 8 x 8" in refused(path, nn.Sequential(nn.Linear(8, 8)))
    assert "'0' is 8 x 8" in refused(path, OFF(nn.Sequential(nn.Linear(8, 8)).eval()))


def test_a_plain_safetensors_file(path: Path) -> None:
    """It is no file of ours, and said so."""
    safefile.write(path, {}, {"0.weight": torch.zeros(4, 8)}, {"format": "pt"})
    assert "not written by fastlinear.save" in refused(path, mlp(8, 4))


def lies() -> dict[str, tuple[Callable[[dict[str, Any]], object], str]]:
    """Edit of the metadata of a saved Small -> what its refusal says."""

    def layer(which: str, **fields: Any) -> Callable[[dict[str, Any]], object]:
        return lambda said: next(one for one in said["layers"] if one["name"] == which).update(fields)

    other = foreign_layout(FP32)
    cases: dict[str, tuple[Callable[[dict[str, Any]], object], str]] = {
        "a newer schema": (lambda s: s.update(schema=2, library="9.0"), "schema 2, by fastlinear '9.0'"),
        "a newer schema of another form": (lambda s: s.clear() or s.update(schema=7), "schema 7"),
        "no schema": (lambda s: s.pop("schema"), "names no schema"),
        "a schema that is true": (lambda s: s.update(schema=True), "names no schema"),
        "a field too many": (lambda s: s.update(extra=1), "has not just the fields"),
        "layers that are none": (lambda s: s.update(layers={}), "as its layers"),
        "a layer that is a list": (lambda s: s["layers"].append([]), "a layer has not just"),
        "a layer with a field too many": (layer("fc", extra=1), "a layer has not just"),
        "a layer twice": (lambda s: s["layers"].append(s["layers"][0]), "'fc' stands twice"),
        "a layer of no name": (layer("fc", name=None), "None as its name"),
        "a layer of another name": (layer("back", name="fc2"), "has 1 tensor (fc2.weight)"),
        "a larger N": (layer("fc", n=10**6), "takes 32000000 bytes"),
        "a smaller N": (layer("fc", n=8), "another bias"),
        "a negative N": (layer("fc", n=-16), "cannot be of -16 x 8"),
        "an N that is true": (layer("fc", n=True), "True as its n"),
        "an N that is 16.0": (layer("fc", n=16.0), "16.0 as its n"),
        "an N that overflows": (layer("fc", n=1 << 45, k=1 << 45), "no packed form"),
        "an N beyond all": (layer("fc", n=1 << 100), "cannot be of"),
        "a larger K": (layer("fc", k=10**6), "bytes of U8"),
        "a negative K": (layer("fc", k=-1), "cannot be of 16 x -1"),
        "a K of the same pages": (layer("fc", k=9), "'fc' is 9 x 16"),
        "an unknown layout": (layer("fc", layout="fp32/7x3"), "'fp32/7x3', which is none of"),
        "a layout of another format": (layer("fc", layout=table.layout("bf16")), "is said to be"),
        "a layout of another size": (layer("fc", layout=other, n=3000, bias=None), "takes"),
        "an unknown format": (layer("fc", packed="fp64"), "is said to be"),
        "an unknown parameter": (layer("fc", held="int3"), "is said to be"),
        "a bias it has not": (layer("back", bias="fp32"), "another bias"),
        "no bias though it has": (layer("fc", bias=None), "another bias"),
        "a bias of another dtype": (layer("fc", held="bf16", bias="bf16"), "another bias"),
        "a bias of no dtype": (layer("fc", bias="fp64"), "cannot have a bias"),
        "an unknown activation": (layer("fc", activation=["gelu2", []]), "'gelu2' is unknown"),
        "an activation with parameters": (layer("fc", activation=["gelu", [1.0]]), "takes 0 parameters"),
        "an activation that is code": (layer("fc", activation=["__import__", []]), "unknown"),
        "an activation of lists": (layer("fc", activation=["gelu", [[]]]), "no such parameters"),
        "an activation that is a name": (layer("fc", activation="gelu"), "as its activation"),
        "a huge parameter": (layer("fc", activation=["leaky_relu", [10**400]]), "cannot be loaded"),
        "no activation, but fused": (layer("fc", activation=None), "'fc', named among its fused"),
        "transposed": (layer("back", transposed=True), "'back' is 16 x 8"),
        "transposed by name": (layer("back", transposed="no"), "'no' as its transposed"),
        "unknown sums": (layer("fc", accumulate="int1"), "'int1'"),
        "unknown tuning": (layer("fc", tune="hard"), "'hard'"),
        "panels that are not there": (layer("fc", panels="nowhere"), "'nowhere', named among its panels"),
        "panels that are plain": (layer("fc", panels="norm.weight"), "bytes of U8"),
        "panels of another layer": (layer("back", panels="fc.packed"), "another form"),
        "packed bytes that nobody has": (lambda s: s["layers"].pop(), "head.packed"),
        "fused with nobody": (lambda s: s["fused"][0].update(layer="nobody"), "'nobody'"),
        "fused elsewhere": (lambda s: s["fused"][0].update(slot="norm"), "not got as 'norm'"),
        "fused in a module that is not there": (lambda s: s["fused"][0].update(holder="x"), "not got as 'x.act'"),
        "fused twice": (lambda s: s["fused"].append(s["fused"][0]), "stands twice"),
        "fused by number": (lambda s: s["fused"][0].update(slot=1), "1 as its slot"),
        "not fused": (lambda s: s["fused"].clear(), "built as a FastLinear"),
        "tied to nothing": (lambda s: s["ties"].update({"head.weight": "nothing"}), "'nothing'"),
        "tied to itself": (lambda s: s["ties"].update({"embed.weight": "embed.weight"}), "both stored and tied"),
        "tied to a pack": (lambda s: s["ties"].update({"head.weight": "fc.packed"}), "'fc.packed'"),
        "tied to another shape": (lambda s: s["ties"].update({"head.weight": "norm.weight"}), "unpacked in another"),
        "a tie beyond the model": (lambda s: s["ties"].update({"more": "norm.weight"}), "(more)"),
        "a tie to a number": (lambda s: s["ties"].update({"more": 1}), "1 where"),
        "transient, but not there": (lambda s: s["transient"].append("x"), "'x'"),
        "transient numbers": (lambda s: s["transient"].append(1), "1 where"),
        "a machine that is a list": (lambda s: s.update(machine=[]), "as its machine"),
        "plans that are a list": (lambda s: s.update(plans=[]), "as its plans"),
        "a library that is a number": (lambda s: s.update(library=1), "as its library"),
    }
    return cases


@pytest.mark.parametrize("case", lies())
def test_metadata_that_lie_are_refused(path: Path, case: str) -> None:
    """Whatever the file says of its model is held against its entries and the model, before one thing is changed."""
    saved(path, Small())
    edit, said = lies()[case]
    forge_metadata(path, edit)
    message = refused(path, on_meta(Small))
    assert said in message
    assert len(message) < 500


def test_metadata_that_are_no_json(path: Path) -> None:
    """Other text, deep nesting, a field that stands twice."""
    saved(path, Small())
    contents = safefile.read(path)
    good = contents.metadata[manifest.KEY]
    for text in ("", "nothing", "[" * 50_000, good[:-1] + ', "schema": 1}', "[]", "NaN"):
        safefile.write(path, {}, {}, {manifest.KEY: text})
        refused(path, on_meta(Small))


def test_arguments(path: Path) -> None:
    """What is no module, and what no file can hold, is named; no file appears."""
    with pytest.raises(TypeError, match=r"save\(\) takes an nn.Module, but was given dict"):
        fastlinear.save({}, path)
    with pytest.raises(TypeError, match=r"load\(\) takes an nn.Module, but was given str"):
        fastlinear.load(path, "model")
    with pytest.raises(FileNotFoundError):
        fastlinear.load(path, mlp(8, 4))
    with pytest.raises(TypeError, match=r"'0.weight' cannot be saved: it is a Parameter on device meta"):
        fastlinear.save(on_meta(lambda: mlp(8, 4)), path)

    class Stateful(nn.Linear):
        def get_extra_state(self) -> object:
            return {"steps": 3}

        def set_extra_state(self, state: object) -> None:
            pass

    with pytest.raises(TypeError, match=r"'0' cannot be saved: a Stateful has extra state"):
        fastlinear.save(nn.Sequential(Stateful(2, 2)), path)
    odd = nn.Module()
    for tensor in (
        torch.eye(3).to_sparse(),
        Special(torch.ones(2)),
        torch.nested.nested_tensor([torch.ones(2)], layout=torch.jagged),
    ):
        odd.register_buffer("odd", tensor)
        with pytest.raises(TypeError, match=r"'odd' cannot be saved"):
            fastlinear.save(odd, path)
    odd.register_buffer("odd", torch.zeros(2, dtype=torch.complex128))
    with pytest.raises(TypeError, match=r"'odd' is torch.complex128"):
        fastlinear.save(odd, path)
    assert not os.listdir(path.parent)


class Special(torch.Tensor):
    pass


def test_nothing_is_half_loaded_when_memory_ends(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All that can fail, repacking included, comes before the first change."""
    saved(path, Small())
    model = on_meta(Small)
    before = fingerprint(model)

    def over(*_: object) -> Any:
        raise MemoryError

    other = foreign_layout(FP32)
    monkeypatch.setattr(table, "layout", lambda _: other)
    monkeypatch.setattr(_weights, "Packed", type("Packed", (), {"over": staticmethod(over)}))
    with pytest.raises(MemoryError):
        fastlinear.load(path, model)
    assert fingerprint(model) == before


# ---- real models ----


def tiny(name: str) -> tuple[Callable[[], nn.Module], dict[str, Tensor]]:
    """A model of transformers with random weights, and what to call it with."""
    import transformers

    ids = torch.tensor([[3, 5, 7, 9], [2, 4, 6, 8]])
    common = {
        "vocab_size": 32,
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
    }
    if name == "bert":
        config: Any = transformers.BertConfig(**common)
        return lambda: transformers.BertModel(config), {"input_ids": ids}
    if name == "gpt2":
        config = transformers.GPT2Config(vocab_size=32, n_embd=16, n_layer=2, n_head=2, n_positions=16)
        return lambda: transformers.GPT2LMHeadModel(config), {"input_ids": ids}
    if name == "llama":
        config = transformers.LlamaConfig(**common, num_key_value_heads=2)
        return lambda: transformers.LlamaForCausalLM(config), {"input_ids": ids}
    config = transformers.T5Config(vocab_size=32, d_model=16, d_ff=24, num_layers=2, num_heads=2, d_kv=8)
    return lambda: transformers.T5ForConditionalGeneration(config), {"input_ids": ids, "decoder_input_ids": ids}


@pytest.mark.parametrize("name", ["bert", "gpt2", "llama", "t5"])
def test_models_of_transformers(path: Path, name: str) -> None:
    """Built on meta, loaded, and the same to the bit: fused activations, tied heads, position buffers and all."""
    make, example = tiny(name)
    stock = make().eval()
    fast = OFF(stock, freeze=True)
    fastlinear.save(fast, path)
    model = fastlinear.load(path, on_meta(make))
    with torch.inference_mode():
        wanted, found = fast(**example)[0], model(**example)[0]
    assert torch.equal(found, wanted)
    assert same_tensors(model.state_dict(), stock.state_dict())
    absorbed = [sum(isinstance(module, fusion.Absorbed) for module in m.modules()) for m in (fast, model)]
    assert absorbed[0] == absorbed[1]
    assert len({id(p) for p in model.parameters()}) == len({id(p) for p in fast.parameters()})
