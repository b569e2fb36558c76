"""From a problem (shape, formats, epilogue, threads) to what runs it: an override, the cache, a tuning or a heuristic.

autotune decides between the candidates, kernels of the table and torch's own ways to do the same; this module knows how
to call them and how to make their weights cold.
"""

from __future__ import annotations

import functools
import logging
import os
import sys
from collections.abc import Callable
from importlib.metadata import version
from typing import NamedTuple

import torch
from torch import Tensor

from fastlinear import _kernels, autotune, torch_plans
from fastlinear.candidates import (
    FROZEN,
    Chosen,
    Problem,
    able,
    heuristic,
    layout,
    native_candidates,
    override,
    runnable,
)
from fastlinear.precision import DTYPES, Precision, dtype_of_rows, epilogue
from fastlinear.quantize import Requantize
from fastlinear.tuning_cache import Machine, Tuned, TuningCache

__all__ = ["Chosen", "Operands", "Problem", "cache", "decide", "executable", "layout", "override"]

_log = logging.getLogger("fastlinear")

# A tuning measures on at most this many multiply-adds a thread (about 0.3 ms a call, so that 8 rounds of all candidates
# fit its budget) and bytes of weight. A larger problem is tuned on its first rows and columns: the kernels see the same
# K, panels and row tiles.
_PROXY_WORK, _PROXY_BYTES = 20e6, 4 << 20
_PROXY_ROWS, _PROXY_COLUMNS = 48, 128


class Operands(NamedTuple):
    """A layer's tensors. weight: as the module holds it, None if it is frozen; packed: the same in panels; rows, out:
    how x and y are quantised; spare: the weight in panels of its own format, where the problem has a fallback."""

    weight: Tensor | None
    bias: Tensor | None
    packed: _kernels.Packed
    rows: _kernels.RowQuantizer | None = None
    out: Requantize | None = None
    spare: _kernels.Packed | None = None

    def head(self, n: int, transposed: bool) -> Operands:
        """The first n output channels, rounded up to whole panels."""
        n = max(packed.head(n).n for packed in (self.packed, self.spare) if packed is not None)
        weight, bias, spare = self.weight, self.bias, self.spare
        if weight is not None:
            weight = weight[:, :n].contiguous() if transposed else weight[:n]
        bias, spare = None if bias is None else bias[:n], None if spare is None else spare.head(n)
        return self._replace(weight=weight, bias=bias, packed=self.packed.head(n), spare=spare)

    def unquantized(self) -> Operands | None:
        return None if self.spare is None else Operands(self.weight, self.bias, self.spare)


def decide(problem: Problem, operands: Operands, *, measure: bool) -> Chosen:
    """What to run: what FASTLINEAR_KERNEL names, if that can, else the cache's word, else a tuning's (if `measure` and
    FASTLINEAR_AUTOTUNE allow), else the heuristic's."""
    name = override()
    if name is not None and _applies(name, problem, operands.weight):
        return _refusing(heuristic(problem)._replace(name=name, k_slices=1, source="override"), problem)
    if not measure or _kernels.forked() or os.environ.get("FASTLINEAR_AUTOTUNE", "1") == "0":
        return heuristic(problem)
    return _remembered(problem) or _tuned(problem, operands)


def native(chosen: Chosen) -> _kernels.Plan:
    """What an Engine runs for `chosen`, where that is a kernel of the table."""
    return _kernels.Plan(chosen.name, chosen.plan_threads, chosen.k_slices)


def executable(chosen: Chosen, problem: Problem, operands: Operands) -> _kernels.Plan | Callable[..., Tensor]:
    """What an Engine runs for `chosen`."""
    if chosen.name in torch_plans.NAMES:
        names = (chosen.name, torch_plans.BASELINE)  # a tampered cache may name a way that torch refuses
        return next(plan for name in names if (plan := _torch_plan(name, problem, operands.weight))).run
    spare = operands.unquantized() if chosen.refused else None
    return native(chosen) if spare is None else functools.partial(_fall_back, chosen, problem, spare.packed)


def _fall_back(
    chosen: Chosen, problem: Problem, packed: _kernels.Packed, x: Tensor, weight: Tensor, bias: Tensor | None
) -> Tensor:
    rows = x.reshape(-1, problem.k)
    out = x.new_empty(len(rows), packed.n)
    _kernels.run(packed, native(chosen), epilogue(problem.activation, None), rows, bias, out)
    return out.view(*x.shape[:-1], packed.n)


def _applies(name: str, problem: Problem, weight: Tensor | None) -> bool:
    if name in torch_plans.NAMES:
        return _torch_plan(name, problem, weight) is not None
    return any(row["name"] == name for each in _ways(problem) for row in able(each))


def _ways(problem: Problem) -> list[Problem]:
    """The problem itself and, where it may fall back, the unquantised one."""
    plain = problem.unquantized()
    return [problem, plain] if problem.fallback and Precision(plain.packed).takes(DTYPES[problem.x]) else [problem]


def _refusing(chosen: Chosen, problem: Problem) -> Chosen:
    """`chosen`, which says so if it does not run on the quantised weight."""
    refused = problem.fallback and not any(row["name"] == chosen.name for row in able(problem))
    return chosen._replace(refused=problem.packed if refused else "")


def _torch_plan(name: str, problem: Problem, weight: Tensor | None) -> torch_plans.TorchPlan | None:
    """torch's way `name`, or None where it is not admitted, would keep yet another pack of the weight, or is refused by
    torch."""
    if weight is None or not problem.admits_torch:
        return None
    problem = problem.unquantized() if problem.fallback else problem
    if name != torch_plans.BASELINE and not problem.x == problem.packed == problem.held:
        return None
    try:
        return torch_plans.make(name, weight, problem.transposed, problem.activation, problem.m)
    except (AttributeError, RuntimeError) as error:
        _log.debug("%s is no candidate: %s", name, error)
        return None


@functools.cache
def cache() -> TuningCache:
    """What was tuned on this machine, by `Problem.key()`."""
    info = _kernels.cpu_info()
    machine = Machine(info["model"], tuple(info["isas"]), version("fastlinear"), torch.__version__)
    names = {row["name"] for row in runnable()} | set(torch_plans.NAMES)
    return TuningCache(machine, names.__contains__, {"threads": range(1, 4097), "k_slices": range(1, 4097)})


def _remembered(problem: Problem) -> Chosen | None:
    """What the cache knows; for a frozen layer also of the same layer before, if a kernel had won there."""
    frozen = problem.held == FROZEN
    allowed = {c.name for each in _ways(problem) for c in native_candidates(each)}
    allowed |= {*torch_plans.NAMES} if problem.admits_torch else set()
    for held in (problem.held, *(DTYPES if frozen else ())):
        tuned = cache().get(problem._replace(held=held).key())
        if tuned is not None and tuned.name in allowed:
            threads, slices = (tuned.numbers.get(number, 1) for number in ("threads", "k_slices"))
            known = Chosen(problem.m, problem.threads, problem.x, tuned.name, threads, slices, "cache", tuned.table)
            compared = problem._replace(held=held).admits_torch
            return _refusing(known._replace(speedup=tuned.speedup if compared else None), problem)
    return None


def _tuned(problem: Problem, operands: Operands) -> Chosen:
    small, tensors = _proxy(problem, operands)
    x = _input(small)
    natives: dict[str, Chosen] = {}
    runs, weights = [], []
    for each, those in zip(_ways(problem), (tensors, tensors.unquantized() or tensors), strict=False):
        found = {_spell(c): c for c in native_candidates(each)}
        runs += [autotune.Candidate(name, _call_native(c, small, those, x)) for name, c in found.items()]
        weights.append(those.packed.data)
        natives |= found
    baseline = torch_plans.BASELINE if _torch_plan(torch_plans.BASELINE, small, tensors.weight) else None
    weights += [] if tensors.weight is None else [tensors.weight]
    for name in torch_plans.NAMES:
        plan = _torch_plan(name, small, tensors.weight)
        if plan is None or tensors.weight is None:
            continue
        weights += [] if plan.packed is None else [plan.packed]
        runs.append(autotune.Candidate(name, functools.partial(plan.run, x, tensors.weight, tensors.bias)))
    blocks = [torch_plans.memory(w) for w in weights]

    def evict() -> None:
        for address, nbytes in blocks:
            _kernels.evict(address, nbytes)

    with torch.inference_mode():
        choice = autotune.choose(runs, baseline or _spell(heuristic(problem)), evict=evict)
    winner = natives.get(choice.name) or Chosen(problem.m, problem.threads, problem.x, choice.name, 1, 1, "tuned")
    winner = winner._replace(table=choice.table, speedup=None if baseline is None else choice.speedup)
    if choice.decided:
        numbers = {"threads": winner.plan_threads, "k_slices": winner.k_slices}
        cache().put(problem.key(), Tuned(winner.name, numbers, choice.table, choice.speedup))
    _tell(problem, choice)
    return _refusing(winner, problem)


def _input(problem: Problem) -> Tensor:
    # A generator of its own: tuning must not move the user's random numbers.
    shape, generator = (problem.m, problem.k), torch.Generator().manual_seed(0)
    if problem.x in DTYPES:
        return torch.randn(shape, generator=generator, dtype=DTYPES[problem.x])
    return torch.randint(0, 128, shape, generator=generator).to(dtype_of_rows(problem.x))


def _proxy(problem: Problem, operands: Operands) -> tuple[Problem, Operands]:
    """The problem to measure instead of `problem`, and its tensors."""
    area = _PROXY_WORK * problem.threads / max(problem.k, 1)  # rows x columns
    row_bytes = operands.packed.dtype.itemsize * max(problem.k, 1)
    m, n = problem.m, min(problem.n, max(_PROXY_COLUMNS, _PROXY_BYTES // row_bytes))
    if m * n > area:
        m = min(m, max(_PROXY_ROWS, int(area / n)))
        n = min(n, max(_PROXY_COLUMNS, int(area / m)))
    head = operands.head(n, problem.transposed)
    return problem._replace(m=m, n=head.packed.n), head


def _call_native(chosen: Chosen, problem: Problem, tensors: Operands, x: Tensor) -> Callable[[], object]:
    plan, steps = native(chosen), epilogue(problem.activation, tensors.out)
    dtype = DTYPES.get(problem.x, torch.float32) if tensors.out is None else tensors.out.dtype

    def call() -> None:
        out = torch.empty(x.shape[0], problem.n, dtype=dtype)
        _kernels.run(tensors.packed, plan, steps, x, tensors.bias, out, tensors.rows)

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
