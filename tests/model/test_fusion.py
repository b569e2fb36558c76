"""Which activations a linear layer absorbs, and that a model with absorbed ones still is the same model."""

import copy
import functools
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fastlinear
from fastlinear.model.fusion import Absorbed, find_pairs
from fastlinear.spec.activations import Activation


def pairs(model: nn.Module) -> dict[str, str]:
    """Name of the absorbing layer -> name of the activation, if every nn.Linear of the model were converted."""
    names = {module: name for name, module in model.named_modules()}
    found = find_pairs(model, {module for module in names if type(module) is nn.Linear})
    return {names[pair.linear]: pair.activation.name for pair in found}


def absorbed(model: nn.Module) -> list[Absorbed]:
    return [module for module in model.modules() if isinstance(module, Absorbed)]


def hooked(module: nn.Module) -> nn.Module:
    module.register_forward_hook(lambda *_: None)
    return module


class Reversed(nn.Sequential):
    def forward(self, x: Tensor) -> Tensor:
        for module in reversed(self):
            x = module(x)
        return x


def layer() -> nn.Linear:
    return nn.Linear(4, 4)


RELU, LINEAR, SEQUENCE = nn.ReLU(), nn.Linear(4, 4), nn.Sequential(nn.Linear(4, 4), nn.ReLU())
SEQUENCES: dict[str, tuple[nn.Module, dict[str, str]]] = {
    "directly after": (nn.Sequential(layer(), nn.GELU(), layer()), {"0": "gelu"}),
    "nested": (nn.Sequential(nn.Sequential(layer(), nn.Tanh()), layer(), nn.SiLU()), {"0.0": "tanh", "1": "silu"}),
    "across a nested end": (nn.Sequential(nn.Sequential(layer(), layer()), nn.ReLU()), {"0.1": "relu"}),
    "into a nested start": (nn.Sequential(layer(), nn.Sequential(nn.ReLU(), layer())), {"0": "relu"}),
    "one activation, two slots": (nn.Sequential(layer(), RELU, layer(), RELU), {"0": "relu", "2": "relu"}),
    "a sequence used twice": (nn.Sequential(SEQUENCE, SEQUENCE), {"0.0": "relu"}),
    "parameters": (nn.Sequential(layer(), nn.LeakyReLU(0.2)), {"0": "leaky_relu"}),
    "in place": (nn.Sequential(layer(), nn.ReLU(inplace=True)), {"0": "relu"}),
    "no activation next": (nn.Sequential(layer(), nn.Dropout(), nn.ReLU()), {}),
    "not a linear layer before": (nn.Sequential(layer(), nn.LayerNorm(4), nn.ReLU()), {}),
    "two activations": (nn.Sequential(layer(), nn.ReLU(), nn.Tanh()), {"0": "relu"}),
    "linear layer used twice": (nn.Sequential(LINEAR, nn.ReLU(), LINEAR), {}),
    "hook on the linear layer": (nn.Sequential(hooked(layer()), nn.ReLU()), {}),
    "hook on the activation": (nn.Sequential(layer(), hooked(nn.ReLU())), {}),
    "hook between": (nn.Sequential(hooked(nn.Sequential(layer())), nn.ReLU()), {}),
    "another order": (Reversed(layer(), nn.ReLU()), {}),
    "a nested sequence used twice": (nn.ModuleList([nn.Sequential(a := nn.Sequential(layer()), nn.ReLU()), a]), {}),
    "learned activation": (nn.Sequential(layer(), nn.PReLU()), {}),
    "no container": (nn.ModuleList([layer(), nn.ReLU()]), {}),
    "a lone layer": (layer(), {}),
}


@pytest.mark.parametrize(("model", "expected"), SEQUENCES.values(), ids=SEQUENCES.keys())
def test_sequences(model: nn.Module, expected: dict[str, str]) -> None:
    """In nn.Sequential an activation is absorbed exactly where nothing else can see what it is applied to."""
    assert pairs(model) == expected


def logged(method: Callable[..., Tensor]) -> Callable[..., Tensor]:
    @functools.wraps(method)
    def wrapper(*args: Any) -> Tensor:
        return method(*args)

    return wrapper


class Parts(nn.Module):
    """What the modules below are made of; they differ in what they do with it."""

    def __init__(self, act: Any = None) -> None:
        super().__init__()
        self.fc1, self.fc2, self.act = layer(), layer(), nn.GELU() if act is None else act


class Mlp(Parts):
    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.act(self.fc1(x)))


class Statements(Parts):
    def forward(self, x: Tensor) -> Tensor:
        if x.dim() > 1:
            x = self.fc1(x)
            x = self.act(x)
        return self.fc2(x)


class Gated(Parts):
    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.fc1(x)) * self.fc2(x)


class Inherited(Mlp):
    pass


class Decorated(Parts):
    @logged
    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.fc1(x))


class ReadsWeight(Parts):
    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.fc1(x.to(self.fc1.weight.dtype)))


class UsesOutputToo(Parts):
    def forward(self, x: Tensor) -> Tensor:
        y = self.fc1(x)
        return self.act(y) + y


class OtherVariable(Parts):
    def forward(self, x: Tensor) -> Tensor:
        y = self.fc1(x)
        z = self.act(y)
        return z + y


class CallsTwice(Parts):
    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.fc1(x)) + self.fc1(x)


class ActsTwice(Parts):
    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.fc2(self.act(self.fc1(x))))


class SecondMethod(Mlp):
    def logits(self, x: Tensor) -> Tensor:
        return self.fc1(x)


class SecondActMethod(Mlp):
    def later(self, x: Tensor) -> Tensor:
        return (lambda y: self.act(y))(x)


class Overridden(Mlp):
    def forward(self, x: Tensor) -> Tensor:
        return self.fc1(super().forward(x))


class Between(Parts):
    def forward(self, x: Tensor) -> Tensor:
        x = self.fc1(x)
        x = x + 1
        x = self.act(x)
        return self.fc2(x)


class MoreArguments(Parts):
    def forward(self, x: Tensor) -> Tensor:
        x = self.fc1(x)
        x = self.act(x, True)
        return self.fc2(x)


exec("class NoSource(Parts):\n    def forward(self, x):\n        return self.act(self.fc1(x))\n")

SOURCES: dict[str, tuple[nn.Module, dict[str, str]]] = {
    **{cls.__name__: (cls(), {"fc1": "gelu"}) for cls in (Mlp, Statements, Gated, Inherited, Decorated, ReadsWeight)},
    "a function": (Mlp(F.silu), {"fc1": "silu"}),
    "an unknown function": (Mlp(torch.neg), {}),
    "an unknown module": (Mlp(nn.Softmax(-1)), {}),
    **{
        cls.__name__: (cls(), {})
        for cls in (
            UsesOutputToo, OtherVariable, CallsTwice, ActsTwice, SecondMethod, SecondActMethod, Overridden, Between,
            MoreArguments, NoSource,  # type: ignore[name-defined] # noqa: F821
        )
    },
}  # fmt: skip


@pytest.mark.parametrize(("model", "expected"), SOURCES.values(), ids=SOURCES.keys())
def test_sources(model: nn.Module, expected: dict[str, str]) -> None:
    """A module's source proves an activation absorbable where both attributes are used once, one right on the other."""
    assert pairs(model) == expected
    if expected:  # and the proof holds
        with torch.no_grad():
            model.eval()
            x = torch.randn(3, 4)
            torch.testing.assert_close(fastlinear.convert(model, tune="off")(x), model(x))


def test_replaced_forward() -> None:
    """The source of a forward that is not the one that runs proves nothing."""
    model = Mlp()
    model.forward = model.fc1.forward  # type: ignore[method-assign]
    assert pairs(model) == {}


def test_class_attribute_stays() -> None:
    """An activation held by the class, not by the instance, is not taken from the other instances."""

    class Shared(Mlp):
        act = staticmethod(F.relu)

    model = Mlp()
    del model.act
    model.__class__ = Shared
    assert pairs(model) == {}


def test_only_converted_layers_absorb() -> None:
    """fuse=False absorbs nothing; a layer that is excluded keeps its activation behind it."""
    model = nn.Sequential(layer(), nn.ReLU(), layer(), nn.ReLU())
    assert absorbed(fastlinear.convert(model, fuse=False)) == []
    fast = fastlinear.convert(model, exclude="0")
    assert isinstance(fast[1], nn.ReLU) and isinstance(fast[3], Absorbed)
    assert fast[2].activation == Activation("relu")


@pytest.mark.parametrize("act", [nn.GELU(), F.gelu, torch.tanh], ids=["module", "function", "builtin method"])
def test_marker_survives(act: Any) -> None:
    """The marker tells what it absorbed, adds no key to the state dict, pickles and copies; unconvert works after."""
    model = Mlp(act).eval()
    fast = fastlinear.convert(model, tune="off")
    assert "gelu" in repr(fast).lower().split("absorbed(")[1] or "tanh" in repr(fast)
    assert list(fast.state_dict()) == list(model.state_dict())
    x = torch.randn(3, 4)
    for twin in (copy.deepcopy(fast), pickle.loads(pickle.dumps(fast))):
        assert isinstance(twin.act, Absorbed) and twin.act.linear is twin.fc1
        with torch.no_grad():
            torch.testing.assert_close(twin(x), model(x))
            torch.testing.assert_close(fastlinear.unconvert(twin)(x), model(x))
        assert type(twin.act) is type(act) and type(twin.fc1) is nn.Linear
    assert "act" in vars(fastlinear.unconvert(fast)) or isinstance(act, nn.Module)


def test_a_copy_of_torchs_decoder_keeps_its_activation() -> None:
    """nn.TransformerDecoderLayer puts F.relu where its state has no function: copies of a fused one stay fused, and
    compute what it does; unconvert gives the function back."""
    model = nn.TransformerDecoderLayer(8, 2, 16, activation="gelu").eval()
    fast, given = fastlinear.convert(model, tune="off"), (torch.randn(3, 2, 8), torch.randn(4, 2, 8))
    for twin in (fast, copy.deepcopy(fast), pickle.loads(pickle.dumps(fast))):
        assert isinstance(twin.activation, Absorbed)
        with torch.no_grad():
            twin(*given)
            vars(twin.activation)["original"] = None  # which nobody calls
            torch.testing.assert_close(twin(*given), model(*given))
        vars(twin.activation)["original"] = F.gelu
        assert vars(fastlinear.unconvert(twin))["activation"] is F.gelu


def test_restored_activation_follows_train_and_eval() -> None:
    """An activation that comes back is in the mode that the model was put into meanwhile."""
    fast = fastlinear.convert(nn.Sequential(layer(), nn.ReLU()).train()).eval()
    assert not fastlinear.unconvert(fast)[1].training


def test_compiled() -> None:
    """torch.compile takes a fused model as one graph."""
    model, x = Mlp().eval(), torch.randn(3, 4)
    with torch.no_grad():
        compiled = torch.compile(fastlinear.convert(model, tune="off"), backend="eager", fullgraph=True)
        torch.testing.assert_close(compiled(x), model(x))


def test_gradients() -> None:
    """In training a fused model gives the loss and the gradients of the stock one."""
    model = nn.Sequential(layer(), nn.GELU(), layer(), nn.ELU(0.5))
    x, grads = torch.randn(5, 4), []
    for each in (model, fastlinear.convert(model)):
        model.zero_grad()
        each(x).square().sum().backward()
        grads.append([parameter.grad.clone() for parameter in model.parameters()])
    for stock, fast in zip(*grads, strict=True):
        torch.testing.assert_close(stock, fast)
