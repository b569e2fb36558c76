"""FastLinear(..., epilogue=...): programs whose tensors come with the call, in every way a layer may be run."""

import copy
import itertools
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fastlinear
from fastlinear import FastLinear
from fastlinear.spec import programs

K, N = 24, 40
PROGRAMS: dict[str, tuple[Any, ...]] = {
    "relu(y + r)": ("add", "relu"),
    "y * mask + r": ("mul", "add"),
    "silu(y) * r": ("silu", "mul"),
    "gelu(y) scaled": ("gelu", ("mul", 0.5)),
    "all eight": ("sub", ("add", 0.1), "tanh", "max", ("clamp", -0.5, 0.5), "min", ("div", 0.3), "leaky_relu"),
}
ROUNDING = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 3e-3}


def layer(steps: tuple[Any, ...], **options: Any) -> FastLinear:
    return FastLinear.from_linear(nn.Linear(K, N), epilogue=steps, **options).eval()


def operands(fast: Any, shape: tuple[int, ...] = (3, 5), dtype: torch.dtype = torch.float32) -> list[Tensor]:
    forms = itertools.cycle([(*shape, N), (N,), (*shape, 1), ()])
    count = programs.count_operands(fast.activation)
    return [torch.randn(form).to(dtype) for form, _ in zip(forms, range(count), strict=False)]


def expected(fast: Any, x: Tensor, beside: list[Tensor]) -> Tensor:
    y = torch.nn.functional.linear(x.double(), fast.weight.double(), fast.bias.double())
    return programs.apply(fast.activation, y, beside)


def check(fast: Any, x: Tensor, beside: list[Tensor], tolerance: float = 1e-5) -> None:
    with torch.no_grad():
        y = fast(x, *beside)
    assert y.dtype is x.dtype and y.is_contiguous() and not fast._elsewhere
    torch.testing.assert_close(y.double(), expected(fast, x, beside), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("dtype", ROUNDING)
@pytest.mark.parametrize("name", PROGRAMS)
def test_meaning(name: str, dtype: torch.dtype) -> None:
    """Every kind of program on the kernels, for layers and operands of every format."""
    torch.manual_seed(0)
    fast = layer(PROGRAMS[name]).to(dtype)
    for of in ROUNDING:
        for shape in ((7,), (2, 3), (0,), ()):
            check(fast, torch.randn(*shape, K).to(dtype), operands(fast, shape, of), ROUNDING[dtype])


@pytest.mark.parametrize(
    "quantize", [fastlinear.Int8Dynamic(), fastlinear.Int8WeightOnly()], ids=lambda q: type(q).__name__
)
def test_int8(quantize: Any) -> None:
    """A program follows integer products, and is that of the layer without it."""
    fast, plain = layer(("add", "relu"), quantize=quantize), nn.Linear(K, N)
    plain.load_state_dict(fast.state_dict())
    bare, x, r = FastLinear.from_linear(plain, quantize=quantize).eval(), torch.randn(5, K), torch.randn(5, N)
    with torch.no_grad():
        torch.testing.assert_close(fast(x, r), (bare(x) + r).relu(), rtol=1e-6, atol=1e-6)


def test_where_operands_lie() -> None:
    """Of any strides, expanded, of fewer dimensions, a number: read in place or laid out, never wrong."""
    fast, x = layer(("add",)), torch.randn(2, 3, K)
    for operand in (
        torch.randn(3, 2, N).transpose(0, 1),
        torch.randn(2, 3, 2 * N)[..., ::2],
        torch.randn(N, 3, 2).permute(2, 1, 0),
        torch.randn(2, 1, N),
        torch.randn(3, 1),
        torch.randn(1).expand(2, 3, N),
        torch.randn(2, 3, 1).expand(2, 3, N),
        -torch.randn(2, 3, N, dtype=torch.complex64).conj().imag,
    ):
        with torch.no_grad():
            torch.testing.assert_close(fast(x, operand).double(), expected(fast, x, [operand]), rtol=1e-5, atol=1e-5)
    check(fast, x, [torch.tensor(2.0)])
    with torch.no_grad():
        assert torch.equal(fast(x, 2), fast(x, torch.tensor(2.0)))


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("name", PROGRAMS)
def test_gradients(name: str, training: bool) -> None:
    """Of x, weight, bias and operands, also where one operand was made of another, as torch has them; twice, too."""
    torch.manual_seed(0)
    fast = layer(PROGRAMS[name]).train(training)
    x = torch.randn(3, 5, K, requires_grad=True)
    beside = [t.requires_grad_() for t in operands(fast)]
    made = [*beside[:1], *(t + beside[0].mean() for t in beside[1:])]
    inputs = [x, fast.weight, fast.bias, *beside]

    def both(y: Tensor) -> list[Tensor]:
        first = torch.autograd.grad(y.double().square().sum(), inputs, create_graph=True)
        return [*first, *torch.autograd.grad(first[0].square().sum(), [x, fast.weight])]

    want = both(programs.apply(fast.activation, nn.functional.linear(x, fast.weight, fast.bias), made))
    for _ in range(2):  # cold, and by the engine alone
        y = fast(x, *made)
        assert training or not fast._elsewhere
        for ours, theirs in zip(both(y), want, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-3)


def test_only_an_operand_wants_gradients() -> None:
    """A frozen layer passes them on to its operands."""
    fast, r = layer(("silu", "mul")), torch.randn(3, N, requires_grad=True)
    fastlinear.freeze(nn.Sequential(fast))
    x = torch.randn(3, K)
    for _ in range(2):
        (g,) = torch.autograd.grad(fast(x, r).sum(), r)
        torch.testing.assert_close(g.double(), expected(fast, x, [torch.ones(())]), rtol=1e-5, atol=1e-5)


class Residual(nn.Module):
    """A model that has such a layer in it."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor, mask: Tensor, r: Tensor) -> Any:
        return self.layer(x, mask, r)


def test_modes() -> None:
    """vmap over x and over operands, autocast, trace, FX, export, compile and opcheck."""
    fast, x = layer(("mul", "relu", "add")), torch.randn(3, 5, K)
    mask, r = torch.randn(3, 5, 1), torch.randn(N)
    with torch.no_grad():
        y = fast(x, mask, r)
        near = {"rtol": 1e-5, "atol": 1e-5}
        torch.testing.assert_close(torch.vmap(fast, (0, 0, None))(x, mask, r), y, **near)
        some = torch.vmap(fast, (None, 0, 1))(x[0], mask, r[:, None].expand(N, 3))
        torch.testing.assert_close(some[0], y[0], **near)
        torch.testing.assert_close(torch.jit.trace(fast, (x, mask, r))(x, mask, r), y, **near)
        torch.testing.assert_close(torch.fx.symbolic_trace(Residual(fast))(x, mask, r), y, **near)
        torch.testing.assert_close(torch.export.export(fast, (x, mask, r)).module()(x, mask, r), y, **near)
        with torch.autocast("cpu", torch.bfloat16):
            narrow = fast(x, mask, r)
        assert narrow.dtype is torch.bfloat16
        torch.testing.assert_close(narrow.float(), y, rtol=0.05, atol=0.05)
    compiled = torch.compile(fast, backend="aot_eager", fullgraph=True)
    for grad in (False, True):
        leaf = r.clone().requires_grad_(grad)
        torch.testing.assert_close(compiled(x, mask, leaf), y, **near)
    rest = fastlinear.layer.form.arguments(fast.activation, False, "fp32", fast._precision, ("", 0, 0), (mask, r))
    torch.library.opcheck(torch.ops.fastlinear.linear.default, (x, fast.weight, fast.bias, *rest))


def test_copies_and_files(tmp_path: Path) -> None:
    """A copy, a pickle, a state dict, a frozen and a saved layer compute the same; a file tells its program."""
    fast, x = layer(("relu", "add")), torch.randn(3, K)
    beside, other = operands(fast, (3,)), FastLinear(K, N, epilogue=("relu", "add")).eval()
    other.load_state_dict(fast.state_dict())
    for each in (copy.deepcopy(fast), pickle.loads(pickle.dumps(fast)), other):
        check(each, x, beside)
    model = nn.Sequential(fast)
    fastlinear.freeze(model)
    fastlinear.save(model, tmp_path / "m.safetensors")
    loaded = nn.Sequential(FastLinear(K, N, epilogue=("relu", "add")))
    check(fastlinear.load(tmp_path / "m.safetensors", loaded).eval()[0], x, beside)
    for wrong in (nn.Linear(K, N), FastLinear(K, N, epilogue=("add", "relu"))):
        with pytest.raises(fastlinear.FormatError, match=r"relu\+add@0|other activations"):
            fastlinear.load(tmp_path / "m.safetensors", nn.Sequential(wrong))
    assert "relu+add" in str(fastlinear.report(model)) and "epilogue=('relu', 'add')" in repr(fast)


def test_plans_are_of_the_program() -> None:
    """What was measured for one program is not taken for another."""
    keys = set()
    for steps in ((), ("relu",), ("add",), ("relu", "add"), (("mul", 0.5),), (("mul", 0.25),)):
        fast = layer(steps)
        x = torch.randn(2, K)
        check(fast, x, operands(fast, (2,)))
        engine = fast._engine
        keys.add(fast.problem(engine, engine.packed, 2, "fp32", 1).key())
    assert len(keys) == 6


@pytest.mark.parametrize(
    ("beside", "message"),
    [
        ([], r"takes 1 operand \('add'\) beside its input, but was given 0"),
        ([torch.zeros(N), torch.zeros(N)], "takes 1 operand .* but was given 2"),
        ([torch.zeros(4, N)], r"broadcast to its output of shape \(3, 40\), but operand 0 is of shape \(4, 40\)"),
        ([torch.zeros(1, 3, N)], "broadcast to its output"),
        (
            [torch.zeros(3, N, dtype=torch.float64)],
            "takes operands of torch.float32, .*, but operand 0 is torch.float64",
        ),
        ([torch.zeros(3, N, dtype=torch.int32)], "but operand 0 is torch.int32"),
        ([torch.zeros(3, N, device="meta")], "device of its input, cpu, but operand 0 is on meta"),
        (["r"], "takes tensors and numbers as operands, but was given 'r'"),
        ([None], "but was given None"),
    ],
)
def test_bad_operands_are_refused(beside: list[Any], message: str) -> None:
    """One sentence that names the layer, what was given and what is allowed, in eval and in training mode."""
    for fast in (layer(("add",)), layer(("add",)).train()):
        with pytest.raises((TypeError, ValueError), match="FusedLinear .*" + message):
            fast(torch.randn(3, K), *beside)


def test_who_sees_a_call() -> None:
    """A call with operands goes to the engine at once, but not past a hook, a forward of a user's own, or an operand
    that is more than its memory."""

    class Mine(torch.Tensor):
        pass

    fast, x, r = layer(("add",)).eval(), torch.randn(3, K), torch.randn(3, N)
    with torch.no_grad():
        y, seen = fast(x, r), list[Any]()
        assert type(fast)._is_quick
        assert type(fast(x, r.as_subclass(Mine))) is Mine
        with fast.register_forward_hook(lambda _layer, given, _y: seen.append(given)):
            assert torch.equal(fast(x, r), y)
        assert [len(given) for given in seen] == [2]
        kind = type("Own", (type(fast),), {"forward": lambda self, *given: seen.append(given)})
        assert not kind._is_quick


def test_bad_layers_are_refused() -> None:
    """Two answers, a script, a class that takes no operands."""
    with pytest.raises(ValueError, match="two answers"):
        FastLinear(K, N, activation="relu", epilogue=("add",))
    with pytest.raises(TypeError, match="cannot be scripted"):
        torch.jit.script(layer(("add",)))

    class Own(FastLinear):
        pass

    with pytest.raises(TypeError, match="Own takes no operands"):
        Own(K, N, epilogue=("add",))
