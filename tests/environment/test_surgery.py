"""Whatever is done to a fused model after it was converted, it computes what the stock model does after the same."""

import copy
import gc
import pickle
import sys
import types
import warnings
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from models import OFF
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize

import fastlinear
from fastlinear.layer import linear
from fastlinear.model.fusion import Absorbed
from fastlinear.spec.activations import Activation

WIDTH = 16


def sequence() -> nn.Sequential:
    lin = [nn.Linear(WIDTH, WIDTH) for _ in range(3)]
    return nn.Sequential(lin[0], nn.ReLU(), lin[1], nn.LeakyReLU(0.2), lin[2], nn.Sigmoid())


def nested() -> nn.Sequential:
    """A layer and its activation in one sequence, across the end of one, and into the beginning of one."""
    a, b, c = (nn.Linear(WIDTH, WIDTH) for _ in range(3))
    return nn.Sequential(nn.Sequential(a, nn.GELU(), b), nn.Tanh(), c, nn.Sequential(nn.SiLU(), nn.Identity()))


class Parts(nn.Module):
    def __init__(self, act: Any = None) -> None:
        super().__init__()
        self.fc, self.out = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.act = nn.GELU() if act is None else act


class Mlp(Parts):
    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.act(self.fc(x)))


class Statements(Parts):
    def forward(self, x: Tensor) -> Tensor:
        x = self.fc(x)
        x = self.act(x)
        return self.out(x)


class TwoWays(Parts):
    """Its source proves one call; another gets at the same layer by a name that no source tells."""

    features = ""

    def forward(self, x: Tensor) -> Tensor:
        if self.features:
            return getattr(self, self.features)(x)
        return self.out(self.act(self.fc(x)))


MODELS: dict[str, Callable[[], Any]] = {
    "sequence": sequence,
    "nested": nested,
    "source": Mlp,
    "statements": Statements,
    "function": lambda: Mlp(F.relu),
    "parameters": lambda: Mlp(nn.LeakyReLU(0.1)),
    "two ways": TwoWays,
}


def absorbed(model: nn.Module) -> list[Absorbed]:
    return [module for module in model.modules() if isinstance(module, Absorbed)]


def left_to_originals(model: nn.Module, x: Tensor) -> int:
    """In how many places one call of the model has the original activation run, where no layer applied it."""
    seen: list[str] = []

    def note(frame: types.FrameType, event: str, _: object) -> None:
        if event == "call" and frame.f_code is Absorbed.forward.__code__:
            seen.append(event)

    sys.setprofile(note)
    try:
        with torch.no_grad():
            model(x)
    finally:
        sys.setprofile(None)
    return len(seen)


def added() -> nn.Linear:
    torch.manual_seed(3)
    return nn.Linear(WIDTH, WIDTH, bias=False).eval()


class Lora(nn.Module):
    def __init__(self, base: nn.Module) -> None:
        super().__init__()
        self.base, self.delta = base, added()

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + self.delta(x)


def patched(layer: nn.Module) -> None:
    original, delta = layer.forward, added()
    layer.forward = lambda x: original(x) + delta(x)  # type: ignore[method-assign]


def done(change: Callable[[Any], object]) -> Callable[[Any], Any]:
    """A change in place as a function of the model that gives the model."""

    def run(model: Any) -> Any:
        change(model)
        return model

    return run


def hooked(module: nn.Module, before: bool = False) -> None:
    if before:
        module.register_forward_pre_hook(lambda m, args: (args[0] * 2,))
    else:
        module.register_forward_hook(lambda m, args, y: y * 2 + 1)


def prepended(model: nn.Sequential) -> nn.Sequential:
    return model.insert(1, nn.Tanh())


class Apart(nn.Module):
    """The same calls by another holder, whose activation is its own."""

    def __init__(self, fc: nn.Module, act: Any) -> None:
        super().__init__()
        self.fc, self.act, self.out = fc, nn.Tanh(), nn.Identity()
        self.theirs = act

    forward = Mlp.forward


class Swapped(Parts):
    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.fc(x) + self.act(x))


SEQUENCE: dict[str, Callable[[Any], Any]] = {
    "m[:-1]": lambda m: m[:-1],
    "m[:1]": lambda m: m[:1],
    "m[2:]": lambda m: m[2:],
    "m[1:]": lambda m: m[1:],
    "m[::2]": lambda m: m[::2],
    "children()[:-1]": lambda m: nn.Sequential(*list(m.children())[:-1]),
    "all children": lambda m: nn.Sequential(*m.children()),
    "children reversed": lambda m: nn.Sequential(*reversed(list(m.children()))),
    "m[1] = GELU": done(lambda m: m.__setitem__(1, nn.GELU())),
    "m[1] = Identity": done(lambda m: m.__setitem__(1, nn.Identity())),
    "m[1] = Linear": done(lambda m: m.__setitem__(1, added())),
    "m[0] = Linear": done(lambda m: m.__setitem__(0, added())),
    "m[0] = wrapped": done(lambda m: m.__setitem__(0, nn.Sequential(m[0]))),
    "m[0] = LoRA": done(lambda m: m.__setitem__(0, Lora(m[0]))),
    "swap of activations": done(lambda m: (lambda a, b: (m.__setitem__(1, b), m.__setitem__(3, a)))(m[1], m[3])),
    "swap of layers": done(lambda m: (lambda a, b: (m.__setitem__(0, b), m.__setitem__(2, a)))(m[0], m[2])),
    "del m[1]": done(lambda m: m.__delitem__(1)),
    "del m[-1]": done(lambda m: m.__delitem__(-1)),
    "m.pop(1)": done(lambda m: m.pop(1)),
    "m.pop(-1)": done(lambda m: m.pop(-1)),
    "append(Tanh)": done(lambda m: m.append(nn.Tanh())),
    "append(m[0])": done(lambda m: m.append(m[0])),
    "append(m[1])": done(lambda m: m.append(m[1])),
    "extend(itself)": done(lambda m: m.extend(list(m))),
    "insert(1, Tanh)": done(prepended),
    "insert(1, Dropout)": done(lambda m: m.insert(1, nn.Dropout().eval())),
    "m[0](x)": lambda m: lambda x: m[0](x),
    "m[1](x)": lambda m: lambda x: m[1](x),
    "m[3](m[2](x))": lambda m: lambda x: m[3](m[2](x)),
    "m[2].forward(x)": lambda m: lambda x: m[2].forward(x),
    "m[1].forward(x)": lambda m: lambda x: m[1].forward(x),
    "for module in m": lambda m: lambda x: [x := module(x) for module in m][2],
    "ModuleList": lambda m: lambda x: (lambda parts: parts[1](parts[2](parts[3](x))))(nn.ModuleList(m)),
    "another model's": lambda m: nn.Sequential(nn.Tanh(), m[0], nn.Tanh()),
    "slope set": done(lambda m: setattr(m[3], "negative_slope", 2.0)),
    "hook on a layer": done(lambda m: hooked(m[0])),
    "pre-hook on a layer": done(lambda m: hooked(m[0], True)),
    "hook on an activation": done(lambda m: hooked(m[1])),
    "pre-hook on an activation": done(lambda m: hooked(m[1], True)),
    "hook on the model": done(lambda m: hooked(m)),
    "patched layer": done(lambda m: patched(m[0])),
    "patched activation": done(lambda m: patched(m[1])),
    "patched model": done(patched),
    "deepcopy": copy.deepcopy,
    "deepcopy of a slice": lambda m: copy.deepcopy(m[:3]),
    "deepcopy of a layer": lambda m: copy.deepcopy(m[0]),
    "deepcopy of an activation": lambda m: copy.deepcopy(m[3]),
    "pickle": lambda m: pickle.loads(pickle.dumps(m)),
    "pickle of a layer": lambda m: pickle.loads(pickle.dumps(m[0])),
    "pickle of an activation": lambda m: pickle.loads(pickle.dumps(m[3])),
    "apply(init)": done(lambda m: m.apply(lambda c: isinstance(c, nn.Linear) and nn.init.constant_(c.weight, 0.03))),
    "double": lambda m: lambda x: copy.deepcopy(m).double()(x.double()).float(),
    "train": done(lambda m: m.train()),
    "parametrized": done(lambda m: parametrize.register_parametrization(m[0], "weight", nn.Tanh())),
    "weight norm": done(lambda m: parametrizations.weight_norm(m[0])),
    "FX": torch.fx.symbolic_trace,
    "compiled": lambda m: torch.compile(m, backend="eager", fullgraph=True),
    "compiled slice": lambda m: torch.compile(m[:-1], backend="eager", fullgraph=True),
    "compiled call of a layer": lambda m: torch.compile(lambda x: m[0](x), backend="eager", fullgraph=True),
    "compiled by itself": done(lambda m: m[0].compile(backend="eager")),
    "traced": lambda m: torch.jit.trace(m, torch.zeros(2, WIDTH)),
    "scripted": torch.jit.script,
    "scripted slice": lambda m: torch.jit.script(m[:-1]),
    "exported": lambda m: torch.export.export(m, (torch.zeros(5, WIDTH),)).module(),
    "after an export": done(lambda m: torch.export.export(m, (torch.zeros(5, WIDTH),))),
    "after a strict export": done(lambda m: torch.export.export(m, (torch.zeros(5, WIDTH),), strict=True)),
    "after a trace": done(lambda m: torch.jit.trace(m, torch.zeros(2, WIDTH))),
    "after a script": done(torch.jit.script),
    "after FX": done(torch.fx.symbolic_trace),
    "after a pickle": done(pickle.dumps),
    "unconverted slice": lambda m: fastlinear.unconvert(m[:-1]) if absorbed(m) else m[:-1],
    "converted again": lambda m: fastlinear.convert(m[:-1], tune="off") if absorbed(m) else m[:-1],
}

NESTED: dict[str, Callable[[Any], Any]] = {
    "as it is": lambda m: m,
    "m[0]": lambda m: m[0],
    "m[0][0]": lambda m: m[0][0],
    "m[:1]": lambda m: m[:1],
    "m[:2]": lambda m: m[:2],
    "m[3]": lambda m: m[3],
    "m[:3]": lambda m: m[:3],
    "m[1] = Identity": done(lambda m: m.__setitem__(1, nn.Identity())),
    "del m[1]": done(lambda m: m.__delitem__(1)),
    "append to the inner": done(lambda m: m[0].append(nn.Sigmoid())),
    "hook on the inner": done(lambda m: hooked(m[0])),
    "pre-hook on the inner": done(lambda m: hooked(m[3], True)),
    "patched inner": done(lambda m: patched(m[0])),
    "inner twice": lambda m: nn.Sequential(m[0], m[1], m[0], nn.Identity()),
    "inner moved": lambda m: nn.Sequential(m[0], nn.Identity(), m[1]),
    "inner elsewhere": lambda m: nn.Sequential(nn.Sequential(m[0]), m[1]),
    "emptied": done(lambda m: [m[3].pop(0) for _ in range(2)]),
    "inner compiled": done(lambda m: m[0].compile(backend="eager")),
}

SOURCE: dict[str, Callable[[Any], Any]] = {
    "as it is": lambda m: m,
    "m.fc(x)": lambda m: m.fc,
    "m.act(x)": lambda m: m.act,
    "m.act(m.fc(x))": lambda m: lambda x: m.act(m.fc(x)),
    "act = Identity": done(lambda m: setattr(m, "act", nn.Identity())),
    "act = other": done(lambda m: setattr(m, "act", nn.Tanh())),
    "fc = Linear": done(lambda m: setattr(m, "fc", added())),
    "fc = LoRA": done(lambda m: setattr(m, "fc", Lora(m.fc))),
    "fc = out": done(lambda m: setattr(m, "fc", m.out)),
    "out = fc": done(lambda m: setattr(m, "out", m.fc)),
    "fc = Sequential(fc, fc)": done(lambda m: setattr(m, "fc", nn.Sequential(m.fc, m.fc))),
    "patched fc": done(lambda m: patched(m.fc)),
    "patched model": done(patched),
    "hook on fc": done(lambda m: hooked(m.fc)),
    "pre-hook on fc": done(lambda m: hooked(m.fc, True)),
    "class patched": done(lambda m: setattr(m, "__class__", Swapped)),
    "features by name": done(lambda m: setattr(m, "features", "fc")),
    "deepcopy": copy.deepcopy,
    "deepcopy of fc": lambda m: copy.deepcopy(m.fc),
    "pickle": lambda m: pickle.loads(pickle.dumps(m)),
    "weight norm": done(lambda m: parametrizations.weight_norm(m.fc)),
    "FX": torch.fx.symbolic_trace,
    "compiled": lambda m: torch.compile(m, backend="eager", fullgraph=True),
    "compiled fc": lambda m: torch.compile(m.fc, backend="eager", fullgraph=True),
    "exported": lambda m: torch.export.export(m, (torch.zeros(5, WIDTH),)).module(),
    "after an export": done(lambda m: torch.export.export(m, (torch.zeros(5, WIDTH),))),
    "parts of another": lambda m: Apart(m.fc, m.act),
}

CASES = [
    *[(make, kind, change) for make in ("sequence",) for kind, change in SEQUENCE.items()],
    *[("nested", kind, change) for kind, change in NESTED.items()],
    *[
        (make, kind, change)
        for make in ("source", "statements", "function", "parameters", "two ways")
        for kind, change in SOURCE.items()
    ],
]


def compiles_as_others(make: str, kind: str) -> bool:
    """Compilers, which take seconds, see of these models what they see of "source"."""
    return make in ("statements", "function", "parameters") and ("compiled" in kind or "export" in kind)


def made(name: str) -> Any:
    torch.default_generator.manual_seed(1)
    return MODELS[name]().eval()


def outcome(change: Callable[[Any], Any], model: Any, x: Tensor, mode: Callable[[], Any]) -> Tensor | str:
    """What the changed model computes, or what kind of error it raises, first and second time."""
    torch.default_generator.manual_seed(2)
    torch._dynamo.reset()
    with warnings.catch_warnings(), mode():
        warnings.simplefilter("ignore")
        try:
            changed = change(model)
            changed(x.clone())
            y: Tensor = changed(x.clone())
            return y
        except Exception as error:
            return type(error).__name__


@pytest.mark.parametrize("mode", [torch.no_grad, torch.enable_grad])
@pytest.mark.parametrize(
    ("make", "kind", "change"),
    [
        pytest.param(
            *case,
            id="-".join(case[:2]),
            marks=[pytest.mark.exhaustive] if compiles_as_others(*case[:2]) else [],
        )
        for case in CASES
    ],
)
def test_surgery(make: str, kind: str, change: Callable[[Any], Any], mode: Callable[[], Any]) -> None:
    """A converted model that is changed computes what the stock model computes after the same change."""
    x = torch.randn(5, WIDTH)
    fast = OFF(made(make))
    assert absorbed(fast)
    with torch.no_grad():
        fast(x)  # it has run fused before
    want, got = outcome(change, made(make), x, mode), outcome(change, fast, x, mode)
    if isinstance(want, str):
        assert got == want or got == "RuntimeError"
    else:
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("make", MODELS)
def test_what_was_not_changed_runs_fused(make: str) -> None:
    """The proof holds where it should: in the model, in copies of it, and in parts that have both halves of a pair."""
    x = torch.randn(5, WIDTH)
    fast = OFF(made(make))
    fast(x)  # FX patches nn.Module.__call__ for a while, after which the first call of all is an ordinary one
    assert absorbed(fast) and left_to_originals(fast, x) == 0
    assert left_to_originals(copy.deepcopy(fast), x) == left_to_originals(pickle.loads(pickle.dumps(fast)), x) == 0
    assert left_to_originals(fastlinear.freeze(fast), x) == 0
    if make == "sequence":
        assert left_to_originals(fast[:2], x) == left_to_originals(nn.Sequential(*fast.children()), x) == 0
        assert left_to_originals(fast[:-1], x) == 0 and left_to_originals(fast[1:], x) == 1
    else:
        assert left_to_originals(nn.Sequential(fast, fast), x) == 0


def test_a_class_that_changes_between_two_converts(tmp_path: Any) -> None:
    """What a class does is read anew for each convert, and proved anew in each call."""

    class Changing(Mlp):
        pass

    def both(self: Mlp, x: Tensor) -> Tensor:
        y = self.fc(x)
        return self.act(y) + y

    model, x = Changing().eval(), torch.randn(5, WIDTH)
    fast = OFF(model)
    with torch.no_grad():
        torch.testing.assert_close(fast(x), model(x))
        Changing.forward = both  # type: ignore[method-assign]
        for later in (fast, OFF(model)):
            torch.testing.assert_close(later(x), model(x))
        assert not absorbed(OFF(model))


def test_an_attribute_of_the_class_hides_the_marker() -> None:
    """`self.act` is what Python makes of it at the time, also where a class attribute comes first."""

    class Hidden(Mlp):
        pass

    model, x = Hidden().eval(), torch.randn(5, WIDTH)
    fast = OFF(model)
    Hidden.act = staticmethod(torch.tanh)
    with torch.no_grad():
        torch.testing.assert_close(fast(x), model(x))


def test_hooks_see_what_they_saw() -> None:
    """Hooks, those for all modules included, see the layer's output and the activation's input as in torch."""
    x = torch.randn(5, WIDTH)

    def watch(model: nn.Module) -> list[Tensor]:
        seen: list[Tensor] = []
        hooks = [
            module.register_forward_hook(lambda m, args, y: seen.extend([args[0], y]))
            for module in (model.fc, model.act)
        ]
        everywhere = nn.modules.module.register_module_forward_hook(
            lambda m, args, y: seen.append(y) if isinstance(m, nn.Linear) else None
        )
        with torch.no_grad():
            model(x)
        for hook in (*hooks, everywhere):
            hook.remove()
        return seen

    fast = OFF(made("source"))
    for got, want in zip(watch(fast), watch(made("source")), strict=True):
        torch.testing.assert_close(got, want)
    assert left_to_originals(fast, x) == 0  # and when they are gone


def test_an_original_that_changes() -> None:
    """Whoever kept the activation that was absorbed in place may change or hook it; the layer notices."""
    x = torch.randn(5, WIDTH)
    for change in (lambda act: setattr(act, "negative_slope", -1.0), hooked, patched):
        model, stock = made("parameters"), made("parameters")
        act = model.act
        fast = OFF(model, inplace=True)
        with torch.no_grad():
            fast(x)
            change(act)
            change(stock.act)
            torch.testing.assert_close(fast(x), stock(x))
            assert fast.act.negative_slope == stock.act.negative_slope


@pytest.mark.parametrize("make", MODELS)
def test_no_cycle_keeps_a_model_alive(make: str) -> None:
    """Without the cycle collector a converted model and all its layers go when the last reference goes."""
    gc.collect()
    gc.disable()
    try:
        fast = OFF(made(make))
        with torch.no_grad():
            fast(torch.randn(5, WIDTH))
            fast.eval()
        watched = [weakref.ref(module) for module in fast.modules()]
        packs = [weakref.ref(layer._engine.packed) for layer in fast.modules() if linear.is_fast(layer)]
        del fast
        assert [ref for ref in (*watched, *packs) if ref() is not None] == []
    finally:
        gc.enable()


def test_old_pickles() -> None:
    """What version 0.1 pickled has the layer in its marker, and no marker in its layer."""
    fast = OFF(made("source"))
    marker, x = fast.act, torch.randn(5, WIDTH)
    want = fast(x)
    state = {key: value for key, value in vars(marker).items() if key not in ("_settings", "_tickets", "_linear")}
    vars(fast.fc).pop("_absorbed")
    old = Absorbed.__new__(Absorbed)
    old.__setstate__({**state, "linear": fast.fc, "home": fast, "name": "fc"})
    fast.act = old
    fast.fc.__setstate__(fast.fc.__getstate__())
    assert old.linear is fast.fc and left_to_originals(fast, x) == 0
    torch.testing.assert_close(fast(x), want)


def plus_one(forward: Any) -> Any:
    return lambda self, *args, **kwargs: forward(self, *args, **kwargs) + 1


PATCHES: dict[str, tuple[type, str]] = {
    "nn.Linear.forward": (nn.Linear, "forward"),
    "nn.GELU.forward": (nn.GELU, "forward"),
    "nn.LeakyReLU.forward": (nn.LeakyReLU, "forward"),
    "nn.Sequential.forward": (nn.Sequential, "forward"),
    "nn.Module.__call__": (nn.Module, "__call__"),
}


@pytest.mark.parametrize("make", MODELS)
@pytest.mark.parametrize("where", PATCHES)
@pytest.mark.parametrize("options", [{}, {"freeze": True}, {"inplace": True}], ids=["held", "frozen", "in place"])
def test_a_class_that_is_patched(
    make: str, where: str, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is patched in a class of torch's after a conversion is obeyed, and forgotten when it is taken back."""
    stock, fast, x = made(make), OFF(made(make), **options), torch.randn(5, WIDTH)
    with torch.no_grad():
        first = fast(x)
        for _ in range(2):
            cls, name = PATCHES[where]
            with monkeypatch.context() as patch:
                patch.setattr(cls, name, plus_one(getattr(cls, name)))
                for _ in range(2):
                    torch.testing.assert_close(fast(x), stock(x))
            torch.testing.assert_close(fast(x), first)
    said = [m._elsewhere for m in fast.modules() if isinstance(m, fastlinear.FastLinear)]
    assert (where == "nn.Linear.forward") == any("Linear.forward was replaced" in each for each in said)


def test_a_group_under_a_patched_class(monkeypatch: pytest.MonkeyPatch) -> None:
    """So do the layers of a group."""
    layers, x = [nn.Linear(WIDTH, n).eval() for n in (3, 5)], torch.randn(2, WIDTH)
    group = fastlinear.FastLinearGroup(layers).eval()
    with torch.no_grad():
        group(x)
        monkeypatch.setattr(nn.Linear, "forward", plus_one(nn.Linear.forward))
        torch.testing.assert_close(group(x), tuple(layer(x) for layer in layers))


@pytest.mark.parametrize("make", MODELS)
def test_global_hooks_see_each_module_once(make: str) -> None:
    """And as what it is: the activation itself, not what stands for it."""
    seen: list[list[str]] = []
    for model in (made(make), OFF(made(make))):
        seen.append([])
        note = nn.modules.module.register_module_forward_hook(
            lambda module, args, y: seen[-1].append(module.__class__.__name__.replace("Fast", ""))
        )
        try:
            model(torch.randn(5, WIDTH))
        finally:
            note.remove()
    assert seen[0] == seen[1]


def test_files_after_surgery(tmp_path: Any) -> None:
    """A layer whose marker is gone is saved as what it computes then."""
    fast, x = OFF(made("source")), torch.randn(5, WIDTH)
    fast.act = nn.Tanh()
    fastlinear.save(fast, tmp_path / "m.safetensors")
    loaded = fastlinear.load(tmp_path / "m.safetensors", Mlp(nn.Tanh()).eval())
    with torch.no_grad():
        torch.testing.assert_close(loaded(x), fast(x))
    assert loaded.fc.activation is None and fast.fc.activation == Activation("gelu")


def test_unconvert_after_surgery() -> None:
    """Layers become nn.Linear again, whatever became of their markers."""
    fast, stock, x = OFF(made("sequence")), made("sequence"), torch.randn(5, WIDTH)
    for model in (fast, stock):
        del model[1]
        model[2] = nn.Tanh()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fastlinear.unconvert(fast)
    assert str(fast) == str(stock)
    torch.testing.assert_close(fast(x), stock(x))


def test_tuning_measures_what_runs() -> None:
    """tune and convert(tune="now") plan the fused calls, of layers with a hook the others."""
    model, x = fastlinear.convert(made("source")), torch.randn(3, WIDTH)
    fastlinear.tune(model, x)
    assert {engine.bare for engine, *_ in model.fc._plans} == {False}
    with torch.no_grad():
        model(x)
        assert len(model.fc._plans) == 1
        hooked(model.fc)
        model(x)
    assert {engine.bare for engine, *_ in model.fc._plans} == {False, True} and len(model.fc.plans) == 1


# ---- calls, hooks of accelerate, TorchScript -------------------------------------------------------------------------


def conv1d() -> nn.Module:
    transformers = pytest.importorskip("transformers.pytorch_utils", reason="transformers is an optional dependency")
    layer: nn.Module = transformers.Conv1D(8, WIDTH)
    return layer


@pytest.mark.parametrize("make", [lambda: nn.Linear(WIDTH, 8), conv1d])
def test_calls_are_as_free_as_in_torch(make: Callable[[], nn.Module]) -> None:
    """x by its keyword, arguments of a patched forward, and the same errors for the rest."""
    x, stock = torch.randn(5, WIDTH), make().eval()
    fast = OFF(stock)
    name = "input" if isinstance(stock, nn.Linear) else "x"
    torch.testing.assert_close(fast(**{name: x}), stock(x))
    for args, kwargs in (((), {}), ((x, x), {}), ((x,), {"other": 1}), ((), {"other": x})):
        for layer in (stock, fast):
            with pytest.raises(TypeError):
                layer(*args, **kwargs)
    for layer in (stock, fast):
        layer.forward = lambda x, scale=1.0, forward=layer.forward: forward(x) * scale  # type: ignore[method-assign]
    for args, kwargs in (((x,), {}), ((x, 2.0), {}), ((x,), {"scale": 2.0}), ((), {"x": x})):
        torch.testing.assert_close(fast(*args, **kwargs), stock(*args, **kwargs))


def test_a_subclass_with_its_own_forward() -> None:
    """Its forward is what is called, with whatever it takes."""

    class Scaled(fastlinear.FastLinear):
        def forward(self, input: Tensor, scale: float = 1.0) -> Tensor:  # type: ignore[override]
            return super().forward(input) * scale

    layer, x = Scaled(WIDTH, 8, activation="relu").eval(), torch.randn(5, WIDTH)
    want = F.linear(x, layer.weight, layer.bias).relu()
    torch.testing.assert_close(layer(x, scale=3.0), want * 3)
    torch.testing.assert_close(layer(x, 2.0), want * 2)


def native(layer: Any, x: Tensor) -> bool:
    with torch.no_grad():
        layer(x)
    return bool(layer.plans)


def test_accelerate() -> None:
    """Hooks of accelerate run around the kernels, whether they come before convert or after, and go again."""
    hooks = pytest.importorskip("accelerate.hooks", reason="accelerate is an optional dependency")
    x = torch.randn(5, WIDTH)
    for first in (True, False):
        model = nn.Sequential(nn.Linear(WIDTH, 8)).eval()
        want = model(x)
        if first:
            hooks.add_hook_to_module(model[0], hooks.ModelHook())
        fast = OFF(model, quantize=fastlinear.Int8Dynamic())
        if not first:
            hooks.add_hook_to_module(fast[0], hooks.ModelHook())
        assert native(fast[0], x)
        with torch.no_grad():
            assert not torch.equal(fast(x), want)
            torch.testing.assert_close(fast(x), want, rtol=0.05, atol=0.05)
            hooks.remove_hook_from_module(fast[0])
            assert native(fast[0], x) and not torch.equal(fast(x), want)
            assert type(fastlinear.unconvert(fast)[0]) is nn.Linear
            assert torch.equal(fast(x), want)


def test_a_forward_that_was_replaced_before() -> None:
    """convert leaves such a layer alone, as its forward calls nn.Linear's, and report says why."""
    model, x = made("source"), torch.randn(5, WIDTH)
    patched(model.fc)
    fast = OFF(model)
    assert type(fast.fc) is nn.Linear and linear.is_fast(fast.out)
    assert "its forward was replaced" in (fastlinear.report(fast)[0].reason or "")
    torch.testing.assert_close(fast(x), model(x))


@pytest.mark.parametrize("quantize", [None, fastlinear.Int8Dynamic()])
@pytest.mark.parametrize("freeze", [False, True])
@pytest.mark.parametrize("make", ["sequence", "source", "parameters"])
def test_scripted(make: str, freeze: bool, quantize: Any, tmp_path: Any) -> None:
    """A script of a converted model has its numbers, also from a file, and leaves the model as it was."""
    model, x = made(make), torch.randn(5, WIDTH)
    fast = OFF(model, quantize=quantize, freeze=freeze)
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        script = torch.jit.script(fast)
        torch.jit.save(script, tmp_path / "m.pt")
        for each in (script, torch.jit.load(tmp_path / "m.pt")):
            near = (
                1e-5 if quantize is None else 0.02
            )  # a last bit of the activation may be a step of the next layer's x
            torch.testing.assert_close(each(x), fast(x), rtol=near, atol=near)
    assert left_to_originals(fast, x) == 0
    pickle.loads(pickle.dumps(fast))
    if quantize is None:
        torch.testing.assert_close(script(x), model(x))
