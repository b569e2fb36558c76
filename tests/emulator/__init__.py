"""Instructions that this CPU lacks, carried out where they fault: the door to tests/emulator/*.cpp.

`running()` is all that most tests need: within it the package believes to be on a machine that has everything, and the
machine code that ships runs, on whatever thread.
"""

import ctypes
import fcntl
import os
import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import machines
from torch import Tensor

import fastlinear._kernels as _kernels

HERE = Path(__file__).resolve().parent


@cache
def own() -> "tempfile.TemporaryDirectory[str]":
    return tempfile.TemporaryDirectory(prefix="fastlinear-emulator-")


def shared_object(source: Path, *options: str) -> ctypes.CDLL:
    """A C++ file of the tests, loaded; the processes of a run of the tests compile it once."""
    folder = Path(os.environ.get("TESTS_BUILD_FOLDER") or own().name)
    target = folder / f"{source.stem}.so"
    with (folder / f"{source.stem}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not target.exists():
            flags = ["-std=c++20", "-fPIC", "-shared", "-fvisibility=hidden", "-ffp-contract=off", *options]
            subprocess.run([*os.environ.get("CXX", "g++").split(), *flags, source, "-o", target], check=True)
    return ctypes.CDLL(str(target))


@cache
def library() -> ctypes.CDLL:
    """The emulator itself, compiled when it is first asked for."""
    found = shared_object(HERE / "emulator.cpp", "-O1")
    for name, result in (
        ("kinds", ctypes.c_size_t),
        ("kind", ctypes.c_char_p),
        ("count", ctypes.c_uint64),
        ("faults", ctypes.c_uint64),
        ("live", ctypes.c_int64),
        ("watch", ctypes.c_bool),
        ("report", ctypes.c_char_p),
        ("knows", ctypes.c_size_t),
    ):
        getattr(found, f"emulator_{name}").restype = result
    return found


def install() -> None:
    """From now on undefined instructions are emulated, also if another handler of SIGILL came in between."""
    library().emulator_install()


def remove() -> None:
    library().emulator_remove()


def counts() -> Counter[str]:
    """How many of each instruction were carried out since `reset`."""
    names = {i: library().emulator_kind(ctypes.c_size_t(i)) for i in range(library().emulator_kinds())}
    return +Counter({n.decode(): library().emulator_count(ctypes.c_size_t(i)) for i, n in names.items() if n})


def faults() -> int:
    return int(library().emulator_faults())


def live() -> int:
    """Threads whose tiles are configured."""
    return int(library().emulator_live())


def reports() -> list[str]:
    """What went wrong unpunished since `reset`."""
    found = []
    while (text := library().emulator_report(ctypes.c_size_t(len(found)))) is not None:
        found.append(text.decode())
    return found


def reset() -> None:
    library().emulator_reset()


def watch(matrix: Tensor, name: str) -> None:
    """Tiles may be loaded from the rows of a 2-d tensor, not from what lies between and around them."""
    rows, columns = matrix.shape
    stride, size = matrix.stride(0) * matrix.element_size(), matrix.element_size()
    sizes = (ctypes.c_size_t(n) for n in (rows, columns * size, max(stride, columns * size)))
    assert library().emulator_watch(ctypes.c_void_p(matrix.data_ptr()), *sizes, name.encode()), "too many matrices"


def knows(code: bytes) -> int:
    """Length of the instruction that these bytes begin with, if it is emulated, else 0."""
    return int(library().emulator_knows(code + bytes(16)))


@contextmanager
def running(machine: dict[Any, Any] | None = machines.EVERYTHING) -> Iterator[None]:
    """The emulator at work, and the package on that machine; as before at the end, but for the counts.

    Fails if a call leaves tiles configured, uses them without a configuration, or reads beyond what is watched.
    """
    install()
    _kernels.pretend(machine)
    before = live(), len(reports())
    try:
        yield
    finally:
        _kernels.pretend(None)
    assert live() == before[0], f"{live() - before[0]} threads were left with their tiles configured"
    assert len(reports()) == before[1], reports()
