"""Which layers convert takes, and what it says about the others and about bad arguments."""

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from models import OFF, Block, Model, fast_names, mlp
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune

import fastlinear
from fastlinear.layer import linear

ALL = {f"layers.{i}.fc{j}" for i in range(11) for j in (1, 2)} | {"head"}
FC1 = {name for name in ALL if name.endswith("fc1")}
SELECTIONS: dict[str, tuple[dict[str, Any], set[str]]] = {
    "nothing said": ({}, ALL),
    "include a name": ({"include": "layers.1.fc1"}, {"layers.1.fc1"}),
    "include a container": ({"include": "layers.1"}, {"layers.1.fc1", "layers.1.fc2"}),
    "include a glob": ({"include": "layers.*.fc1"}, FC1),
    "include a glob in front": ({"include": "*.fc1"}, FC1),
    "include a list": ({"include": ["head", "*.fc1"]}, FC1 | {"head"}),
    "include a type": ({"include": nn.Linear}, ALL),
    "include a container's type": ({"include": Block}, ALL - {"head"}),
    "include an iterator": ({"include": iter(["head"])}, {"head"}),
    "exclude a name": ({"exclude": "head"}, ALL - {"head"}),
    "exclude a container": ({"exclude": "layers.1"}, ALL - {"layers.1.fc1", "layers.1.fc2"}),
    "exclude types": ({"exclude": (Block,)}, {"head"}),
    "exclude wins": ({"include": ["layers.1", "head"], "exclude": "*.fc2"}, {"layers.1.fc1", "head"}),
    "filter": ({"filter_fn": lambda module, name: module.in_features == 8 and name != "head"}, FC1),
    "filter after exclude": ({"filter_fn": lambda module, name: True, "exclude": "layers"}, {"head"}),
}


@pytest.mark.parametrize(("arguments", "expected"), SELECTIONS.values(), ids=SELECTIONS.keys())
def test_selection(arguments: dict[str, Any], expected: set[str]) -> None:
    """include, exclude and filter_fn each choose exactly the layers they mean: "layers.1" is not "layers.10"."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert fast_names(OFF(Model(), **arguments)) == expected


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"include": ["head", "layer.1"]}, r"include='layer.1' matches no linear layer of Model.*'layers.0.fc1'"),
        ({"exclude": ["head", "fc1"]}, r"exclude='fc1' matches no linear layer of Model"),
        ({"exclude": nn.LSTM}, r"exclude=LSTM matches no linear layer of Model"),
        ({"exclude": "layers.1."}, r"exclude='layers.1.' matches no"),
        ({"exclude": "norm"}, r"exclude='norm' matches no"),
        ({"exclude": "*"}, r"nothing to convert in Model: excluded by '\*'"),
        ({"filter_fn": lambda *_: False}, r"nothing to convert in Model: refused by filter_fn"),
    ],
)
def test_warnings(arguments: dict[str, Any], message: str) -> None:
    """A pattern that matches nothing, and a model with nothing to convert, warn at the caller's line."""
    with pytest.warns(UserWarning, match=message) as caught:
        OFF(Model(), **arguments)
    assert caught[0].filename == __file__


def test_no_linear_layer_warns() -> None:
    """A model without linear layers comes back as it is, with a warning."""
    with pytest.warns(UserWarning, match="nothing to convert in ReLU") as told:
        OFF(nn.ReLU(), freeze=True)
    assert len(told) == 1  # and not of nothing to freeze, too
    with pytest.warns(UserWarning, match="nothing to convert in Conv2d: it has no linear layer"):
        OFF(nn.Conv2d(1, 1, 1))


class Language(nn.Module):
    """An output layer that shares its weight with an embedding, one called lm_head, and layers that may be rounded."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.out = nn.Embedding(8, 8), nn.Linear(8, 8, bias=False)
        self.out.weight = self.embed.weight
        self.body = nn.Sequential(nn.Linear(8, 8), nn.ReLU())
        self.decoder = nn.ModuleDict({"lm_head": nn.Linear(8, 8), "my_lm_head": nn.Linear(8, 8)})
        self.twice = nn.ModuleList([nn.Linear(8, 8), nn.Linear(8, 8)])
        self.twice[1].weight = self.twice[0].weight


SAFE, TWICE = {"body.0", "decoder.my_lm_head"}, {"twice.0", "twice.1"}
LOSSY: dict[str, tuple[dict[str, Any], set[str]]] = {
    "nothing said": ({}, SAFE),
    "by name": ({"include": ["out", "body"]}, {"out", "body.0"}),
    "by a glob": ({"include": "*"}, SAFE | {"out", "decoder.lm_head", *TWICE}),
    "by its container": ({"include": "decoder"}, {"decoder.my_lm_head", "decoder.lm_head"}),
    "by type": ({"include": nn.Linear, "exclude": "out"}, SAFE | {"decoder.lm_head", *TWICE}),
    "exclude wins": ({"include": "*", "exclude": ["out", "decoder.lm_head", "twice"]}, SAFE),
    "filter_fn alone does not include": ({"filter_fn": lambda module, name: True}, SAFE),
}


@pytest.mark.parametrize(("arguments", "expected"), LOSSY.values(), ids=LOSSY.keys())
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_what_is_not_rounded_unasked(arguments: dict[str, Any], expected: set[str], dtype: torch.dtype) -> None:
    """Packing another dtype than the parameter's passes over tied weights and lm_heads that include does not match."""
    fast = OFF(Language(), dtype=dtype, **arguments)
    assert fast_names(fast) == expected
    assert fast.out.weight is fast.embed.weight


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_report_says_how_to_round(dtype: torch.dtype) -> None:
    """The reason names the other use of the weight, and include; convert without a dtype takes them as they are."""
    model = Language()
    fast = OFF(model, dtype=dtype)
    reasons = {row.name: row.reason for row in fastlinear.report(fast)}
    assert all(word in (reasons["out"] or "") for word in ("embed.weight", "out.weight", str(dtype), "include"))
    assert all(word in (reasons["twice.0"] or "") for word in ("twice.0.weight", "twice.1.weight", "include"))
    assert all(word in (reasons["decoder.lm_head"] or "") for word in ("lm_head", str(dtype), "include"))
    assert reasons["body.0"] is None
    rest = OFF(fast)
    assert [row.dtype for row in fastlinear.report(rest) if row.name in ("out", "body.0")] == [
        "float32",
        f"float32 as {str(dtype).removeprefix('torch.')}",
    ]
    assert fast_names(OFF(Language().to(dtype), dtype=dtype)) == fast_names(OFF(Language()))


def test_nothing_to_round_warns() -> None:
    """A model that is nothing but an lm_head is left alone, with the reason in the warning."""
    with pytest.warns(UserWarning, match=r"nothing to convert in ModuleDict: .*lm_head.*include"):
        OFF(nn.ModuleDict({"lm_head": nn.Linear(8, 8)}), dtype=torch.bfloat16)


def _linear_in(**attributes: Any) -> nn.Module:
    layer = nn.Linear(8, 8)
    for name, value in attributes.items():
        setattr(layer, name, value)
    return layer


class Subclass(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input)


UNFIT: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "subclass": (lambda: Subclass(8, 8), "Subclass"),
    "parametrized": (lambda: parametrizations.weight_norm(nn.Linear(8, 8)), "parametrization"),
    "pruned": (lambda: prune.l1_unstructured(nn.Linear(8, 8), "weight", 0.5), "hook"),
    "old weight norm": (lambda: torch.nn.utils.weight_norm(nn.Linear(8, 8)), "hook"),
    "lazy": (lambda: nn.LazyLinear(8), "first call"),
    "meta": (lambda: nn.Linear(8, 8, device="meta"), "meta"),
    "double": (lambda: nn.Linear(8, 8).double(), "float64"),
    "bias of another dtype": (lambda: _linear_in(bias=nn.Parameter(torch.zeros(8).half())), "float16"),
    "three dimensions": (lambda: _linear_in(weight=nn.Parameter(torch.zeros(2, 8, 8))), "3 dimensions"),
    "attention": (lambda: nn.MultiheadAttention(8, 2, kdim=4), "widths of their own"),
}


@pytest.mark.parametrize(("make", "reason"), UNFIT.values(), ids=UNFIT.keys())
@pytest.mark.filterwarnings("ignore:.*weight_norm.*deprecated:FutureWarning")
@pytest.mark.parametrize("inplace", [False, True])
def test_unfit_layers_are_left_alone(make: Callable[[], nn.Module], reason: str, inplace: bool) -> None:
    """A layer that the kernels cannot take over is skipped, with a reason in the report; its neighbor is converted."""
    fast = OFF(nn.Sequential(make(), nn.Linear(8, 8)), inplace=inplace)
    assert fast_names(fast) == {"1"}
    (skipped,) = (layer for layer in fastlinear.report(fast) if layer.decision == "skipped")
    assert skipped.reason is not None
    with pytest.warns(UserWarning, match=f"nothing to convert in .*({reason})"):
        OFF(make(), inplace=inplace)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"model": "bert"}, TypeError, r"convert\(\) takes an nn.Module, but was given str"),
        ({"include": 3}, TypeError, "include takes names, globs and nn.Module types, but was given 3"),
        ({"exclude": ["head", int]}, TypeError, "exclude takes .* but was given <class 'int'>"),
        ({"filter_fn": "head"}, TypeError, "filter_fn must be a function .* 'head'"),
        ({"fuse": None}, TypeError, "fuse must be True or False, but is None"),
        ({"inplace": 1}, TypeError, "inplace must be True or False, but is 1"),
        ({"tune": "never"}, ValueError, "tune must be one of 'lazy', 'now', 'off', but is 'never'"),
        ({"tune": "now"}, ValueError, "needs example_inputs"),
        ({"example_inputs": torch.zeros(1, 8)}, ValueError, "tune is 'lazy'"),
        ({"tune": "now", "example_inputs": [1]}, TypeError, "the example must be a tensor, .* list"),
        ({"filter_fn": lambda *_: 1 / 0}, ZeroDivisionError, "division"),
    ],
)
def test_bad_arguments(arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    """Each is one clear error, raised before anything has changed."""
    model = mlp(8, 8)
    before = str(model)
    with pytest.raises(error, match=message):
        fastlinear.convert(**{"model": model, "inplace": True, **arguments})
    assert str(model) == before


@pytest.mark.parametrize("function", [fastlinear.unconvert, fastlinear.refresh, fastlinear.report])
def test_verbs_want_a_module(function: Callable[[Any], Any]) -> None:
    """The other verbs refuse what is no module by name."""
    with pytest.raises(TypeError, match=rf"{function.__name__}\(\) takes an nn.Module, but was given int"):
        function(3)


@pytest.mark.parametrize("failing", [1, 2, 3])
def test_a_failure_in_the_middle_is_undone(failing: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """When a layer fails while a model is converted in place, those before it are stock again, activations too."""
    model = nn.Sequential(mlp(8, 8, 8, 8), nn.TransformerEncoderLayer(8, 2, 16, batch_first=True))
    before, attributes = str(model), [dict(vars(module)) for module in model.modules()]
    calls, adopt = iter(range(1, 99)), linear.adopt

    def breaks(*arguments: Any, **options: Any) -> None:
        if next(calls) == failing:
            raise MemoryError("no more")
        adopt(*arguments, **options)

    monkeypatch.setattr(linear, "adopt", breaks)
    with pytest.raises(MemoryError):
        OFF(model, inplace=True)
    assert str(model) == before and [dict(vars(module)) for module in model.modules()] == attributes


def test_a_failing_example_is_undone() -> None:
    """tune="now" with an example that the model refuses leaves a model in place as it was."""
    model = nn.Sequential(mlp(8, 8), nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)).eval()
    before, attributes = str(model), [dict(vars(module)) for module in model.modules()]
    with pytest.raises(RuntimeError):
        fastlinear.convert(model, inplace=True, tune="now", example_inputs=torch.zeros(3, 9))
    assert str(model) == before and [dict(vars(module)) for module in model.modules()] == attributes
