"""What was written or pickled for the flat package of version 0.1 keeps working."""

import importlib
import importlib.metadata
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from forge import forge_metadata
from torch import nn

import fastlinear
from fastlinear._moved import _MOVED
from fastlinear.spec.formats import FORMERLY
from fastlinear.spec.packed import numbers


@pytest.mark.parametrize("old", _MOVED)
def test_old_modules_are_the_new_ones(old: str) -> None:
    """An old import path gives the very module that has the place now, so that classes are the same objects."""
    new = importlib.import_module(f"fastlinear.{_MOVED[old]}")
    assert importlib.import_module(f"fastlinear.{old}") is new


@pytest.mark.parametrize(
    ("module", "name"),
    [
        ("linear", "FastLinear"),
        ("activations", "Activation"),
        ("precision", "Precision"),
        ("quantize", "Rows"),
        ("quantize", "Requantize"),
        ("schemes", "Calibration"),
        ("schemes", "Observed"),
        ("frozen", "Frozen"),
        ("frozen", "_packed_again"),
        ("fusion", "Absorbed"),
        ("header", "FormatError"),
        ("candidates", "Chosen"),
    ],
)
def test_old_pickles_find_their_classes(module: str, name: str) -> None:
    """A pickle names module and class; those of version 0.1 are found."""
    found = pickle.loads(f"cfastlinear.{module}\n{name}\n.".encode())
    assert found.__name__ == name
    assert found.__module__ == f"fastlinear.{_MOVED[module]}"


W8F = [name for name in FORMERLY if FORMERLY[name] == "w8f"]


def weight_only() -> nn.Sequential:
    torch.manual_seed(0)
    return fastlinear.convert(nn.Sequential(nn.Linear(24, 16)).eval(), quantize=fastlinear.Int8WeightOnly(), tune="off")


@pytest.mark.parametrize("old", W8F)
@torch.no_grad()
def test_files_with_a_former_name_of_a_format(old: str, tmp_path: Path) -> None:
    """They load, and what they hold answers the same bits."""
    model, x, path = weight_only(), torch.randn(3, 24), tmp_path / "m.safetensors"
    fastlinear.save(model, path)

    def rename(header: dict[str, Any]) -> None:
        layer = header["layers"][0]
        layer.update(packed=old, layout=layer["layout"].replace("w8f", old))

    forge_metadata(path, rename)
    loaded = fastlinear.load(path, nn.Sequential(nn.Linear(24, 16)).eval())
    assert loaded[0].packed_as == "w8f" and torch.equal(loaded(x), model(x))


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("old", W8F)
@torch.no_grad()
def test_pickles_with_a_former_name_of_a_format(old: str, frozen: bool) -> None:
    """They answer the same bits as what was pickled: layers, frozen ones, and experts."""
    gate = fastlinear.FastExperts(2, 24, 16, quantize=fastlinear.Int8WeightOnly()).eval()
    x, routed = torch.randn(3, 24), (torch.tensor([[0], [1], [0]]), torch.ones(3, 1))
    for model, inputs in ((weight_only()[0], (x,)), (gate, (x, *routed))):
        want = model(*inputs)
        if frozen:
            fastlinear.freeze(model)
        # protocol 3 has no frames, whose lengths would be wrong; a string is X, its length and its bytes
        new = pickle.dumps(model, 3).replace(b"X\x03\0\0\0w8f", b"X\x06\0\0\0" + old.encode())
        assert old.encode() in new and len(old) == 6
        again = pickle.loads(new)
        assert again.packed_as == "w8f" and torch.equal(again(*inputs), want)


@pytest.mark.parametrize("old", W8F)
@torch.no_grad()
def test_programs_with_a_former_name_of_a_format(old: str) -> None:
    """An exported program has it among the arguments of the op, or of the one that unpacks."""
    (layer,), x = weight_only(), torch.randn(3, 24)
    want = layer(x)
    arguments = (x, layer.weight, layer.bias, "identity", [], False)
    for name in (old, "w8f"):
        assert torch.equal(torch.ops.fastlinear.linear(*arguments, name), want)
    packed = layer._engine.packed
    unpack, sizes = torch.ops.fastlinear.unpack, (packed.n, packed.k)
    assert torch.equal(unpack(packed.data, packed.layout.replace("w8f", old), *sizes), numbers(packed))


def test_the_front_door_shows_public_names_only() -> None:
    """`dir(fastlinear)` is what is documented, and the version is the installed one."""
    assert {*dir(fastlinear)} == {*fastlinear.__all__, "__version__"}
    assert fastlinear.__version__ == importlib.metadata.version("fastlinear")
