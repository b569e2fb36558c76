"""What a graph takes for granted of a model: whatever changes, answers and recompilations are those of Dynamo's own
guards."""

import gc
import types
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fastlinear
from fastlinear._trees import Tree
from fastlinear.graph import backend, premises


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.drop, self.scale = nn.LayerNorm(8), nn.Dropout(0.5), 1.0
        self.up, self.down = nn.Linear(8, 16), nn.Linear(16, 8)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.drop(self.down(self.up(self.norm(x)).relu())) * self.scale


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks, self.head = nn.ModuleList([Block(), Block()]), nn.Linear(8, 4)
        self.register_buffer("shift", torch.zeros(8))
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return self.head(x + self.shift * (2 if hasattr(self, "doubled") else 1))


class Calls:
    """A model compiled with this backend, the number of graphs that it took, and how often guards were asked."""

    def __init__(self, model: nn.Module) -> None:
        torch._dynamo.reset()
        made: list[Any] = []

        def compiler(module: Any, inputs: Any) -> Any:
            made.append(backend(module, inputs, options={"tune": "off"}))
            return made[-1]

        self.model, self.made = model, made
        self.fast = torch.compile(model, backend=compiler, fullgraph=True)

    @property
    def graphs(self) -> int:
        return len(self.made)

    def check(self, x: Tensor, tolerance: float = 1e-5) -> None:
        want = self.model(x)
        torch.testing.assert_close(self.fast(x), want, rtol=tolerance, atol=tolerance)


# Weights that are written are small enough for terms of about 1, as those of a new model are: rounding stays small.
def _assign(model: Any) -> None:
    model.load_state_dict({name: torch.randn_like(t) / 4 for name, t in model.state_dict().items()}, assign=True)


def _wider(model: Any) -> None:
    block = model.blocks[0]
    for parameter, shape in ((block.up.weight, (24, 8)), (block.up.bias, (24,)), (block.down.weight, (8, 24))):
        parameter.data = torch.randn(shape) / 4


def _other_module(model: Any) -> None:
    model.blocks[1].up = nn.Sequential(nn.Linear(8, 16), nn.Tanh())


def _patched(model: Any) -> None:
    block = model.blocks[0]
    block.forward = types.MethodType(lambda self, x: self.up(x)[..., :8], block)


def _swapped(model: Any) -> None:
    first, second = model.blocks[0], model.blocks[1]
    first.up, second.up = second.up, first.up


def _untied(model: Any) -> None:
    model.blocks[0].up.weight = model.blocks[1].up.weight


def _no_bias(model: Any) -> None:
    model.head.bias = None


def _of_class(model: Any) -> None:
    model.__class__ = type("Doubled", (Model,), {"doubled": True})


def _strided(model: Any) -> None:
    model.head.weight.data = torch.randn(8, 4).t()


def _negative(model: Any) -> None:
    model.head.weight.data = torch.randn(4, 8, dtype=torch.complex64).conj().imag


CHANGES: dict[str, Callable[[Any], Any]] = {
    "double": lambda model: model.double(),
    "bfloat16": lambda model: model.bfloat16(),
    "assign": _assign,
    "data of another shape": _wider,
    "data in other strides": _strided,
    "negative data": _negative,
    "requires_grad": lambda model: model.requires_grad_(False),
    "train and eval": lambda model: model.train().eval(),
    "a hook": lambda model: model.blocks[0].register_forward_hook(lambda *_: None),
    "a patched forward": _patched,
    "another module": _other_module,
    "modules swapped": _swapped,
    "a parameter tied": _untied,
    "no bias": _no_bias,
    "an attribute": lambda model: setattr(model.blocks[1], "scale", 2.0),
    "another p": lambda model: setattr(model.blocks[1].drop, "p", 0.25),
    "another eps": lambda model: setattr(model.blocks[1].norm, "eps", 0.5),
    "a block less": lambda model: model.blocks.pop(1),
    "a block more": lambda model: model.blocks.append(Block().eval()),
    "an attribute that was not there": lambda model: setattr(model, "doubled", True),
    "another class": _of_class,
    "an attribute of the class": lambda model: setattr(Model, "doubled", True),
    "a buffer": lambda model: setattr(model, "shift", torch.ones(8)),
    "a written buffer": lambda model: model.shift.fill_(1),
}


# Of one model, one after another: a graph more for each instead of two. Those that are left out are like others.
IN_TURN = [
    ("requires_grad", "train and eval", "a hook", "an attribute of the class"),
    ("assign", "data of another shape", "an attribute", "a buffer"),
    ("data in other strides", "negative data", "no bias", "another p"),
    ("a parameter tied", "another module", "a block less", "another class"),
    ("a patched forward", "an attribute that was not there", "a written buffer", "bfloat16"),
]
ALONE = [pytest.param((name,), marks=pytest.mark.exhaustive) for name in CHANGES]


@pytest.mark.parametrize("names", [*IN_TURN, *ALONE], ids=", ".join)
def test_changes(names: tuple[str, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    """After each change of a model the answers are right at once, with the graphs that Dynamo's guards ask for."""
    counts: list[list[int]] = []
    for held in (False, True):
        with monkeypatch.context() as patch:
            if not held:
                patch.setattr(premises, "hold", lambda *_: False)
            torch.manual_seed(0)
            calls = Calls(Model())
            with torch.no_grad():
                for _ in range(3):
                    calls.check(torch.randn(4, 8))
                counts.append([calls.graphs])
                for name in names:
                    CHANGES[name](calls.model)
                    dtype = calls.model.head.weight.dtype
                    for _ in range(3):
                        calls.check(torch.randn(4, 8, dtype=dtype), 0.05 if dtype is torch.bfloat16 else 1e-5)
                    counts[-1].append(calls.graphs)
            if "doubled" in vars(Model):
                del Model.doubled
    assert counts[0] == counts[1]


def test_training_and_back() -> None:
    """A model in training mode drops out, and one that is back in eval mode does not."""
    calls, x = Calls(Model()), torch.randn(64, 8)
    with torch.no_grad():
        calls.check(x)
        calls.model.train()
        assert not torch.equal(calls.fast(x), calls.fast(x))
        calls.model.eval()
        calls.check(x)


def test_gradients_later() -> None:
    """A graph that was made without gradients does not answer a call that wants them."""
    calls, x = Calls(Model()), torch.randn(4, 8)
    with torch.no_grad():
        calls.check(x)
    calls.fast(x).sum().backward()
    assert all(parameter.grad is not None for parameter in calls.model.parameters())


def test_functional_call() -> None:
    """Other parameters for one call are those of that call."""
    calls, x = Calls(Model()), torch.randn(4, 8)
    with torch.no_grad():
        calls.check(x)
        others = {f"_orig_mod.{name}": torch.randn_like(p) for name, p in calls.model.named_parameters()}
        got = torch.func.functional_call(calls.fast, others, (x,))
        plain = {name.removeprefix("_orig_mod."): other for name, other in others.items()}
        torch.testing.assert_close(got, torch.func.functional_call(calls.model, plain, (x,)), rtol=1e-5, atol=1e-5)
        calls.check(x)


def test_guards_are_asked_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """While nothing changes, a look at the modules stands for Dynamo's guards; after a change they are asked again."""
    asked: list[int] = []

    class Watched(Tree):
        def watch(self, places: Any, guards: Any) -> None:
            super().watch(places, lambda root: asked.append(0) or guards(root))

    monkeypatch.setattr(premises, "Tree", Watched)
    calls, x = Calls(Model()), torch.randn(4, 8)
    with torch.no_grad():
        calls.check(x)
        first = len(asked)
        for _ in range(5):
            calls.check(x)
        assert first > 0 and len(asked) == first
        calls.model.blocks[0].note = "new"
        calls.check(x)
        assert len(asked) == first + 1
    assert calls.graphs == 1


def test_a_model_that_always_changes() -> None:
    """A module that is something else in each call is looked at no more, and answers as before."""
    calls, x = Calls(Model()), torch.randn(4, 8)
    with torch.no_grad():
        for _ in range(30):
            calls.model.blocks[1].note = object()
            calls.check(x)
    assert calls.graphs == 1


def test_nothing_is_kept_alive() -> None:
    """What was looked at does not keep a model."""
    calls, x = Calls(Model()), torch.randn(4, 8)
    with torch.no_grad():
        for _ in range(3):
            calls.check(x)
    gone = weakref.ref(calls.model)
    del calls
    gc.collect()
    assert gone() is None


def test_why_it_recompiled(caplog: pytest.LogCaptureFixture) -> None:
    """Dynamo's own words tell what was no longer so."""
    calls, x = Calls(Model()), torch.randn(4, 8)
    with torch.no_grad():
        calls.check(x)
        calls.model.blocks[0].scale = 3.0
        torch._logging.set_logs(recompiles=True)
        try:
            calls.check(x)
        finally:
            torch._logging.set_logs()
    assert calls.graphs == 2
    assert "scale" in caplog.text


def test_a_backend_that_keeps_the_inputs() -> None:
    """A graph that is given all that it was traced with answers, too."""
    seen: list[Any] = []

    def keeping(module: Any, inputs: Any) -> Any:
        seen.append((backend(module, inputs, options={"tune": "off"}), inputs))
        return seen[-1][0]

    model, x = Model(), torch.randn(4, 8)
    torch._dynamo.reset()
    with torch.no_grad():
        want = torch.compile(model, backend=keeping)(x)
        function, inputs = seen[0]
        torch.testing.assert_close(function(*inputs)[0], want)


def test_a_filter_of_guards() -> None:
    """Who has Dynamo leave all guards out has a graph that reads the parameters that there are."""
    model, x = Model(), torch.randn(4, 8)
    torch._dynamo.reset()
    unguarded = {"tune": "off", "guard_filter_fn": lambda entries: [False] * len(entries)}
    fast = torch.compile(model, backend=fastlinear.graph.backend, options=unguarded)
    with torch.no_grad():
        for _ in range(3):
            torch.testing.assert_close(fast(x), model(x), rtol=1e-5, atol=1e-5)
            _assign(model)
