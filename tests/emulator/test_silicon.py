"""The kernels of AMX beside others' use of tiles, threads, forks and signals: on silicon, else emulated."""

import os
import signal
import threading
from collections.abc import Callable

import library
import native
import pytest
import torch
import zygote
from refusal import refuse_tiles
from torch import Tensor
from torch.nn import functional as F

import fastlinear._kernels as _kernels
import fastlinear._plans as _plans

needs_amx = pytest.mark.skipif("skipped" in library.way("amx"), reason=f"amx is {library.way('amx')}")
on_silicon = pytest.mark.skipif(library.way("amx") != library.NATIVELY, reason=f"amx is {library.way('amx')}")
ROWS = [kernel for kernel in native.ALL if kernel["isa"] == "amx" and kernel["id"] == kernel["name"]]


def product(kernel: native.Kernel, m: int, n: int, k: int) -> Callable[[], Tensor]:
    """A product of random numbers on a kernel, which gives the same bits whenever it is computed."""
    integers = kernel["accumulate"] == "int32"
    x = torch.randn(m, k).bfloat16()
    w = torch.randint(-127, 128, (n, k)).to(torch.int8) if integers else torch.randn(n, k).bfloat16()
    packed = native.pack(w, kernel["layout"])
    rows = _plans.RowQuantizer("symmetric") if integers else None

    def compute() -> Tensor:
        return native.product(kernel, packed, x, None, (), 1, 1, torch.full((m, n), torch.nan), rows)

    return compute


def test_a_system_that_refuses_tiles_is_believed() -> None:
    """No AMX, with the reason, and nothing else is lost."""

    def refused(_: native.Note) -> None:
        refuse_tiles()
        _kernels.pretend(None)
        known = _kernels.cpu_info()
        assert "amx" not in known["isas"] and "amx" in known["refused"]

    native.in_child(refused)


def theirs() -> Callable[[], Tensor]:
    """A product of torch's, which oneDNN computes in tiles where it can."""
    x, w = torch.randn(48, 96).bfloat16(), torch.randn(80, 96).bfloat16()
    return lambda: F.linear(x, w)


@needs_amx
def test_turns_with_torch_on_one_thread_and_on_many() -> None:
    """torch's products in bf16 and ours, in turns, on the same threads: each has the bits that it has alone."""
    calls = [theirs(), *(product(kernel, 40, 70, 100) for kernel in ROWS)]
    expected, wrong = [call() for call in calls], []

    def turns() -> None:
        for _ in range(20):
            for i, call in enumerate(calls):
                if not torch.equal(call(), expected[i]):
                    wrong.append(i)

    threads = [threading.Thread(target=turns) for _ in range(4)]
    turns()
    if library.way("amx") == library.NATIVELY:  # a pretended machine is that of the whole process
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert not wrong


@needs_amx
def test_a_child_has_tiles_of_its_own() -> None:
    """Forked between two products of the parent, a child computes the same, and its own children do."""
    compute = product(ROWS[0], 40, 70, 100)
    expected = compute()

    def child(_: native.Note) -> None:
        assert torch.equal(compute(), expected)
        native.in_child(lambda _: None if torch.equal(compute(), expected) else os.abort())

    native.in_child(child)
    assert torch.equal(compute(), expected)


@on_silicon
def test_signals_in_the_midst_of_a_product() -> None:
    """A handler that runs a thousand times a second, and itself uses tiles, changes nothing."""
    compute, inner = product(ROWS[0], 200, 320, 640), theirs()
    expected, met = compute(), []

    def handler(*_: object) -> None:
        met.append(inner())

    before = signal.signal(signal.SIGALRM, handler)
    signal.setitimer(signal.ITIMER_REAL, 1e-3, 1e-3)
    try:
        while len(met) < 30:
            assert torch.equal(compute(), expected)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert all(torch.equal(each, met[0]) for each in met)


SMALL_STACK = """
import ctypes
stack = ctypes.create_string_buffer(2048)
class Stack(ctypes.Structure):
    _fields_ = [("at", ctypes.c_void_p), ("flags", ctypes.c_int), ("size", ctypes.c_size_t)]
libc = ctypes.CDLL(None)
assert libc.sigaltstack(ctypes.byref(Stack(ctypes.addressof(stack), 0, 2048)), None) == 0
import fastlinear
info = fastlinear.cpu_info()
assert "amx" not in info["isas"] and "signal stack" in info["refused"]["amx"], info
"""


@on_silicon
def test_a_small_signal_stack_stands_in_the_way() -> None:
    """Linux refuses tiles while a thread's signal stack is too small for them; `info` says that."""
    zygote.checked(SMALL_STACK)
