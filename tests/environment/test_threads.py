"""Many threads, forks, processes and environments: outputs stay right, tuning happens once, and nothing hangs."""

import os
import subprocess
import sys
import threading
from collections.abc import Callable
from typing import Any

import native
import pytest
import torch
import zygote
from torch import Tensor, nn

import fastlinear
import fastlinear._kernels as _kernels
import fastlinear._products as _products
import fastlinear._tensors as _tensors
from fastlinear import FastLinear
from fastlinear.layer import linear
from fastlinear.plan import race, rivals
from fastlinear.spec import activations

TIMEOUT = 60  # seconds, for what should take one or two: a hang is told from a slow machine


def layer_of(n: int, k: int, tune: str = "off", conv1d: bool = False, dtype: torch.dtype = torch.float32) -> nn.Module:
    if conv1d:
        from transformers.pytorch_utils import Conv1D

        layer: nn.Module = Conv1D(n, k)
    else:
        layer = nn.Linear(k, n)
    layer.to(dtype)
    linear.adopt(layer, activations.resolve("gelu"), tune)
    return layer.eval().requires_grad_(False)


def expected(layer: nn.Module, x: Tensor) -> Tensor:
    weight = layer.weight.t() if layer._transposed else layer.weight
    return activations.apply(layer.activation, torch.nn.functional.linear(x, weight, layer.bias))


def in_threads(count: int, work: Callable[[int], object]) -> None:
    """Runs work(0) ... work(count - 1) at once, switching threads as often as Python can; raises what they raise."""
    start, failures = threading.Barrier(count), []

    def run(i: int) -> None:
        try:
            start.wait(TIMEOUT)
            work(i)
        except BaseException as error:  # carried to the test
            failures.append(error)

    threads = [threading.Thread(target=run, args=(i,), daemon=True) for i in range(count)]
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(TIMEOUT)
        assert not any(thread.is_alive() for thread in threads), "deadlock"
    finally:
        sys.setswitchinterval(interval)
    if failures:
        raise failures[0]


def child(code: str, imported: str = "", **env: str) -> tuple[str, str]:
    """(stdout, stderr) of a fresh Python, or one that has imported something, that runs `code` and must end well."""
    fresh = [sys.executable, "-c", code]
    if imported:
        done = zygote.run(code, imported=imported, **env)
    else:
        done = subprocess.run(fresh, env=os.environ | env, capture_output=True, text=True, timeout=TIMEOUT, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout, done.stderr


# ---- threads ---------------------------------------------------------------------------------------------------------


def test_one_untuned_layer_in_16_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first call, sixteen times at once: every output is right and the tuner has run once."""
    layer, x = layer_of(72, 104, "lazy"), torch.randn(6, 104)
    tunings: list[str] = []
    choose = race.choose
    monkeypatch.setattr(race, "choose", lambda *a, **kw: tunings.append("one") or choose(*a, **kw))
    outputs: list[Tensor] = [torch.empty(0)] * 16

    def work(i: int) -> None:
        for _ in range(20):
            outputs[i] = layer(x)

    in_threads(16, work)
    assert tunings == ["one"]
    for y in outputs:
        torch.testing.assert_close(y, expected(layer, x))


def test_many_layers_and_batches_in_parallel() -> None:
    """Threads that share layers, each beginning with another layer and batch size, do not disturb one another."""
    layers = [layer_of(64 + 8 * i, 512) for i in range(8)]
    xs = [torch.randn(m, 512) for m in (1, 3, 7, 16, 33, 64, 100, 130)]
    wanted = {(i, j): expected(layer, x) for i, layer in enumerate(layers) for j, x in enumerate(xs)}

    def work(t: int) -> None:
        for i in range(8):
            for j in range(8):
                key = (i + t) % 8, (j + t) % 8
                torch.testing.assert_close(layers[key[0]](xs[key[1]]), wanted[key], rtol=1e-4, atol=1e-4)

    in_threads(8, work)


@pytest.mark.parametrize("features", [(64, 64), (64, 6400)])
def test_weights_change_while_others_compute(features: tuple[int, int]) -> None:
    """Another weight, even of another size, set amid calls: each output is that of one of the weights."""
    layer, x = layer_of(64, 64), torch.randn(5, 64)
    layer.bias = None
    weights = [nn.Parameter(torch.randn(n, 64), requires_grad=False) for n in features]
    wanted = [activations.apply(layer.activation, x @ weight.t()) for weight in weights]
    layer.weight = weights[0]

    def work(t: int) -> None:
        for i in range(200):
            if t == 0:
                layer.weight = weights[i % 2]
            y = layer(x)
            assert any(y.shape == each.shape and torch.allclose(y, each, atol=1e-4) for each in wanted)

    in_threads(6, work)


@pytest.mark.parametrize("frozen", [False, True])
def test_frozen_or_thawed_during_a_call_with_gradients(frozen: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Others freeze or thaw a layer and call it, between its product and what gives that gradients: these are right."""
    module: Any = nn.Sequential(layer_of(24, 40)).requires_grad_()
    layer, x = module[0], torch.randn(3, 40, requires_grad=True)
    if frozen:
        fastlinear.freeze(module)
    native = type(layer)._native

    def meanwhile(self: Any, *args: Any) -> Any:
        y = native(self, *args)
        monkeypatch.undo()
        (fastlinear.unfreeze if frozen else fastlinear.freeze)(module)
        with torch.no_grad():
            module(x)  # which packs anew
        return y

    monkeypatch.setattr(type(layer), "_native", meanwhile)
    y = module(x)
    y.sum().backward()
    want = torch.autograd.grad(expected(layer, x).sum(), x)[0]
    torch.testing.assert_close(y, expected(layer, x))
    torch.testing.assert_close(x.grad, want)


def test_the_number_of_threads_is_torchs() -> None:
    """A plan is for torch's number of threads of the moment."""
    layer, x = layer_of(1024, 512), torch.randn(64, 512)
    for count in (1, 2, 1):
        torch.set_num_threads(count)
        torch.testing.assert_close(layer(x), expected(layer, x), rtol=1e-4, atol=1e-4)
        assert _products.num_threads() == count
        assert [(c.threads, c.plan_threads) for c in layer.plans] == [(count, count)]


@pytest.mark.parametrize("kernel", native.RUNNABLE, ids=lambda kernel: kernel["id"])
@pytest.mark.parametrize("k_slices", [1, 2, 3])
def test_same_bits_for_any_number_of_threads(kernel: native.Kernel, k_slices: int) -> None:
    """Under one kernel and slicing, threads and repetition do not change a bit."""
    x, weight, bias = native.random_case(37, 130, 700, kernel["dtypes"][-1])
    outs = []
    for threads in (1, 2, 2, 2, 5):
        torch.set_num_threads(min(threads, 2))
        outs.append(native.run(kernel, x, weight, bias, threads=threads, k_slices=k_slices))
    assert all(native.same_bits(y, outs[0]) for y in outs)


# ---- processes -------------------------------------------------------------------------------------------------------

SETUP = """
import os, sys, time, threading, multiprocessing
import torch
import fastlinear._products as _products
from fastlinear.layer.lock import lock
from fastlinear import FastLinear

def layer_of(n):
    layer = FastLinear(512, n, activation="relu").eval().requires_grad_(False)
    layer._tune = "off"
    return layer

torch.manual_seed(0)
big, new = layer_of(256), layer_of(128)
x = torch.randn(64, 512)
want = [torch.relu(x @ layer.weight.t() + layer.bias) for layer in (big, new)]
"""

FORKS = (
    SETUP
    + """
def work():
    assert not _products.forked() and _products.num_threads() == 2
    for layer, y in zip((big, new), want):
        assert torch.allclose(layer(x), y, atol=1e-4)

def forked():
    pid = os.fork()
    if pid == 0:
        try:
            work()
            os._exit(0)
        finally:
            os._exit(1)
    for _ in range(200):
        if (done := os.waitpid(pid, os.WNOHANG))[0]:
            return os.waitstatus_to_exitcode(done[1])
        time.sleep(0.05)
    os.kill(pid, 9)
    return "hangs"

torch.set_num_threads(2)
big(x)
assert [chosen.plan_threads for chosen in big.plans] == [2]
print("after a parallel region:", forked())

held, release = threading.Event(), threading.Event()
def hold():
    with lock:
        held.set()
        release.wait()
holder = threading.Thread(target=hold)
holder.start()
held.wait()
print("while another thread tunes:", forked())
release.set()
holder.join()

process = multiprocessing.get_context("fork").Process(target=work)
process.start()
process.join(10)
print("multiprocessing:", process.exitcode)
if process.exitcode is None:
    process.kill()

class Embedded(torch.utils.data.Dataset):
    def __len__(self):
        return 8
    def __getitem__(self, i):
        return big(x)[i]

loader = torch.utils.data.DataLoader(Embedded(), 4, num_workers=2, timeout=20, multiprocessing_context="fork")
print("DataLoader:", torch.allclose(torch.cat(list(loader)), want[0][:8], atol=1e-4))
print("the parent:", torch.allclose(big(x), want[0], atol=1e-4), _products.num_threads())
"""
)


def test_forked_children_return() -> None:
    """After a parallel region, while the lock is held, in multiprocessing and in DataLoader workers."""
    out, _ = child(FORKS)
    assert out.splitlines() == [
        "after a parallel region: 0",
        "while another thread tunes: 0",
        "multiprocessing: 0",
        "DataLoader: True",
        "the parent: True 2",
    ]


THREADS = (
    SETUP
    + """
count = lambda: len(os.listdir("/proc/self/task"))
torch.set_num_threads(1)
before = count()
big(x)
print(count() - before)
torch.set_num_threads(2)
big(x)
print(count() - before)
maps = {line.split()[-1] for line in open("/proc/self/maps") if "gomp" in line or "libiomp" in line}
print(len(maps), torch.allclose(big(x), want[0], atol=1e-4))
"""
)


@pytest.mark.parametrize(
    "first",
    [
        pytest.param("import numpy, torch, fastlinear", marks=pytest.mark.exhaustive),
        "import fastlinear, torch, numpy",
    ],
)
@pytest.mark.skipif(not os.path.exists("/proc/self/maps"), reason="threads and libraries are read from Linux's /proc")
def test_torchs_own_pool_is_the_only_one(first: str) -> None:
    """One OpenMP library whatever is imported first, no thread more than set_num_threads allows, nothing printed."""
    out, err = child(first + "\n" + THREADS, OMP_NUM_THREADS="1")
    assert out.splitlines() == ["0", "1", "1 True"] and err == ""


# ---- environment -----------------------------------------------------------------------------------------------------


ISA = """
import torch, fastlinear
from fastlinear.plan import race
choose = race.choose
race.choose = lambda candidates, *rest, **more: (
    print(*(candidate.name for candidate in candidates)) or choose(candidates, *rest, **more))
isas = {row["name"]: row["isa"] for row in fastlinear.kernels() if row["runnable"]}
print(",".join(dict.fromkeys(reversed(isas.values()))), ",".join(fastlinear.cpu_info()["isas"]))
for dtype in (torch.float32, torch.bfloat16, torch.float16):
    layer = fastlinear.FastLinear(64, 48, dtype=dtype).eval().requires_grad_(False)
    layer(torch.randn(3, 64, dtype=dtype))
"""


@pytest.mark.parametrize("isa", _kernels.cpu_info()["isas"][:3])
def test_max_isa(isa: str) -> None:
    """FASTLINEAR_MAX_ISA hides every kernel above it from the table, the tuner and the plans, in every dtype."""
    out, err = child(ISA, imported="torch", FASTLINEAR_MAX_ISA=isa)
    isas, *tuned = out.splitlines()
    known = _kernels.cpu_info()["isas"]
    allowed = known[: 1 + known.index(isa)]
    assert isas == f"{','.join(allowed)} {','.join(allowed)}" and err == "" and len(tuned) == 3
    for table in tuned:
        names = [name for name in table.split() if name.count("/") == 2]
        assert names and all(name.split("/")[1] in allowed for name in names)


FORMATS = _tensors.FORMATS.values()


def test_an_unknown_isa_is_told() -> None:
    """It counts as unset, as other variables do, which the log says once and in one sentence: the variable, the value,
    what is allowed. The command line says it and does nothing."""
    allowed = ", ".join(_kernels.isas())
    said = f"FASTLINEAR_MAX_ISA is 'avx3', which is none of {allowed}"
    code = "import fastlinear\nfor _ in range(3):\n    print(*fastlinear.cpu_info()['isas'])"
    unset, _ = child(code, imported="torch", FASTLINEAR_MAX_ISA="")
    out, err = child(code, imported="torch", FASTLINEAR_MAX_ISA="avx3")
    assert out == unset and err == f"{said}: every instruction set of this CPU may run\n"
    code = "from fastlinear.cli.commands import main\nfor command in ('info', 'check'):\n    print(main([command]))"
    out, err = child(code, imported="torch", FASTLINEAR_MAX_ISA="avx3")
    assert out == "2\n2\n" and err == f"fastlinear: {said}\n" * 2


WAYS = [
    (k["name"], native.DTYPES[k["format"]], k["accumulate"], k["id"]) for k in native.RUNNABLE if k["format"] in FORMATS
]
WAYS += [(name, torch.float32, "fp32", name) for name in rivals.NAMES]
FP16_SUMS = {"atol": 0.01, "rtol": 0.01}  # of 64 products


@pytest.mark.parametrize("conv1d", [False, True])
@pytest.mark.parametrize(("kernel", "dtype", "accumulate"), [way[:3] for way in WAYS], ids=[way[3] for way in WAYS])
def test_kernel_override(
    kernel: str, dtype: torch.dtype, accumulate: str, conv1d: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """FASTLINEAR_KERNEL is what runs, in every batch size, for Linear and Conv1D, and nothing is measured."""
    if kernel == "torch/mkl" and not torch.backends.mkl.is_available():
        pytest.skip("this torch is built without MKL")
    monkeypatch.setenv("FASTLINEAR_KERNEL", kernel)
    monkeypatch.setattr(race, "choose", None)
    layer = layer_of(48, 64, "lazy", conv1d, dtype)
    for shape in ((1, 64), (2, 3, 64), (50, 64), (64,), (0, 64)):
        x = torch.randn(shape).to(dtype)
        within = FP16_SUMS if accumulate == "fp16" else {}
        torch.testing.assert_close(layer(x), expected(layer, x), **within)
    assert {(chosen.name, chosen.source) for chosen in layer.plans} == {(kernel, "override")}


def test_an_unknown_kernel_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """In one sentence that names the variable, the value and what is allowed; the layer works once it is gone."""
    layer, x = layer_of(48, 64), torch.randn(3, 64)
    monkeypatch.setenv("FASTLINEAR_KERNEL", "fp32/abacus")
    with pytest.raises(
        ValueError, match=r"FASTLINEAR_KERNEL is 'fp32/abacus', which is no kernel; near it are .*fp32/"
    ):
        layer(x)
    monkeypatch.delenv("FASTLINEAR_KERNEL")
    torch.testing.assert_close(layer(x), expected(layer, x))


def test_disable(monkeypatch: pytest.MonkeyPatch) -> None:
    """FASTLINEAR_DISABLE=1 leaves everything to torch, bit for bit."""
    monkeypatch.setenv("FASTLINEAR_DISABLE", "1")
    layer, x = layer_of(48, 64, "lazy"), torch.randn(3, 64)
    assert torch.equal(layer(x), expected(layer, x))
    assert layer.pack_nbytes == 0 and not layer.plans
    monkeypatch.setenv("FASTLINEAR_DISABLE", "0")
    layer._tune = "off"
    layer(x)
    assert layer.pack_nbytes > 0


def test_autotune_off(monkeypatch: pytest.MonkeyPatch) -> None:
    """FASTLINEAR_AUTOTUNE=0 measures nothing, and gives equal layers equal plans and bits."""
    monkeypatch.setenv("FASTLINEAR_AUTOTUNE", "0")
    monkeypatch.setattr(race, "choose", None)
    layer, x = layer_of(136, 88, "lazy"), torch.randn(11, 88)
    other = FastLinear.from_linear(nn.Linear(88, 136), "gelu").eval().requires_grad_(False)
    other.load_state_dict(layer.state_dict())
    assert torch.equal(layer(x), other(x))
    assert layer.plans == other.plans and {c.source for c in layer.plans} == {"heuristic"}


def test_verbose(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    """FASTLINEAR_VERBOSE=1 prints the table of a tuning to stderr, best first; by default nothing is printed."""
    layer_of(40, 56, "lazy")(torch.randn(3, 56))
    assert capfd.readouterr() == ("", "")
    monkeypatch.setenv("FASTLINEAR_VERBOSE", "1")
    layer = layer_of(40, 72, "lazy")
    layer(torch.randn(3, 72))
    out, err = capfd.readouterr()
    head, *rows, verdict = err.splitlines()
    assert out == "" and head.startswith("AUTOTUNE linear(3x72, 40x72)")
    milliseconds = [float(row.split(" ms ")[0].split()[-1]) for row in rows]
    assert milliseconds == sorted(milliseconds) and len(rows) == len(layer.plans[0].table) >= 2
    assert layer.plans[0].name in verdict


FORK_IN_BACKWARD = """
import os, signal, threading, torch, fastlinear
from fastlinear.layer import gradient

torch.set_num_threads(1)
layer = fastlinear.FastLinear(8, 4).eval().requires_grad_(False)
x = torch.ones(2, 8, requires_grad=True)
layer(x)
held = threading.Event()

def hold():
    with gradient.lock:
        held.set()
        threading.Event().wait()

threading.Thread(target=hold, daemon=True).start()
held.wait()
child = os.fork()
if child == 0:
    signal.alarm(30)
    layer(x).sum().backward()
    os._exit(0)
print(os.waitpid(child, 0)[1], flush=True)
os._exit(0)
"""


def test_a_fork_while_another_thread_packs_for_its_backward() -> None:
    """The child goes back through its own pack: the lock of packing is its own, too."""
    out, _ = child(FORK_IN_BACKWARD, imported="fastlinear")
    assert out == "0\n"
