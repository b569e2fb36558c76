"""save, load and inspect of int8 models: the same bits on every machine, and no lie is believed."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from forge import forge_metadata, join, on_meta, split
from layer.test_int8_layers import (
    KINDS,
    SCHEMES,
    STATIC,
    K,
    Language,
    N,
    chained,
    every_kind,
    every_scheme,
    middles,
    theirs,
)
from models import OFF, mlp, same_tensors
from torch import Tensor, nn

import fastlinear
import fastlinear._kernels as _kernels
import fastlinear._tensors as _tensors
import fastlinear._weights as _weights
from fastlinear import FastLinear, FormatError, Int8Dynamic, Int8Static
from fastlinear import __main__ as cli
from fastlinear.file import manifest
from fastlinear.layer import linear
from fastlinear.layer.frozen import Frozen, is_frozen, record_of
from fastlinear.plan import decide, table
from fastlinear.spec import int8
from fastlinear.spec.formats import DTYPES
from fastlinear.spec.precision import wanted


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "model.safetensors"


def answers(model: nn.Module, x: Tensor) -> Tensor:
    with torch.inference_mode():
        return model(x).clone()


def make(kind: str = "linear") -> nn.Sequential:
    return nn.Sequential(KINDS[kind](K, N), nn.ReLU()).eval()


def saved(path: Path, scheme: str, kind: str = "linear", **options: Any) -> Any:
    """A converted model that was saved."""
    model = make(kind)
    fast = OFF(model, quantize=SCHEMES[scheme](model, torch.randn(64, K)), **options)
    fastlinear.save(fast, path)
    return fast


def shown(layer: nn.Module) -> str:
    """All but the kernel, which a layer that has not been called since has yet to choose."""
    return re.sub("kernel=[^,]*", "", repr(layer))


@every_scheme
@every_kind
@pytest.mark.parametrize("freeze", [False, True])
@pytest.mark.parametrize("target", ["meta", "real", "converted"])
def test_the_model_comes_back(path: Path, scheme: str, kind: str, freeze: bool, target: str) -> None:
    """Same bits out, the same scheme, a weight that is what the integers stand for, whatever it is loaded into."""
    fast, x = saved(path, scheme, kind, freeze=freeze), torch.randn(5, K)
    want = answers(fast, x)
    model = {
        "meta": lambda: on_meta(lambda: make(kind)),
        "real": lambda: make(kind),
        "converted": lambda: OFF(make(kind)),
    }
    loaded = fastlinear.load(path, model[target]())
    assert torch.equal(answers(loaded, x), want) and is_frozen(loaded[0])
    assert loaded[0].precision.is_as(fast[0].precision) and shown(loaded[0]) == shown(fastlinear.freeze(fast)[0])
    assert same_tensors(loaded.state_dict(), fast.state_dict())
    if scheme in STATIC:
        u = torch.randint(0, 256, (5, K), dtype=torch.uint8)
        assert torch.equal(answers(loaded, u), answers(fast, u))
    fastlinear.save(loaded, path)
    again = fastlinear.load(path, on_meta(lambda: make(kind)))
    assert torch.equal(answers(again, x), want)


@every_scheme
def test_memory_of_a_file(path: Path, scheme: str) -> None:
    """1.02 bytes a parameter, 12 bytes a channel, what smoothing takes, and a header."""
    model = nn.Sequential(nn.Linear(512, 1024)).eval()
    fastlinear.save(OFF(model, quantize=SCHEMES[scheme](model, torch.randn(64, 512))), path)
    assert path.stat().st_size <= 1.02 * 512 * 1024 + 12 * 1024 + 4 * (512 + 1024) + 2 * 4096


def foreign_layouts(packed: str) -> list[str]:
    layouts = {row["layout"]: None for row in _kernels.kernels() if row["format"] == packed}
    return [layout for layout in layouts if layout != table.layout(packed)]


@pytest.mark.parametrize(
    "layout", [one for packed in _tensors.PACKED if packed not in DTYPES for one in foreign_layouts(packed)]
)
@pytest.mark.parametrize("zeros", [False, True])
def test_a_foreign_layout_is_repacked(path: Path, layout: str, zeros: bool) -> None:
    """It is this machine's layout afterwards, with the very integers, scales and zero points."""
    packed = layout.split("/")[0]
    if zeros and packed == "w8f":
        return  # which has none
    weight, scheme = theirs(zeros), next(s for s in Int8Dynamic.__mro__[1].__subclasses__() if s.packed == packed)()
    elsewhere = nn.Sequential(nn.Linear(K, N)).eval()
    record = Frozen(_weights.Packed(weight.values, layout, weight.scale, weight.zero), torch.float32)
    linear.adopt(elsewhere[0], None, "off", "0", wanted(quantize=scheme).of("0", torch.float32), over=record)
    fastlinear.save(elsewhere, path)
    model = fastlinear.load(path, on_meta(lambda: nn.Sequential(nn.Linear(K, N))))
    pack = record_of(model[0]).packed
    assert pack.layout == table.layout(packed) and torch.equal(pack.unpack(), weight.values)
    assert torch.equal(pack.scale, weight.scale)
    assert pack.zero is None if weight.zero is None else torch.equal(pack.zero, weight.zero)
    assert f"1 repacked from {layout}" in str(fastlinear.report(model))
    x = torch.randn(3, K)
    want = int8.linear(x, weight, scheme.rows(""), elsewhere[0].bias)
    torch.testing.assert_close(answers(model, x), want, rtol=0, atol=0 if scheme.rows("") else 1e-4)


@pytest.mark.parametrize("zeros", [False, True])
def test_weights_of_others(path: Path, zeros: bool) -> None:
    """A layer over somebody else's integers, in fp32 and bf16."""
    weight, x = theirs(zeros), torch.randn(5, K)
    for dtype in (torch.float32, torch.bfloat16):
        bias = torch.randn(N, dtype=dtype)
        layer = FastLinear.from_quantized(weight.values, weight.scale, weight.zero, bias, "gelu", dtype=dtype).eval()
        model = nn.Sequential(layer)
        fastlinear.save(model, path)
        loaded = fastlinear.load(path, nn.Sequential(FastLinear(K, N, activation="gelu", dtype=dtype)).eval())
        assert torch.equal(answers(loaded, x), answers(model, x)) and loaded[0].weight.dtype == dtype
        assert torch.equal(loaded[0].weight, layer.weight)


def test_chains_come_back(path: Path) -> None:
    """The middle tensor of a chain is integers after loading, too."""
    model, x = mlp(K, N, 8).eval(), torch.randn(64, K)
    fast = chained(model, x)
    fastlinear.save(fast, path)
    loaded = fastlinear.load(path, on_meta(lambda: mlp(K, N, 8)))
    assert middles(loaded, x) == [torch.uint8, torch.float32]
    assert torch.equal(answers(loaded, x), answers(fast, x))


def test_tied_weights_that_were_included(path: Path) -> None:
    """A weight that an embedding uses is stored plain beside its integers, and both come back."""
    model = Language().eval()
    fast = OFF(model, quantize=SCHEMES["dynamic"](model, torch.ones(1)), include="*")
    fastlinear.save(fast, path)
    loaded = fastlinear.load(path, on_meta(Language))
    x = torch.randn(5, 8)
    assert loaded.out.weight is loaded.embed.weight and torch.equal(loaded.out.weight, model.embed.weight)
    assert torch.equal(answers(loaded.out, x), answers(fast.out, x)) and loaded.out._engine.packed.format == "int8"


def test_plans_go_with_the_file(path: Path, tuned: list[str]) -> None:
    """A process that loads it measures nothing for what was tuned where it was saved; one with another scheme does."""
    model, x = make(), torch.randn(5, K)
    for scheme in ("dynamic", "asymmetric", "smoothed", "static u8", "weight-only"):
        fast = fastlinear.convert(model, quantize=SCHEMES[scheme](model, torch.randn(64, K)))
        want = answers(fast, x)
        fastlinear.save(fast, path)
        decide.cache().clear()  # as in another process
        tuned.clear()
        loaded = fastlinear.load(path, on_meta(make))
        assert torch.equal(answers(loaded, x), want) and not tuned


def test_files_of_floats_are_as_before(path: Path) -> None:
    """Models without int8 are written as versions without it read them."""
    fastlinear.save(OFF(mlp(8, 16).eval()), path)
    (layer,) = split(path)[0]["__metadata__"][manifest.KEY]["layers"]
    assert "quantized" not in layer and manifest.SCHEMA == 1


def test_a_name_that_is_taken(path: Path) -> None:
    """A buffer that is called as a layer's smoothing would be is an error, not another tensor."""
    model = make()
    model[0].register_buffer("smooth", torch.ones(3))
    fast = OFF(model, quantize=SCHEMES["smoothed"](model, torch.randn(64, K)))
    with pytest.raises(ValueError, match=r"two tensors of the file would be called '0\.smooth'"):
        fastlinear.save(fast, path)


# ---- lies ----


def lies() -> dict[str, tuple[Callable[[dict[str, Any]], object], str]]:
    """Edit of what the file says of its only layer, smoothed and static -> what its refusal says."""

    def quantized(**fields: Any) -> Callable[[dict[str, Any]], object]:
        return lambda layer: layer["quantized"].update(fields)

    return {
        "no quantization": (lambda s: s.pop("quantized"), "packed in int8, and quantized by None"),
        "null": (lambda s: s.update(quantized=None), "None as its quantized"),
        "a list": (lambda s: s.update(quantized=[]), "[] as its quantized"),
        "a field too many": (quantized(more=1), "not just rows, out, smooth"),
        "a field too few": (lambda s: s["quantized"].pop("out"), "not just rows, out, smooth"),
        "an unknown kind": (quantized(rows=["wild", 1.0, 0]), "cannot have rows that are quantized"),
        "rows of nothing": (quantized(rows=[]), "no list of a name, a scale and a zero"),
        "rows of code": (quantized(rows="static"), "no list of a name"),
        "a scale of 0": (quantized(rows=["static", 0.0, 0]), "a scale above 0"),
        "a negative scale": (quantized(rows=["static", -1.0, 0]), "a scale above 0"),
        "a scale that is none": (quantized(rows=["static", float("nan"), 0]), "a scale above 0"),
        "an infinite scale": (quantized(rows=["static", float("inf"), 0]), "a scale above 0"),
        "a scale beyond fp32": (quantized(rows=["static", 1e300, 0]), "cannot be"),
        "a whole scale": (quantized(rows=["static", 1, 0]), "no list of a name"),
        "a zero beyond bytes": (quantized(rows=["static", 1.0, 256]), "a zero from 0 to 255"),
        "a zero below bytes": (quantized(rows=["static", 1.0, -1]), "a zero from 0 to 255"),
        "a zero that is true": (quantized(rows=["static", 1.0, True]), "no list of a name"),
        "an output of floats": (quantized(out=["fp16", 1.0, 0]), "cannot quantize its output to 'fp16'"),
        "an output without scale": (quantized(out=["uint8", 0.0, 0]), "cannot be quantized as it says: out is"),
        "an output beyond bytes": (quantized(out=["int8", 1.0, 300]), "cannot be quantized as it says: out is"),
        "a smoothing that is not there": (quantized(smooth="nowhere"), "'nowhere', which is no F32"),
        "a smoothing that is a bias": (quantized(smooth="0.bias"), "'0.bias', which is no F32 of 37"),
        "a smoothing that is a number": (quantized(smooth=1), "not just"),
        "no smoothing though it has": (quantized(smooth=None), "0.smooth"),
        "floats": (
            lambda s: s.update(packed="fp32", layout=table.layout("fp32")),
            "packed in fp32, and quantized by",
        ),
        "weight-only": (lambda s: s.update(packed="w8f", layout=table.layout("w8f")), "packed in w8f, and"),
        "too many columns": (lambda s: s.update(k=_weights.dot_limit() + 1), "that a sum of integers holds"),
    }


def refused(path: Path) -> str:
    model = on_meta(make)
    with pytest.raises(FormatError) as error:
        fastlinear.load(path, model)
    assert not linear.is_fast(model[0])
    return str(error.value)


@pytest.mark.parametrize("case", lies())
def test_metadata_that_lie_are_refused(path: Path, case: str) -> None:
    """Whatever the file says of its integers is held against what the kernels take, before anything is changed."""
    saved(path, "static, smoothed")
    edit, said = lies()[case]
    forge_metadata(path, lambda header: edit(header["layers"][0]))
    message = refused(path)
    assert said in message and len(message) < 500


def test_weights_that_lie_are_refused(path: Path) -> None:
    """Scales that are no scales, and zero points beyond int8."""
    for scale, zero, said in (
        (torch.full((N,), torch.nan), None, "scales that are negative or not finite"),
        (torch.full((N,), -1.0), None, "scales that are negative or not finite"),
        (torch.ones(N), torch.full((N,), 1000, dtype=torch.int32), "zero points beyond int8"),
    ):
        weight = theirs(True)
        layer = FastLinear.from_quantized(weight.values, weight.scale, weight.zero)
        fastlinear.save(nn.Sequential(layer), path)
        header, data = split(path)
        for true, lie in ((weight.scale, scale), (weight.zero, zero)):
            if lie is not None:
                old, new = (t.numpy().tobytes() for t in (true, lie))
                assert data.count(old) == 1
                data = data.replace(old, new)
        join(path, header, data)
        with pytest.raises(FormatError, match=said):
            fastlinear.load(path, nn.Sequential(FastLinear(K, N, bias=False)))


def test_inspect(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """What a file of int8 holds is told from its header."""
    saved(path, "static, smoothed")
    assert cli.main(["inspect", str(path)]) == 0
    text = capsys.readouterr().out
    assert f"fp32 as int8 static {table.layout('int8')}" in " ".join(text.split()) and "other tensors: 1 " in text


def test_static_files_need_no_calibration(path: Path) -> None:
    """What is loaded runs with the ranges of the file, and refuses to be quantized otherwise while it is frozen."""
    saved(path, "static u8")
    loaded = fastlinear.load(path, on_meta(make))
    with pytest.warns(UserWarning, match="frozen in another precision"):
        OFF(loaded, quantize=Int8Dynamic(), inplace=True)
    assert loaded[0]._precision.rows.kind == "static" and Int8Static.packed == loaded[0].packed_as
