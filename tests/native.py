"""The kernel table as test parameters, and one product on one kernel of it."""

import faulthandler
import os
import random
import re
import resource
import traceback
from collections.abc import Callable, Iterable, Sequence
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fastlinear import _kernels

ROOT = Path(__file__).resolve().parent.parent
Kernel = dict[str, Any]
Note = Callable[[str], object]
Steps = Iterable[tuple[str, tuple[float, ...]]]


def _parameter(kernel: Kernel) -> Any:
    reason = f"{kernel['name']}: this CPU, or FASTLINEAR_MAX_ISA, does not allow {kernel['isa']}"
    return pytest.param(kernel, id=kernel["name"], marks=[] if kernel["runnable"] else pytest.mark.skip(reason=reason))


TABLE = [_parameter(kernel) for kernel in _kernels.kernels()]
RUNNABLE = [kernel for kernel in _kernels.kernels() if kernel["runnable"]]
LAYOUTS = sorted({(kernel["layout"], kernel["nr"], kernel["kr"]) for kernel in _kernels.kernels()})
ACTIVATIONS = [*_kernels.activations().items()]

# `for every kernel of the table`: a kernel that cannot run here is a skip with its name and the reason.
every_kernel = pytest.mark.parametrize("kernel", TABLE)


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
    """steps(x [M, K] @ w [N, K].T + b [N]) on this kernel. `out` [M, N] is written if given, else a tensor of NaN."""
    y = torch.full((x.shape[0], w.shape[0]), torch.nan) if out is None else out
    plan = _kernels.Plan(kernel["name"], threads, k_slices)
    _kernels.run(_kernels.Packed(w, kernel["layout"]), plan, _kernels.Epilogue(steps), x, b, y)
    return y


def bits(values: Tensor) -> Tensor:
    """The bit patterns of fp32 values, so that NaN equals itself and -0 differs from 0."""
    return values.contiguous().view(torch.int32)


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Equal to the last bit; NaN payloads and the sign of zero count."""
    return torch.equal(bits(a), bits(b))


def driver_constant(name: str) -> int:
    """A block size of grid.hpp, so that tests which cross a block keep crossing it when it is changed."""
    source = (ROOT / "include/fastlinear/grid.hpp").read_text()
    match = re.search(rf"\b{name} = (\d+)(?: << (\d+))?;", source)
    assert match, f"grid.hpp has no constant {name}"
    return int(match[1]) << int(match[2] or 0)


def pairwise(*factors: Sequence[Any]) -> list[tuple[Any, ...]]:
    """Rows of one value a factor, in which every two values of different factors meet at least once; greedy, seeded."""
    rng = random.Random(0)
    indices = range(len(factors))
    wanted = [(i, a, j, b) for i, j in combinations(indices, 2) for a in factors[i] for b in factors[j]]
    missing = dict.fromkeys(wanted)
    rows = []

    def gain(row: list[Any]) -> int:
        return sum((i, row[i], j, row[j]) in missing for i, j in combinations(indices, 2))

    while missing:
        i, a, j, b = next(iter(missing))
        candidates = [[rng.choice(factor) for factor in factors] for _ in range(20)]
        for row in candidates:
            row[i], row[j] = a, b
        best = max(candidates, key=gain)
        rows.append(tuple(best))
        for p, q in combinations(indices, 2):
            missing.pop((p, best[p], q, best[q]), None)
    return rows


def in_child(action: Callable[[Note], None]) -> None:
    """Runs action(note) in a forked process, where it may die; fails with its error, or with its last note.

    fastlinear is serial in a forked child, and torch must stay on one thread there, too.
    """
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        status = 1
        try:
            resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
            faulthandler.disable()
            action(lambda text: os.write(write, f"at {text}\n".encode()))
            status = 0
        except BaseException:  # whatever it is belongs to the parent, and pytest must not go on in the child
            os.write(write, traceback.format_exc().encode())
        finally:
            os._exit(status)
    os.close(write)
    with os.fdopen(read) as pipe:
        said = pipe.read()
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert code == 0, f"the child ended with {code}\n{said[-4000:]}"
