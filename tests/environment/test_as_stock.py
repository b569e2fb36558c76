"""Modes and surroundings in which a fast layer keeps being fast, and behaves as the stock one does."""

import os
import stat
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import zygote
from models import OFF
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

import fastlinear
import fastlinear._kernels as _kernels
import fastlinear._reasons as _reasons
from fastlinear import FastLinear
from fastlinear.layer import fitness, lookup

K, N = 37, 70
SCHEMES: dict[str, dict[str, Any]] = {
    f"{name}{', frozen' * freeze}": {"freeze": freeze, **how}
    for name, how in {
        "fp32": {},
        "bf16": {"dtype": torch.bfloat16},
        "int8": {"quantize": fastlinear.Int8Dynamic()},
    }.items()
    for freeze in (False, True)
}
EVERY_SCHEME = pytest.mark.parametrize("how", SCHEMES.values(), ids=list(SCHEMES))


def reasons(layer: Any, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Why the calls of the layer from now on are not answered by its engine at once."""
    why: list[str] = []
    slow = type(layer)._slow

    def note(self: Any, x: torch.Tensor, reason: str, *rest: Any) -> torch.Tensor:
        why.append(reason)
        return slow(self, x, reason, *rest)

    monkeypatch.setattr(type(layer), "_slow", note)
    return why


# ---- default devices and observers -----------------------------------------------------------------------------------


@EVERY_SCHEME
def test_a_default_device_changes_nothing(how: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever it is, and however it is set: the same bits, from the engine."""
    fast, x = OFF(nn.Linear(K, N).eval(), **how), torch.randn(5, K)
    with torch.no_grad():
        expected = fast(x)
        why = reasons(fast, monkeypatch)
        for device in ("cpu", "meta"):
            with torch.device(device):
                assert torch.equal(fast(x), expected)
            with torch.device("cpu"), torch.device(device):
                assert torch.equal(fast(x), expected)
            torch.set_default_device(device)
            try:
                assert torch.equal(fast(x), expected)
            finally:
                torch.set_default_device(None)
    assert not why


@EVERY_SCHEME
def test_a_first_call_under_a_default_device(how: dict[str, Any]) -> None:
    """Packing and planning do not care for it either."""
    stock, x = nn.Linear(K, N).eval(), torch.randn(5, K)
    with torch.no_grad():
        expected = OFF(stock, **how)(x)
        for device in ("cpu", "meta"):
            with torch.device(device):
                fast = OFF(stock, **how)
                assert torch.equal(fast(x), expected) and fast.plans


class Observer(TorchFunctionMode):
    def __init__(self) -> None:
        self.seen: list[Any] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen.append(func)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("device", [False, True])
def test_observers_see_the_call(device: bool) -> None:
    """A mode of the user's own sees what it would see of a stock layer, also under a default device."""
    fast, x = OFF(nn.Linear(K, N).eval()), torch.randn(5, K)
    with torch.no_grad():
        fast(x)
        with Observer() as observer:
            if device:
                with torch.device("cpu"):
                    fast(x)
            else:
                fast(x)
    assert F.linear in observer.seen


# ---- what comes in ---------------------------------------------------------------------------------------------------


@EVERY_SCHEME
def test_a_parameter_as_input(how: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Learned queries are rows like any others: the same bits, from the engine; the output is no Parameter."""
    fast, query = OFF(nn.Linear(K, N).eval(), **how), nn.Parameter(torch.randn(5, K))
    with torch.no_grad():
        expected = fast(query.detach())
        why = reasons(fast, monkeypatch)
        y = fast(query)
        assert torch.equal(y, expected) and type(y) is Tensor and not why
    y = fast(query)
    assert y.requires_grad
    y.sum().backward()
    assert query.grad is not None


def negative(*shape: int) -> Tensor:
    """Lazily negated: a view whose memory holds the negative of what it is."""
    view = torch.randn(*shape, dtype=torch.cfloat).conj().imag
    assert view.is_neg()
    return view


def test_negative_views() -> None:
    """As input, weight or bias, before and after packing: torch answers, rightly."""
    stock, x = nn.Linear(K, N).eval().requires_grad_(False), torch.randn(5, K)
    fast = OFF(stock)
    with torch.no_grad():
        torch.testing.assert_close(fast(y := negative(5, K)), stock(y))
        for name, shape in (("bias", (N,)), ("weight", (N, K))):
            for layer in (stock, fast):
                torch.manual_seed(1)
                setattr(layer, name, nn.Parameter(negative(*shape), requires_grad=False))
            torch.testing.assert_close(fast(x), stock(x))
    assert fitness.why_unread(stock) == "its weight is a lazily negated or conjugated view"
    with pytest.warns(UserWarning, match="lazily negated"):
        OFF(stock)


def test_a_bias_of_another_class() -> None:
    """A subclass may mean something else than its memory says: its own function is called."""

    class Tenfold(Tensor):
        @classmethod
        def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            with torch._C.DisableTorchFunctionSubclass():
                result = func(*args, **(kwargs or {}))
                return result * 10 if isinstance(result, Tensor) else result

    fast, x = OFF(nn.Linear(K, N).eval()), torch.randn(5, K)
    with torch.no_grad():
        y = fast(x)
        fast._parameters["bias"] = fast.bias.detach().as_subclass(Tenfold)
        torch.testing.assert_close(fast(x), y * 10)


@pytest.mark.parametrize("shape", [(3,), (8, 1), (), (0,)])
def test_from_quantized_wants_one_bias_an_output(shape: tuple[int, ...]) -> None:
    """The error comes at once, and says which shape was given and which is wanted."""
    values, scale = torch.ones(8, 5, dtype=torch.int8), torch.ones(8)
    with pytest.raises(ValueError, match=r"bias must be \[8\], one number for each output feature, but is"):
        FastLinear.from_quantized(values, scale, bias=torch.ones(shape))


# ---- torch's ways to move parameters ---------------------------------------------------------------------------------


@pytest.mark.parametrize("what", ["half", "load_state_dict", "to meta and back"])
def test_swapped_parameters(what: str) -> None:
    """set_swap_module_params_on_conversion swaps the contents of parameters that a packed layer has seen."""
    stock = nn.Linear(K, N).eval()
    fast, x = OFF(nn.Linear(K, N).eval()), torch.randn(5, K)
    with torch.no_grad():
        fast(x)
        torch.__future__.set_swap_module_params_on_conversion(True)
        try:
            fast.load_state_dict(stock.state_dict())
            if what == "half":
                fast.half().float()
                stock.half().float()
            if what == "to meta and back":
                fast.to("meta").to_empty(device="cpu").load_state_dict(stock.state_dict())
        finally:
            torch.__future__.set_swap_module_params_on_conversion(False)
        torch.testing.assert_close(fast(x), stock(x))


@torch.no_grad()
def test_a_weight_that_went_is_not_kept() -> None:
    """Weights that are replaced after each call, as offloaded ones are, go; one that stays is packed after a while."""
    layer, x, gone = OFF(nn.Linear(K, N).eval()), torch.randn(5, K), []
    for _ in range(30):
        layer.weight = nn.Parameter(torch.randn(N, K))
        gone.append(weakref.ref(layer.weight))
        torch.testing.assert_close(layer(x), F.linear(x, layer.weight, layer.bias), rtol=1e-4, atol=1e-4)
        layer.weight = nn.Parameter(torch.empty(N, K, device="meta"))
    assert not any(each() is not None for each in gone)
    layer.weight = nn.Parameter(torch.randn(N, K))
    before = layer._elsewhere["its weight keeps changing"]
    for _ in range(20):
        layer(x)
    assert layer._elsewhere["its weight keeps changing"] - before == 8


@pytest.mark.parametrize("where", ["cpu", "disk", "a device_map"])
@pytest.mark.parametrize("freeze", [False, True], ids=["", "frozen"])
def test_offloaded_weights(where: str, freeze: bool, tmp_path: Path) -> None:
    """accelerate moves weights in before each call and out after it: right, and not packed for each call."""
    accelerate = pytest.importorskip("accelerate")
    model, x = nn.Sequential(nn.Linear(K, N), nn.ReLU(), nn.Linear(N, K)).eval(), torch.randn(5, K)
    fast = OFF(model, fuse=False, freeze=freeze)
    if where == "cpu":
        fast = accelerate.cpu_offload(fast, execution_device="cpu")
    elif where == "disk":
        fast = accelerate.disk_offload(fast, str(tmp_path), execution_device="cpu")
    else:
        places = {"0": "cpu", "1": "cpu", "2": "disk"}
        fast = accelerate.dispatch_model(fast, places, main_device="cpu", offload_dir=str(tmp_path))
    with torch.no_grad():
        expected = model(x)
        for _ in range(20):
            torch.testing.assert_close(fast(x), expected)


# ---- the environment -------------------------------------------------------------------------------------------------


@EVERY_SCHEME
def test_disable_is_obeyed_by_planned_layers(how: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """FASTLINEAR_DISABLE=1 at any time: the engine answers no more, and does once it is gone."""
    fast, x = OFF(nn.Linear(K, N).eval(), **how), torch.randn(5, K)
    with torch.no_grad():
        y = fast(x)
        why = reasons(fast, monkeypatch)
        monkeypatch.setenv("FASTLINEAR_DISABLE", "1")
        fast(x), fast(x)
        monkeypatch.delenv("FASTLINEAR_DISABLE")
        assert torch.equal(fast(x), y)
    assert why == [_reasons.DISABLED] * 2


@pytest.mark.parametrize("name", [row["name"] for row in _kernels.kernels() if row["runnable"]])
def test_a_late_override(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """FASTLINEAR_KERNEL that is set after layers were packed never makes a call raise."""
    stock, x = nn.Linear(K, N).eval(), torch.randn(5, K)
    fast = OFF(stock)
    with torch.no_grad():
        fast(x)
        monkeypatch.setenv("FASTLINEAR_KERNEL", name)
        for m in (1, 3, 20):
            x = torch.randn(m, K)
            torch.testing.assert_close(fast(x), stock(x), rtol=1e-4, atol=1e-4)


FORK = """
import logging, os, sys, torch, fastlinear
from torch import nn
torch.set_num_threads(2)
logging.basicConfig(stream=sys.stdout)
fast, x = fastlinear.convert(nn.Linear(1024, 1024).eval(), tune="off"), torch.randn(64, 1024)
with torch.no_grad():
    if os.environ["BEFORE"] == "ran":
        y = fast(x)
        (x @ torch.randn(1024, 1024)).exp()
    pid = os.fork()
    z = fast(x)
    (x @ torch.randn(1024, 1024)).exp()
if pid == 0:
    print(fastlinear._products.num_threads(), fastlinear._products.forked(), flush=True)
    os._exit(0)
assert os.waitpid(pid, 0)[1] == 0 and (os.environ["BEFORE"] != "ran" or torch.equal(y, z))
"""


@pytest.mark.parametrize("before", ["ran", "fresh"])
def test_forked_children_have_all_threads(before: str) -> None:
    """Whether the parent had computed in parallel or not, and torch's own operators work there, too."""
    run = zygote.run(FORK, BEFORE=before)
    assert run.returncode == 0, run.stderr
    assert run.stdout == "2 False\n"


# ---- the operator ----------------------------------------------------------------------------------------------------


def test_the_operator_looks_for_a_layer_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """With many layers alive, neither hits nor misses ask all of them in each call; a new layer is found."""
    layers = [OFF(nn.Linear(8, 8).eval().requires_grad_(False)) for _ in range(50)]
    asked: list[Any] = []
    real = lookup._weight_of
    monkeypatch.setattr(lookup, "_weight_of", lambda layer: asked.append(layer) or real(layer))
    x, foreign = torch.randn(3, 8), torch.randn(8, 8)
    op = torch.ops.fastlinear.linear.default
    for weight in (foreign, *(layer.weight for layer in layers)):
        op(x, weight, None, "identity", [], False)
    asked.clear()
    for _ in range(5):
        op(x, foreign, None, "identity", [], False)
    assert not asked
    layer = OFF(nn.Linear(8, 8, bias=False).eval().requires_grad_(False))
    layer.weight = nn.Parameter(foreign, requires_grad=False)
    torch.testing.assert_close(op(x, foreign, None, "identity", [], False), x @ foreign.T)
    assert layer.pack_nbytes > 0


# ---- files -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", [0o664, 0o600, 0o644])
def test_saving_again_keeps_the_mode(mode: int, tmp_path: Path) -> None:
    """Of a file that is replaced, whatever the umask."""
    path, fast = tmp_path / "model.safetensors", OFF(nn.Linear(8, 8).eval(), freeze=True)
    fastlinear.save(fast, path)
    path.chmod(mode)
    before = os.umask(0o022)
    try:
        fastlinear.save(fast, path)
    finally:
        os.umask(before)
    assert stat.S_IMODE(path.stat().st_mode) == mode
