"""The names, parameters and meanings of the activations, and what is recognized as one."""

import functools
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from transformers.activations import QuickGELUActivation, ReLUSquaredActivation

import fastlinear._kernels as _kernels
from fastlinear.spec import activations
from fastlinear.spec.activations import Activation, apply, recognize, resolve

# name -> (torch's module with other than default parameters where it has some, those parameters, the default ones)
MODULES: dict[str, tuple[nn.Module, tuple[float, ...], tuple[float, ...]]] = {
    "relu": (nn.ReLU(), (), ()),
    "relu6": (nn.ReLU6(), (), ()),
    "gelu": (nn.GELU(), (), ()),
    "gelu_tanh": (nn.GELU(approximate="tanh"), (), ()),
    "quick_gelu": (QuickGELUActivation(), (), ()),
    "silu": (nn.SiLU(), (), ()),
    "sigmoid": (nn.Sigmoid(), (), ()),
    "tanh": (nn.Tanh(), (), ()),
    "hardswish": (nn.Hardswish(), (), ()),
    "hardsigmoid": (nn.Hardsigmoid(), (), ()),
    "hardtanh": (nn.Hardtanh(-0.5, 2.0), (-0.5, 2.0), (-1.0, 1.0)),
    "leaky_relu": (nn.LeakyReLU(0.3), (0.3,), (0.01,)),
    "elu": (nn.ELU(0.7), (0.7,), (1.0,)),
    "softplus": (nn.Softplus(2.0, 10.0), (2.0, 10.0), (1.0, 20.0)),
    "mish": (nn.Mish(), (), ()),
    "relu2": (ReLUSquaredActivation(), (), ()),
}


def test_names_and_defaults_are_those_of_the_kernels() -> None:
    """Specification and native epilogues list the same activations with the same default parameters."""
    native = {name: pytest.approx(params) for name, params in _kernels.activations().items() if name != "identity"}
    assert {name: resolve(name).params for name in activations.names()} == native  # type: ignore[union-attr]
    assert set(activations.names()) == set(MODULES)


@pytest.mark.parametrize("name", activations.names())
def test_means_what_torch_means(name: str) -> None:
    """A module, a name with parameters, and an Activation resolve to the same, which computes what the module does."""
    module, params, defaults = MODULES[name]
    y = torch.randn(1000) * 8
    assert resolve(name) == Activation(name, defaults)
    assert resolve(module) == resolve((name, *params)) == resolve(Activation(name, params)) == Activation(name, params)
    assert torch.equal(apply(resolve(module), y), module(y))


@pytest.mark.parametrize(
    ("function", "name"),
    [
        (F.relu, "relu"), (torch.relu, "relu"), (F.gelu, "gelu"), (torch.tanh, "tanh"), (F.tanh, "tanh"),
        (torch.sigmoid, "sigmoid"), (F.silu, "silu"), (F.leaky_relu, "leaky_relu"), (F.hardtanh, "hardtanh"),
        (F.elu, "elu"), (F.softplus, "softplus"), (functools.partial(F.gelu, approximate="tanh"), "gelu_tanh"),
    ],
)  # fmt: skip
def test_functions(function: Any, name: str) -> None:
    """torch's functions mean the activation with its default parameters."""
    assert resolve(function) == resolve(name)


def test_none_is_no_activation() -> None:
    """None resolves to None, and applying it returns the very tensor."""
    y = torch.randn(3)
    assert resolve(None) is None and apply(None, y) is y


class _Shifted(nn.ReLU):
    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return super().forward(input) + 1


def _with(module: nn.Module, **attributes: Any) -> nn.Module:
    vars(module).update(attributes)
    return module


def _hooked(method: str) -> nn.Module:
    module = nn.ReLU()
    getattr(module, method)(lambda *_: None)
    return module


UNCERTAIN = {
    "subclass": _Shifted(),
    "forward replaced": _with(nn.ReLU(), forward=torch.neg),
    "forward hook": _hooked("register_forward_hook"),
    "forward pre-hook": _hooked("register_forward_pre_hook"),
    "backward hook": _hooked("register_full_backward_hook"),
    "random while training": nn.RReLU(),
    "learned": nn.PReLU(),
    "not elementwise": nn.Softmax(-1),
    "bad parameter": _with(nn.Hardtanh(), min_val=3.0),
    "another function": torch.neg,
    "partial with more": functools.partial(F.gelu, torch.zeros(1), approximate="tanh"),
    "unhashable": [],
    "a number": 3,
}


@pytest.mark.parametrize("candidate", UNCERTAIN.values(), ids=UNCERTAIN.keys())
def test_uncertain_is_not_recognized(candidate: Any) -> None:
    """recognize() returns None and resolve() refuses, naming what was given and what is allowed."""
    assert recognize(candidate) is None
    with pytest.raises(ValueError, match=r"allowed are relu, relu6, gelu, .*mish"):
        resolve(candidate)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("geluu", "'geluu' is unknown; allowed are relu, "),
        (("relu", 1.0), r"'relu' takes no parameters, but was given \(1.0,\)"),
        (("hardtanh", 1.0), r"'hardtanh' takes the numbers \(min_val, max_val\), but was given \(1.0,\)"),
        (("hardtanh", 2.0, 1.0), "needs min_val <= max_val"),
        (("elu", "1"), "takes the numbers"),
        (("elu", float("nan")), "takes the numbers"),
        (("elu", True), "takes the numbers"),
        (Activation("nope"), "'nope' is unknown"),
    ],
)
def test_bad_specifications(spec: Any, message: str) -> None:
    """A wrong name, or wrong parameters of a right one, is one clear ValueError."""
    with pytest.raises(ValueError, match=message):
        resolve(spec)


def test_transformers_activations() -> None:
    """Of transformers' activations, those that are one of ours are recognized and agree; near misses are not."""
    table = pytest.importorskip("transformers.activations", reason="transformers is an optional dependency")
    found = {name: recognize(table.ACT2FN[name]) for name in table.ACT2CLS if name not in ("xielu",)}
    y = torch.randn(1000) * 4
    for name, activation in found.items():
        if activation is not None:
            torch.testing.assert_close(apply(activation, y), table.ACT2FN[name](y), rtol=1e-6, atol=2e-6, msg=name)
    tanh_forms = ("gelu_new", "gelu_fast", "gelu_accurate", "gelu_pytorch_tanh", "gelu_python_tanh")
    assert {found[name] for name in tanh_forms} == {Activation("gelu_tanh")}
    assert {found[name] for name in ("gelu", "gelu_python")} == {Activation("gelu")}
    assert found["quick_gelu"] == Activation("quick_gelu") and found["relu2"] == Activation("relu2")
    assert [found[name] for name in ("gelu_10", "laplace", "linear", "prelu")] == [None] * 4


@pytest.mark.parametrize("name", activations.names())
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_slopes_are_those_of_autograd(name: str, dtype: torch.dtype) -> None:
    """Bit for bit, at the edges of the pieces, too."""
    activation = activations.resolve(name)
    assert activation is not None
    y = torch.tensor([*range(-4, 8), *(0.1 * i for i in range(-50, 50)), -0.0, 20.0, 30.0, 80.0, -80.0], dtype=dtype)
    g = torch.linspace(-2, 2, len(y), dtype=dtype)
    y.requires_grad_()
    (expected,) = torch.autograd.grad(activations.apply(activation, y), y, g)
    found = activations.slope(activation, g, y.detach())
    assert found is not None and torch.equal(found, expected)
