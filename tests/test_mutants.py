"""The tests can fail: the library's own sources, broken in one place, are caught by the very checks that guard them."""

import ctypes
import os
import shutil
import subprocess
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

import guard
import native
import oracle
import pytest
import test_exact
import test_kernels
import test_memory
import torch
from native import Kernel, Steps
from torch import Tensor

from fastlinear import _kernels

UNITS = sorted(native.ROOT.glob("csrc/*.cpp"))
NAMES = list(_kernels.activations())


class Mutant(NamedTuple):
    """One change of one source file; `kernel` is the row of the table that shows it."""

    name: str
    file: str
    old: str
    new: str
    kernel: str = "fp32/scalar/4x16"


DRIVER, GRID = "include/fastlinear/gemm.hpp", "include/fastlinear/grid.hpp"
SCALAR, AVX2, AVX512 = (f"include/fastlinear/kernels/{isa}/fp32.hpp" for isa in ("scalar", "avx2", "avx512"))
TALL = "fp32/avx512/14x32"

BROKEN = [
    Mutant("the last k is dropped", SCALAR, "k < t.k;", "k + 1 < t.k;"),
    Mutant("the last k is dropped, AVX2", AVX2, "k < t.k;", "k + 1 < t.k;", "fp32/avx2/6x16"),
    Mutant(
        "the first two rows are swapped", SCALAR, "a[r * t.lda + k]", "a[(t.rows > 1 && r < 2 ? 1 - r : r) * t.lda + k]"
    ),
    Mutant(
        "the first two rows are swapped, AVX-512",
        AVX512,
        "a[r * t.lda + k]",
        "a[(R > 1 && r < 2 ? 1 - r : r) * t.lda + k]",
        TALL,
    ),
    Mutant("K blocks overwrite each other", SCALAR, "t.accumulate ? tile[r * Columns + j] : 0.0f", "0.0f"),
    Mutant(
        "K blocks overwrite each other, driver",
        DRIVER,
        "a.accumulate = block.begin > slice.begin",
        "a.accumulate = false",
    ),
    Mutant("the bias is skipped", DRIVER, "s.bias = i == 0 && p.bias != nullptr", "s.bias = false"),
    Mutant("the bias is added in every step", DRIVER, "i == 0 && p.bias", "p.bias"),
    Mutant(
        "a column too many is stored", DRIVER, "std::min(columns, p.n - column)", "std::min(columns, p.n - column + 1)"
    ),
    Mutant(
        "a column too few is stored", DRIVER, "std::min(columns, p.n - column)", "std::min(columns, p.n - column - 1)"
    ),
    Mutant("the second K slice is lost", DRIVER, "slice = 1; slice < ", "slice = 2; slice < "),
    Mutant(
        "K slices overlap", GRID, "std::min(k_, (u.slice + 1) * slice_k_)", "std::min(k_, (u.slice + 1) * slice_k_ + 1)"
    ),
    Mutant(
        "copied rows are one k short",
        "include/fastlinear/rows.hpp",
        "<std::size_t>(k) *",
        "<std::size_t>(k - 1) *",
        TALL,
    ),
]
# Changes that may cost time and nothing else.
HARMLESS = [
    Mutant("prefetches the wrong place", DRIVER, "a.prefetch_stride = ", "a.prefetch_stride = 17 * "),
    Mutant("a unit a thread", GRID, "units_per_thread = 4", "units_per_thread = 1"),
    Mutant("small blocks", GRID, "panel_block_bytes = 512 << 10", "panel_block_bytes = 4 << 10"),
]


def edges(kernel: Kernel) -> None:
    for case in native.pairwise(*test_kernels.factors(kernel))[::5]:
        test_kernels.held_to_the_bound(kernel, case)


# The tests a mutant has to get past; each is called with a kernel.
CHECKS: dict[str, Callable[[Kernel], None]] = {
    "edges": edges,
    "blocks": partial(test_kernels.test_blocks_of_k_and_of_rows, k_slices=1),
    "chains": partial(test_kernels.test_chains_of_steps, chain=test_kernels.CHAINS[1]),
    "collisions": partial(test_kernels.test_rows_that_collide_in_the_cache, k=1024),
    "exact": partial(test_exact.test_sums_of_integers_are_exact, k_slices=1),
    "exact slices": partial(test_exact.test_sums_of_integers_are_exact, k_slices=3),
    "row alone": partial(test_exact.test_a_row_of_a_batch_is_the_row_alone, k=97, k_slices=1),
    "canaries": partial(test_memory.test_only_the_output_is_written, size="ragged", k_slices=1),
}

Product = Callable[..., Tensor]


class Build:
    """The library's sources in a folder, compiled unit by unit, so that a mutant compiles what it touches."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.units = [*UNITS, native.ROOT / "tests/mutants/product.cpp"]
        self.objects = [self.compile(unit, native.ROOT, folder / f"{unit.stem}.o") for unit in self.units]

    @staticmethod
    def compile(unit: Path, tree: Path, target: Path) -> Path:
        compiler = os.environ.get("CXX", "g++")
        options = ["-std=c++20", "-O1", "-fPIC", "-fvisibility=hidden", f"-I{tree / 'include'}"]
        subprocess.run([compiler, *options, "-c", unit, "-o", target], check=True)
        return target

    def link(self, name: str, objects: list[Path]) -> Path:
        library = self.folder / f"{name}.so"
        subprocess.run([os.environ.get("CXX", "g++"), "-shared", *objects, "-o", library, "-ldl"], check=True)
        return library

    def mutated(self, mutant: Mutant) -> Path:
        """The library with this one change; each has a name of its own, since dlopen knows libraries by their names."""
        tree = self.folder / "tree"
        shutil.rmtree(tree, ignore_errors=True)
        shutil.copytree(native.ROOT / "include", tree / "include")
        text = (tree / mutant.file).read_text()
        assert text.count(mutant.old) == 1, (
            f"{mutant.file} has {text.count(mutant.old)} times {mutant.old!r}: mutant is stale"
        )
        (tree / mutant.file).write_text(text.replace(mutant.old, mutant.new))
        touched = Path(mutant.file).parent.name if "kernels/" in mutant.file else "product"
        objects = [
            self.compile(unit, tree, self.folder / "mutated.o") if unit.stem == touched else unmutated
            for unit, unmutated in zip(self.units, self.objects, strict=True)
        ]
        return self.link(mutant.name.replace(" ", "-"), objects)


@pytest.fixture(scope="module")
def build(tmp_path_factory: pytest.TempPathFactory) -> Build:
    return Build(tmp_path_factory.mktemp("mutants"))


def product_of(library: Path, place: Callable[[Tensor], Tensor] = lambda panels: panels) -> Product:
    """`native.run` on a library built here; `place` moves the packed panels [bytes] to other memory."""
    function = ctypes.CDLL(str(library)).product
    function.restype = ctypes.c_bool

    def run(
        kernel: Kernel,
        x: Tensor,
        w: Tensor,
        b: Tensor | None = None,
        steps: Steps = (),
        *,
        threads: int = 1,
        k_slices: int = 1,
        out: Tensor | None = None,
    ) -> Tensor:
        (m, k), n = x.shape, len(w)
        y = torch.full((m, n), torch.nan) if out is None else out
        panels = place(_kernels.Packed(w, kernel["layout"]).data)
        program = list(steps) or [("identity", ())]
        activations = (ctypes.c_size_t * len(program))(*(NAMES.index(name) for name, _ in program))
        params = (ctypes.c_float * (2 * len(program)))(*(p for _, given in program for p in (*given, 0.0, 0.0)[:2]))
        sizes = [ctypes.c_ssize_t(size) for size in (threads, k_slices, m, n, k)]
        pointers = [ctypes.c_void_p(t.data_ptr()) for t in (x, panels)]
        bias = ctypes.c_void_p(None if b is None else b.data_ptr())
        strides = [ctypes.c_ssize_t(t.stride(0)) for t in (x, y)]
        args = [pointers[0], strides[0], pointers[1], bias, ctypes.c_void_p(y.data_ptr()), strides[1]]
        assert function(kernel["name"].encode(), *sizes, *args, ctypes.c_size_t(len(program)), activations, params)
        return y

    return run


def row(name: str) -> Kernel:
    found = next(kernel for kernel in _kernels.kernels() if kernel["name"] == name)
    if not found["runnable"]:
        pytest.skip(f"{name} does not run on this CPU")
    return found


def caught_by(run: Product, kernel: Kernel, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The checks that `run`, in place of the library's own product, does not pass; dying of a signal is failing."""
    monkeypatch.setattr(native, "run", run)
    monkeypatch.setattr(torch, "set_num_threads", lambda _: None)  # torch has no other threads in a forked child
    caught = []
    for name, check in CHECKS.items():
        try:
            native.in_child(lambda note, check=check: check(kernel))
        except AssertionError as error:
            assert "the child ended with -" in str(error) or "AssertionError" in str(error), error
            caught.append(name)
    return caught


@pytest.mark.parametrize("mutant", BROKEN, ids=lambda mutant: mutant.name)
def test_a_broken_source_is_caught(build: Build, mutant: Mutant, monkeypatch: pytest.MonkeyPatch) -> None:
    """At least one check fails; which ones is printed (pytest -s)."""
    kernel = row(mutant.kernel)
    caught = caught_by(product_of(build.mutated(mutant)), kernel, monkeypatch)
    print(f"\n{mutant.name}: caught by {len(caught)} of {len(CHECKS)} checks: {', '.join(caught)}")
    assert caught


@pytest.mark.parametrize("mutant", HARMLESS, ids=lambda mutant: mutant.name)
def test_a_harmless_change_passes(build: Build, mutant: Mutant, monkeypatch: pytest.MonkeyPatch) -> None:
    """Prefetches and block sizes are no part of the result: the checks do not fail for nothing."""
    assert not caught_by(product_of(build.mutated(mutant)), row(mutant.kernel), monkeypatch)


@native.every_kernel
def test_panels_are_not_left(build: Build, kernel: Kernel) -> None:
    """The packed panels flush against forbidden pages at both ends: no kernel reads a byte beyond them."""
    library = build.link("unmutated", build.objects)

    def action(note: native.Note) -> None:
        for at in ("start", "end"):
            run = product_of(library, lambda panels, at=at: guard.guarded(panels.view(torch.float32), at))
            for n in (1, kernel["nr"], kernel["columns"], 2 * kernel["columns"] + 1):
                for m, k, k_slices in [(1, 1, 1), (kernel["mr"] + 1, 23, 1), (2 * kernel["mr"], 23, 3)]:
                    note(f"panels at their {at}: {m} x {n} x {k}, {k_slices} slices")
                    x, w, _ = oracle.exact_case(m, n, k)
                    oracle.check(run(kernel, x, w, k_slices=k_slices), x, w, exact=True)

    native.in_child(action)
