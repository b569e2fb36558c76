"""How each ISA is executed here, and the library's own sources compiled behind one C function.

The installed library runs everything of the table: what CPUID allows as users run it, what it hides on a machine that
it is made to believe in, natively where a probe shows that the CPU executes it, else with the help of tests/emulator.
A build of its sources with some of them changed makes the mutants.
"""

import ctypes
import faulthandler
import mmap
import os
import re
import resource
import signal
import subprocess
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path

import emulator
import torch
from torch import Tensor

import fastlinear._kernels as _kernels
import fastlinear._plans as _plans
import fastlinear._tensors as _tensors
import fastlinear._weights as _weights

ROOT = Path(__file__).resolve().parent.parent
Steps = Iterable[tuple[str, tuple[float, ...]]]
FORMATS = [*_tensors.PACKED, "uint8"]  # in the order of enum Format
OF_DTYPE = {**_tensors.FORMATS, torch.int8: "int8", torch.uint8: "uint8"}  # of x, biases and outputs
FUNCTIONS = list(_kernels.functions())

# ---- how an ISA is executed ------------------------------------------------------------------------------------------

NATIVELY, HIDDEN, EMULATED = "natively", "natively, though CPUID hides it", "emulated"
# What the emulator knows, and what it needs itself.
EMULATIONS = {"amx": "avx512", "amx_fp16": "avx512", "avx512_fp16": "avx512", "avx_vnni": "avx2"}

# One instruction that only this ISA has, and a return.
PROBES = {
    "avx_vnni": bytes.fromhex("c4e27d50c0 c3"),  # {vex} vpdpbusd %ymm0,%ymm0,%ymm0
    "avx512_vnni": bytes.fromhex("62f27d4850c0 c3"),  # vpdpbusd %zmm0,%zmm0,%zmm0
    "avx512_bf16": bytes.fromhex("62f27e4852c0 c3"),  # vdpbf16ps %zmm0,%zmm0,%zmm0
    "avx512_fp16": bytes.fromhex("62f57c4858c0 c3"),  # vaddph %zmm0,%zmm0,%zmm0
}


def executes(code: bytes) -> bool:
    """Whether a child process that calls these bytes lives on, without help."""
    child = os.fork()
    if child == 0:
        faulthandler.disable()
        signal.signal(signal.SIGILL, signal.SIG_DFL)
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        memory = mmap.mmap(-1, mmap.PAGESIZE, prot=mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC)
        memory.write(code)
        ctypes.CFUNCTYPE(None)(ctypes.addressof(ctypes.c_char.from_buffer(memory)))()
        os._exit(0)
    return os.waitpid(child, 0)[1] == 0


@cache
def way(isa: str) -> str:
    """NATIVELY, HIDDEN, EMULATED, or "skipped: " and the reason."""
    known = _kernels.cpu_info()["isas"]
    if isa in known:
        return NATIVELY
    if "FASTLINEAR_MAX_ISA" in os.environ:
        return f"skipped: FASTLINEAR_MAX_ISA is {os.environ['FASTLINEAR_MAX_ISA']}"
    if isa in PROBES and executes(PROBES[isa]):
        return HIDDEN
    if EMULATIONS.get(isa) in known:
        return EMULATED
    return f"skipped: this CPU has no {isa}"


# ---- the library, built here -----------------------------------------------------------------------------------------


def system_headers(source: Path) -> list[str]:
    """Those that all CPUs' code may include."""
    return re.findall(r"^#include <(\w+|immintrin\.h)>$", source.read_text(), re.MULTILINE)


PRODUCT = ROOT / "tests/kernel/product.cpp"
UNUSED = re.compile(r"(\.(?:norm|attention|few_queries|rounded_attention|rotation|expand_scales)) = .*,$", re.MULTILINE)


def of_products(unit: Path, folder: Path) -> Path:
    """A copy of an ISA's unit without the functions that no product calls, which take half of the time to compile."""
    copy = folder / unit.name
    copy.write_text(UNUSED.sub(r"\1 = nullptr,", unit.read_text()))
    return copy


TABLE = re.compile(r"constexpr Kernel (k\w+)\[\] = {\n((?:    .*\n)+)};")
ROW = re.compile(r"    \S.*\n(?:     .*\n)*")


def of_kernels(header: str, names: set[str]) -> str:
    """A header whose tables have these kernels only: each of them is templates, which take most of the time."""

    def shorter(table: re.Match[str]) -> str:
        rows = [row for row in ROW.findall(table[2]) if any(f'"{name}"' in row for name in names)]
        if not rows:
            return f"constexpr std::span<const Kernel> {table[1]}{{}};"
        return table[0].replace(table[2], "".join(rows))

    return TABLE.sub(shorter, header)


def compile(unit: Path, tree: Path, target: Path, *more: str | Path) -> Path:
    """A unit and the headers of a tree, hardly optimized."""
    compiler = os.environ.get("CXX", "g++").split()
    # The emulator knows what optimized code is made of, and not vmovw, by which -O0 loads single halves.
    level = "-Og" if unit.stem == "avx512_fp16" else "-O0"
    options = ["-std=c++20", level, "-w", "-fPIC", "-fvisibility=hidden", "-ffp-contract=off", f"-I{tree / 'include'}"]
    subprocess.run([*compiler, *options, *more, "-c", unit, "-o", target], check=True)
    return target


def link(library: Path, objects: list[Path]) -> Path:
    """dlopen knows libraries by their names."""
    compiler = os.environ.get("CXX", "g++").split()
    subprocess.run([*compiler, "-shared", *objects, "-o", library, "-ldl"], check=True)
    return library


_caches: list[tuple[int, int, int]] = []


@contextmanager
def caches_of(l1d: int, l2: int, l3: int) -> Iterator[None]:
    """Products within are cut in blocks as on a machine with these caches, in bytes."""
    _caches.append((l1d, l2, l3))
    try:
        yield
    finally:
        _caches.pop()


def caches() -> tuple[int, int, int]:
    """L1d, L2 and L3 by which products are cut now."""
    info = _kernels.cpu_info()
    return _caches[-1] if _caches else (info["l1d"], info["l2"], info["l3"])


class Sizes(ctypes.Structure):
    _fields_ = [(name, ctypes.c_ssize_t) for name in ("threads", "k_slices", "m", "n", "k", "l1d", "l2", "l3")]


class Operand(ctypes.Structure):
    _fields_ = [("data", ctypes.c_void_p), ("stride", ctypes.c_ssize_t), ("format", ctypes.c_uint8)]


class Panels(ctypes.Structure):
    _fields_ = [
        ("data", ctypes.c_void_p),
        ("format", ctypes.c_uint8),
        ("nr", ctypes.c_ssize_t),
        ("kr", ctypes.c_ssize_t),
        ("zeros", ctypes.c_bool),
    ]


class Quantizer(ctypes.Structure):
    """RowQuantizer of driver/problem.hpp."""

    _fields_ = [
        ("kind", ctypes.c_uint8),
        ("scale", ctypes.c_float),
        ("zero", ctypes.c_int32),
        ("smooth", ctypes.c_void_p),
        ("format", ctypes.c_uint8),
    ]


class Affine(ctypes.Structure):
    """As in contract/quantization.hpp."""

    _fields_ = [
        ("inverse", ctypes.c_float),
        ("low", ctypes.c_float),
        ("high", ctypes.c_float),
        ("zero", ctypes.c_int32),
    ]


class Program(ctypes.Structure):
    _fields_ = [
        ("count", ctypes.c_ssize_t),
        ("functions", ctypes.POINTER(ctypes.c_ssize_t)),
        ("params", ctypes.POINTER(ctypes.c_float)),
    ]


def operand(values: Tensor | None) -> Operand:
    if values is None:
        return Operand(None, 0, 0)
    return Operand(values.data_ptr(), values.stride(0), FORMATS.index(OF_DTYPE[values.dtype]))


def program(steps: Steps) -> Program:
    given = list(steps) or [("identity", ())]
    indices = (ctypes.c_ssize_t * len(given))(*(FUNCTIONS.index(name) for name, _ in given))
    params = (ctypes.c_float * (2 * len(given)))(*(p for _, step in given for p in (*step, 0.0, 0.0)[:2]))
    return Program(len(given), indices, params)


def quantizer(rows: _plans.RowQuantizer | None, smooth: Tensor) -> Quantizer:
    """`smooth`: that of the rows, padded."""
    if rows is None:
        return Quantizer()
    kind = _plans.ROW_KINDS.index(rows.kind)
    return Quantizer(kind, rows.scale, rows.zero, None if rows.smooth is None else smooth.data_ptr())


def affine(out: tuple[torch.dtype, float, int] | None) -> Affine:
    if out is None:
        return Affine()
    _, scale, zero = out
    return Affine(torch.tensor(scale, dtype=torch.float32).reciprocal().item(), -zero, 255 - zero, zero)


Product = Callable[..., Tensor]


def product_of(library: Path) -> Product:
    """`native.product` on a library built here."""
    function = ctypes.CDLL(str(library)).product
    function.restype = ctypes.c_bool

    def product(
        kernel: dict[str, object],
        packed: _weights.Packed,
        x: Tensor,
        b: Tensor | None,
        steps: Steps,
        threads: int,
        k_slices: int,
        out: Tensor,
        rows: _plans.RowQuantizer | None = None,
        integers: tuple[torch.dtype, float, int] | None = None,
    ) -> Tensor:
        assert packed.layout in kernel["reads"]
        if way(str(kernel["isa"])) == EMULATED:
            emulator.install()
        format, shape = packed.layout.split("/")
        panels = packed.data
        smooth = torch.zeros(0) if rows is None or rows.smooth is None else rows.smooth
        smooth = torch.nn.functional.pad(smooth, (0, -len(smooth) % 16))
        parts = (
            Sizes(threads, k_slices, len(x), packed.n, packed.k, *caches()),
            operand(x),
            quantizer(rows, smooth),
            Panels(panels.data_ptr(), FORMATS.index(format), *map(int, shape.split("x")), packed.zero is not None),
            operand(b),
            operand(out),
            program(steps),
            affine(integers),
        )
        assert function(str(kernel["name"]).encode(), *map(ctypes.byref, parts)), "no memory"
        return out

    return product


# For programs that run in a process of their own: bytes that memory grew by, at most, since `begin()`.
PEAK = """
def of_process(key):
    return 1024 * int(next(line for line in open("/proc/self/status") if line.startswith(key)).split()[1])

def begin():
    global before
    before = of_process("VmRSS")
    open("/proc/self/clear_refs", "w").write("5")  # VmHWM counts anew

def peak():
    return of_process("VmHWM") - before
"""
