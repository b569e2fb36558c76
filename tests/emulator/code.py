"""Machine code for tests: assembled from text, called with integers in rdi, rsi, rdx, rcx, r8 and r9."""

import ctypes
import faulthandler
import itertools
import mmap
import os
import resource
import signal
import subprocess
import tempfile
from collections.abc import Callable
from functools import cache
from pathlib import Path

import emulator

_folder = tempfile.TemporaryDirectory(prefix="fastlinear-code-")
_numbers = itertools.count()


@cache
def assembled(text: str) -> bytes:
    """AT&T syntax -> bytes."""
    base = Path(_folder.name) / f"{next(_numbers)}"
    subprocess.run(["as", "-o", f"{base}.o"], input=text.replace(";", "\n") + "\n", text=True, check=True)
    subprocess.run(["objcopy", "-O", "binary", "-j", ".text", f"{base}.o", f"{base}.bin"], check=True)
    return base.with_suffix(".bin").read_bytes()


@cache
def function(code: bytes) -> tuple[Callable[..., int], mmap.mmap]:
    memory = mmap.mmap(-1, len(code) + 64, prot=mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC)
    memory.write(code + b"\xc3")
    prototype = ctypes.CFUNCTYPE(ctypes.c_uint64, *[ctypes.c_uint64] * 6)
    return prototype(ctypes.addressof(ctypes.c_char.from_buffer(memory))), memory


def call(text: str | bytes, *arguments: int) -> int:
    """rax of this code, which must not return itself; under the emulator."""
    emulator.install()
    code = text if isinstance(text, bytes) else assembled(text)
    return function(code)[0](*arguments, *[0] * (6 - len(arguments)))


def dies_of(text: str | bytes, *arguments: int) -> int:
    """The signal that ends a child which calls this code; 0 if it lives on."""
    code = text if isinstance(text, bytes) else assembled(text)
    child = os.fork()
    if child == 0:
        try:
            resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
            faulthandler.disable()
            for number in (signal.SIGILL, signal.SIGSEGV):
                signal.signal(number, signal.SIG_DFL)
            call(code, *arguments)
        finally:
            os._exit(0)
    return os.WTERMSIG(os.waitpid(child, 0)[1])
