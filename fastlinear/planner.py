"""From a problem (shape, epilogue, threads) to what runs it: an override, the cache, a tuning or a heuristic.

The candidates are the kernels of the table that may run here, in a few splits, and torch's own ways to do the same.
autotune decides between them; this module knows what they are, how to call them and how to make their weights cold.
"""

from __future__ import annotations

import functools
import logging
import os
import sys
from collections.abc import Callable
from importlib.metadata import version
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastlinear import _kernels, autotune, torch_plans
from fastlinear.activations import Activation
from fastlinear.tuning_cache import Machine, Tuned, TuningCache

_log = logging.getLogger("fastlinear")

# Below the first number of multiply-adds, waking a second thread costs more than it saves; above the second it always
# pays. In between both are candidates.
_SERIAL_WORK, _PARALLEL_WORK = 100e3, 4e6
_MIN_SLICE_K = 256
# A tuning measures on at most this many multiply-adds a thread (about 0.3 ms a call, so that 8 rounds of all candidates
# fit its budget) and bytes of weight. A larger problem is tuned on its first rows and columns: the kernels see the same
# K, panels and row tiles.
_PROXY_WORK, _PROXY_BYTES = 20e6, 4 << 20
_PROXY_ROWS, _PROXY_COLUMNS = 48, 128


class Problem(NamedTuple):
    """What a plan is made for. `m` is a bucket of M; `transposed` tells that the module holds its weight as [k, n]."""

    m: int
    n: int
    k: int
    bias: bool
    activation: Activation | None
    transposed: bool
    threads: int

    def key(self) -> str:
        epilogue = (
            "_".join(map(str, (self.activation.name, *self.activation.params))) if self.activation else "identity"
        )
        flags = ("bias" if self.bias else "nobias") + ("-transposed" if self.transposed else "")
        return f"fp32/n{self.n}/k{self.k}/{flags}/{epilogue}/t{self.threads}/m{self.m}"


class Chosen(NamedTuple):
    """What runs for one bucket of M, and how it came to that."""

    bucket: int
    threads: int  # torch's number of threads that the choice is for
    name: str  # a kernel of the table, or "torch/linear", "torch/mkl", "torch/mkldnn"
    plan_threads: int
    k_slices: int
    source: str  # "tuned", "cache", "heuristic" or "override"
    table: tuple[tuple[str, float], ...] = ()  # what was measured: candidate, milliseconds; best first
    speedup: float | None = None  # time of torch/linear over that of the choice, where measured


class Operands(NamedTuple):
    """A layer's tensors. weight: as the module holds it; packed: the same in panels."""

    weight: Tensor
    bias: Tensor | None
    packed: _kernels.Packed


# ---- what the table offers ----


def _runnable() -> list[dict[str, Any]]:
    return [row for row in _kernels.kernels() if row["runnable"]]


def override() -> str | None:
    """FASTLINEAR_KERNEL, if it names a kernel that runs here or one of torch's ways; ValueError otherwise."""
    name = os.environ.get("FASTLINEAR_KERNEL")
    allowed = [*(row["name"] for row in _runnable()), *torch_plans.NAMES]
    if name is not None and name not in allowed:
        raise ValueError(f"FASTLINEAR_KERNEL is {name!r}; on this CPU it may be one of {', '.join(allowed)}")
    return name


def layout() -> str:
    """The layout to pack weights in: that of the kernel FASTLINEAR_KERNEL names, else of the best that runs here."""
    rows, name = _runnable(), override()
    return str(next((row for row in rows if row["name"] == name), rows[0])["layout"])


def native_candidates(problem: Problem) -> list[Chosen]:
    """Every kernel that reads the layout, on one thread and on all, with K slices where the tiles are too few."""
    work, wanted = problem.m * problem.n * problem.k, layout()
    counts = {1 if work < _PARALLEL_WORK else problem.threads, 1 if work < _SERIAL_WORK else problem.threads}
    return [
        Chosen(problem.m, problem.threads, row["name"], threads, slices, "tuned")
        for row in _runnable()
        if row["layout"] == wanted
        for threads in sorted(counts)
        for slices in _slices(problem, row, threads)
    ]


def _slices(problem: Problem, row: dict[str, Any], threads: int) -> list[int]:
    tiles = -(-max(problem.m, 1) // row["mr"]) * -(-max(problem.n, 1) // row["columns"])
    slices = -(-threads // tiles)
    return [1, slices] if slices > 1 and problem.k // slices >= _MIN_SLICE_K else [1]


def heuristic(problem: Problem) -> Chosen:
    """A good plan without measuring: the kernel that passes over each panel least often (the wider tile where equal),
    on all threads unless the product is small."""
    rows = {row["name"]: row for row in _runnable()}
    threads = 1 if problem.m * problem.n * problem.k < _PARALLEL_WORK else problem.threads

    def rank(c: Chosen) -> tuple[int, int, int]:
        row = rows[c.name]
        return -(-max(problem.m, 1) // row["mr"]), -row["columns"], -c.k_slices

    best = min((c for c in native_candidates(problem) if c.plan_threads == threads), key=rank)
    return best._replace(source="heuristic")


# ---- deciding ----


def decide(problem: Problem, operands: Operands, *, measure: bool) -> Chosen:
    """What to run: FASTLINEAR_KERNEL's word, else the cache's, else a tuning's (if `measure` and FASTLINEAR_AUTOTUNE
    allow), else the heuristic's."""
    name = override()
    if name is not None:
        return heuristic(problem)._replace(name=name, k_slices=1, source="override")
    if not measure or _kernels.forked() or os.environ.get("FASTLINEAR_AUTOTUNE", "1") == "0":
        return heuristic(problem)
    return _remembered(problem) or _tuned(problem, operands)


def executable(chosen: Chosen, problem: Problem, weight: Tensor) -> _kernels.Plan | Callable[..., Tensor]:
    """What an Engine runs for `chosen`. weight: as the module holds it."""
    if chosen.name in torch_plans.NAMES:
        return torch_plans.make(chosen.name, weight, problem.transposed, problem.activation, problem.m).run
    return _kernels.Plan(chosen.name, chosen.plan_threads, chosen.k_slices)


@functools.cache
def cache() -> TuningCache:
    """What was tuned on this machine, by `Problem.key()`."""
    info = _kernels.cpu_info()
    machine = Machine(info["model"], tuple(info["isas"]), version("fastlinear"), torch.__version__)
    names = {row["name"] for row in _runnable()} | set(torch_plans.NAMES)
    return TuningCache(machine, names.__contains__, {"threads": range(1, 4097), "k_slices": range(1, 4097)})


def _remembered(problem: Problem) -> Chosen | None:
    tuned = cache().get(problem.key())
    if tuned is None:
        return None
    threads, slices = (tuned.numbers.get(key, 1) for key in ("threads", "k_slices"))
    return Chosen(problem.m, problem.threads, tuned.name, threads, slices, "cache", tuned.table, tuned.speedup)


def _tuned(problem: Problem, operands: Operands) -> Chosen:
    small, tensors = _proxy(problem, operands)
    # A generator of its own: tuning must not move the user's random numbers, nor follow the default dtype.
    x = torch.randn(small.m, small.k, generator=torch.Generator().manual_seed(0), dtype=torch.float32)
    natives = {_spell(c): c for c in native_candidates(problem)}
    runs = [autotune.Candidate(name, _call_native(c, small, tensors, x)) for name, c in natives.items()]
    weights = [tensors.weight, tensors.packed.data]
    for name in torch_plans.NAMES:
        try:
            plan = torch_plans.make(name, tensors.weight, small.transposed, small.activation, small.m)
        except (AttributeError, RuntimeError) as error:
            _log.debug("%s is no candidate: %s", name, error)
            continue
        weights += [] if plan.packed is None else [plan.packed]
        runs.append(autotune.Candidate(name, functools.partial(plan.run, x, tensors.weight, tensors.bias)))
    blocks = [torch_plans.memory(w) for w in weights]

    def evict() -> None:
        for address, nbytes in blocks:
            _kernels.evict(address, nbytes)

    with torch.inference_mode():
        choice = autotune.choose(runs, torch_plans.BASELINE, evict=evict)
    winner = natives.get(choice.name) or Chosen(problem.m, problem.threads, choice.name, 1, 1, "tuned")
    winner = winner._replace(table=choice.table, speedup=choice.speedup)
    if choice.decided:
        numbers = {"threads": winner.plan_threads, "k_slices": winner.k_slices}
        cache().put(problem.key(), Tuned(winner.name, numbers, choice.table, choice.speedup))
    _tell(problem, choice)
    return winner


def _proxy(problem: Problem, operands: Operands) -> tuple[Problem, Operands]:
    """The problem to measure instead of `problem`, and its tensors."""
    weight, bias, packed = operands
    area = _PROXY_WORK * problem.threads / max(problem.k, 1)  # rows x columns
    m, n = problem.m, min(problem.n, max(_PROXY_COLUMNS, _PROXY_BYTES // (4 * max(problem.k, 1))))
    if m * n > area:
        m = min(m, max(_PROXY_ROWS, int(area / n)))
        n = min(n, max(_PROXY_COLUMNS, int(area / m)))
    packed = packed.head(n)
    weight = weight[:, : packed.n].contiguous() if problem.transposed else weight[: packed.n]
    return problem._replace(m=m, n=packed.n), Operands(weight, None if bias is None else bias[: packed.n], packed)


def _call_native(chosen: Chosen, problem: Problem, tensors: Operands, x: Tensor) -> Callable[[], object]:
    plan = _kernels.Plan(chosen.name, chosen.plan_threads, chosen.k_slices)
    epilogue = _kernels.Epilogue(() if problem.activation is None else (problem.activation,))

    def call() -> None:
        _kernels.run(tensors.packed, plan, epilogue, x, tensors.bias, torch.empty(x.shape[0], problem.n, dtype=x.dtype))

    return call


def _spell(chosen: Chosen) -> str:
    return f"{chosen.name} t{chosen.plan_threads}" + (f" k/{chosen.k_slices}" if chosen.k_slices > 1 else "")


def _tell(problem: Problem, choice: autotune.Choice) -> None:
    """The table of a tuning, like Inductor's AUTOTUNE log: on stderr if FASTLINEAR_VERBOSE=1, else at debug level."""
    best = choice.table[0][1] if choice.table else 0.0
    lines = [f"AUTOTUNE linear({problem.m}x{problem.k}, {problem.n}x{problem.k}) {problem.key()}"]
    lines += [f"  {name:<28} {ms:9.4f} ms {best / ms:6.1%}" for name, ms in choice.table]
    verdict = f"chosen: {choice.name}" if choice.decided else f"too noisy to tell: {choice.name} for now"
    lines.append(f"{verdict}; {choice.rounds} rounds, {choice.seconds * 1e3:.1f} ms")
    if os.environ.get("FASTLINEAR_VERBOSE", "0") != "0":
        print("\n".join(lines), file=sys.stderr)
    else:
        _log.debug("\n".join(lines))
