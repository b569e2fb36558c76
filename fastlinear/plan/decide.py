"""From a problem (shape, formats, epilogue, threads) to what runs it: an override, the cache, a tuning or a heuristic.

race decides between the candidates, kernels of the table and torch's own ways to do the same; this module knows how
to call them and how to make their weights cold.
"""

from __future__ import annotations

import atexit
import functools
import hashlib
import logging
import os
import sys
from collections.abc import Callable
from importlib.metadata import version
from typing import NamedTuple

import torch
from torch import Tensor

import fastlinear._cpu as _cpu
import fastlinear._environment as environment
import fastlinear._kernels as _kernels
import fastlinear._plans as _plans
import fastlinear._products as _products
import fastlinear._weights as _weights
from fastlinear.plan import measuring, race, rivals
from fastlinear.plan.caches import l2
from fastlinear.plan.candidates import Chosen, able, heuristic, native_candidates
from fastlinear.plan.memory import Machine, Remembered, TuningCache
from fastlinear.plan.problem import FROZEN, Problem
from fastlinear.plan.table import override, runnable
from fastlinear.plan.waits import Waits
from fastlinear.spec.formats import DTYPES, dtype_of_rows
from fastlinear.spec.int8 import Requantize
from fastlinear.spec.precision import Precision, epilogue
from fastlinear.spec.programs import count_operands

_log = logging.getLogger("fastlinear")

# A tuning measures on at most this many multiply-adds a thread (about 0.3 ms a call, so that 8 rounds of all candidates
# fit its budget), and on as much weight as the second-level caches hold twice, so that it comes from beyond them. A
# larger problem is tuned on its first rows and columns: the kernels see the same K, panels and row tiles, and each
# thread has at least one group of panels of the widest kernels. Rows are whole tiles of 14 and of 6, as most of a
# larger problem's are: 14 rows may collide in L1 where 12 do not.
_PROXY_WORK, _PROXY_CACHES = 20e6, 2
_PROXY_ROWS = 42
# Tiles multiply several times as fast, and what surrounds them counts from more rows on.
_PROXY_TILE_WORK, _PROXY_TILE_ROWS = 100e6, 256
_PROXY_COLUMNS = max(row["columns"] for row in _kernels.rows())

# No CPU is faster than this, a thread: 1024 multiply-adds of AMX int8, or reading 128 bytes of L1, in each of 6 billion
# cycles a second. What seems so was not measured.
_MOST_WORK, _MOST_BYTES = 6e9 * 1024, 6e9 * 128


# Of the numbers of a remembered plan; rows and columns are what was measured.
_SIZES = range(1 << 31)
_LIMITS = {"threads": range(1, 4097), "k_slices": range(1, 4097), "rows": _SIZES, "columns": _SIZES}


class Operands(NamedTuple):
    """A layer's tensors. weight: as the module holds it, None if it is frozen; packed: the same in panels; rows, out:
    how x and y are quantized; spare: the weight in panels of its own format, where the problem has a fallback;
    torch_packs: what the layer has packed for torch's own ways, to which a plan may add."""

    weight: Tensor | None
    bias: Tensor | None
    packed: _weights.Packed
    rows: _plans.RowQuantizer | None = None
    out: Requantize | None = None
    spare: _weights.Packed | None = None
    torch_packs: rivals.Packs | None = None

    def head(self, n: int, transposed: bool) -> Operands:
        """The first n output channels, rounded up to whole panels."""
        n = max(packed.head(n).n for packed in (self.packed, self.spare) if packed is not None)
        weight, bias, spare = self.weight, self.bias, self.spare
        if weight is not None:
            weight = weight[:, :n].contiguous() if transposed else weight[:n]
        bias, spare = None if bias is None else bias[:n], None if spare is None else spare.head(n)
        return self._replace(weight=weight, bias=bias, packed=self.packed.head(n), spare=spare, torch_packs=None)

    def unquantized(self) -> Operands | None:
        return None if self.spare is None else Operands(self.weight, self.bias, self.spare)


def decide(problem: Problem, operands: Operands, *, measure: bool, kernel: str | None = None) -> Chosen:
    """What to run: `kernel`, or what FASTLINEAR_KERNEL names, if that can, else the cache's word, else a tuning's (if
    `measure` and FASTLINEAR_AUTOTUNE allow, and it is this caller's turn), else the heuristic's."""
    for name, source in ((kernel, "forced"), (override(), "override")):
        if name is not None and _applies(name, problem, operands):
            return _refusing(heuristic(problem)._replace(name=name, k_slices=1, source=source), problem)
    if not measure or _products.forked() or not environment.measures():
        return heuristic(problem)
    known = _remembered(problem)
    if known is not None:
        return known
    key = problem.key()
    with measuring.process.turn(key) as why_not:
        if why_not == measuring.SPENT:
            return _neighbor(problem) or heuristic(problem)
        if why_not:
            return heuristic(problem)._replace(provisional=why_not)
        # Another layer's call may have measured this while the turn was waited for.
        return _remembered(problem) or _tuned(problem, operands)


def native(chosen: Chosen) -> _plans.Plan:
    """What an Engine runs for `chosen`, where that is a kernel of the table."""
    return _plans.Plan(chosen.name, chosen.plan_threads, chosen.k_slices)


def executable(chosen: Chosen, problem: Problem, operands: Operands) -> _plans.Plan | Callable[..., Tensor]:
    """What an Engine runs for `chosen`."""
    if chosen.name in rivals.NAMES:
        names = (chosen.name, rivals.BASELINE)  # a tampered cache may name a way that torch refuses
        return next(plan for name in names if (plan := _torch_plan(name, problem, operands))).run
    spare = operands.unquantized() if chosen.refused else None
    kernel = native(chosen)
    kernel.due = measuring.process.due(problem.key(), chosen.provisional) if chosen.provisional else 0.0
    return kernel if spare is None else functools.partial(_fall_back, chosen, problem, spare.packed)


def _fall_back(
    chosen: Chosen,
    problem: Problem,
    packed: _weights.Packed,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    *operands: Tensor,
    kept: list[Tensor] | None = None,
) -> Tensor:
    rows, shape = x.reshape(-1, problem.k), (*x.shape[:-1], problem.columns)
    out, sums = x.new_empty(len(rows), problem.columns), None
    if kept is not None:
        sums = x.new_empty(len(rows), packed.n, dtype=torch.float32)
        kept.append(sums.view(*x.shape[:-1], packed.n))
    beside = [operand.expand(shape).reshape(out.shape) for operand in operands]
    steps = epilogue(problem.activation, None)
    _products.run(packed, native(chosen), steps, rows, bias, out, operands=beside, sums=sums)
    return out.view(shape)


def _applies(name: str, problem: Problem, operands: Operands) -> bool:
    if name in rivals.NAMES:
        return _torch_plan(name, problem, operands) is not None
    return any(row["name"] == name for each in _ways(problem) for row in able(each))


def _ways(problem: Problem) -> list[Problem]:
    """The problem itself and, where it may fall back, the unquantized one."""
    plain = problem.unquantized()
    return [problem, plain] if problem.fallback and Precision(plain.packed).takes(DTYPES[problem.x]) else [problem]


def _refusing(chosen: Chosen, problem: Problem) -> Chosen:
    """`chosen`, which says so if it does not run on the quantized weight."""
    refused = problem.fallback and not any(row["name"] == chosen.name for row in able(problem))
    return chosen._replace(refused=problem.packed if refused else "")


def _torch_plan(name: str, problem: Problem, operands: Operands) -> rivals.Rival | None:
    """torch's way `name`, or None where it is not admitted, would keep yet another pack of the weight, or is refused by
    torch."""
    weight, packs = operands.weight, {} if operands.torch_packs is None else operands.torch_packs
    if weight is None or not problem.admits_torch:
        return None
    problem = problem.unquantized() if problem.fallback else problem
    plain = problem.x == problem.packed == problem.held and problem.m < 1 << 31  # they count rows in 32 bits
    if name != rivals.BASELINE and not plain:
        return None
    try:
        return rivals.make(name, weight, problem.transposed, problem.activation, packs)
    except (AttributeError, RuntimeError) as error:
        _log.debug("%s is no candidate: %s", name, error)
        return None


@functools.cache
def cache() -> TuningCache:
    """What was tuned on this machine, by `Problem.key()`."""
    names = {row["name"] for row in runnable()} | {*rivals.NAMES, *rivals.ATTENTION}
    made = TuningCache(_machine(), names.__contains__, _LIMITS)
    if hasattr(os, "register_at_fork"):
        os.register_at_fork(after_in_child=made.forked)
    atexit.register(made.flush)
    return made


def _machine() -> Machine:
    library = f"{version('fastlinear')} {_build()}"
    return Machine(_processor(), tuple(_kernels.cpu_info()["isas"]), library, torch.__version__)


def _processor() -> str:
    """What tells CPUs of equal brand apart: family, model and stepping, caches, CPUs."""
    info = _kernels.cpu_info()
    caches = "/".join(str(info[level] >> 10) for level in ("l1d", "l2", "l3"))
    numbers = f"family {info['family']} model {info['number']} stepping {info['stepping']}"
    return f"{info['model']}, {numbers}, caches {caches} KiB, {os.cpu_count()} CPUs"


def _build() -> str:
    """Digest of the kernels and of what drives them: another build may rank them differently."""
    digest = hashlib.sha256()
    for path in (_kernels.__file__, _products.__file__):
        with open(str(path), "rb") as library:
            digest.update(library.read())
    return digest.hexdigest()[:12]


def _remembered(problem: Problem, of: Problem | None = None) -> Chosen | None:
    """What the cache knows of the problem (or of one like it, `of`), if today it would be a candidate, name and
    numbers; for a frozen layer also what was known of the same layer before, if a kernel had won there."""
    like = problem if of is None else of
    for held in (problem.held, *(DTYPES if problem.held == FROZEN else ())):
        key = like._replace(held=held).key()
        tuned = cache().get(key)
        known = None if tuned is None else _among_candidates(tuned, problem)
        if tuned is not None and known is not None:
            source = "equal" if cache().is_of_this_process(key) else "cache"
            known = known._replace(source=source, table=tuned.table, measured=_measured(tuned))
            if of is None:
                known = known._replace(speedup=tuned.speedup, spread=tuned.spread)
            return _refusing(known, problem)
    return None


def _measured(tuned: Remembered) -> tuple[int, int]:
    return tuned.numbers.get("rows", 0), tuned.numbers.get("columns", 0)


def _among_candidates(tuned: Remembered, problem: Problem) -> Chosen | None:
    """The candidate that was meant, if there is one."""
    threads, slices = (tuned.numbers.get(number, 1) for number in ("threads", "k_slices"))
    meant = Chosen(problem.m, problem.threads, problem.x, tuned.name, threads, slices, "tuned")
    admitted = problem.admits_torch and meant.name in rivals.NAMES and threads == slices == 1
    return meant if admitted or any(meant in native_candidates(each) for each in _ways(problem)) else None


def _neighbor(problem: Problem) -> Chosen | None:
    """What was measured for the bucket of M next to this one, or the one after that."""
    up = _plans.bucket(problem.m + 1)
    down = max(1, problem.m - 1 if problem.m <= 8 else _plans.bucket(problem.m * 2 // 3))
    for m in (down, up, _plans.bucket(max(1, problem.m // 2)), _plans.bucket(2 * problem.m)):
        known = _remembered(problem, of=problem._replace(m=m))
        if known is not None:
            return known._replace(source="neighbor", table=(), measured=(0, 0))
    return None


def _tuned(problem: Problem, operands: Operands) -> Chosen:
    small, tensors = _proxy(problem, operands)
    x, beside = _input(small), _beside(small)
    natives: dict[str, Chosen] = {}
    runs, weights = [], []
    for each, those in zip(_ways(problem), (tensors, tensors.unquantized() or tensors), strict=False):
        found = {spell(c): c for c in native_candidates(each)}
        runs += [
            race.Candidate(name, _call_native(c, small, those, x, beside), c.plan_threads) for name, c in found.items()
        ]
        weights.append(those.packed.data)
        natives |= found
    baseline = rivals.BASELINE if _torch_plan(rivals.BASELINE, small, tensors) else None
    weights += [] if tensors.weight is None else [tensors.weight]
    for name in rivals.NAMES:
        plan = _torch_plan(name, small, tensors)
        if plan is None or tensors.weight is None:
            continue
        weights += [] if plan.packed is None else [plan.packed]
        runs.append(race.Candidate(name, functools.partial(plan.run, x, tensors.weight, tensors.bias, *beside)))
    blocks = [rivals.memory(w) for w in weights]

    def evict() -> None:
        for address, nbytes in blocks:
            _cpu.evict(address, nbytes)

    with torch.inference_mode(), Waits(_products.pool_threads()) as waited:
        floor = _least_seconds(small, tensors)
        choice = race.choose(runs, baseline or spell(heuristic(problem)), evict=evict, waited=waited, floor=floor)
        stock = _stock(small, tensors, x) if baseline is None and not choice.busy else None
        chosen = next(run for run in runs if run.name == choice.name)
        ratio = (choice.speedup, choice.spread) if baseline else None
        if stock is not None:
            ratio = race.compare(chosen, stock, evict=evict, waited=waited, floor=floor)
    _tell(problem, choice)
    if not believed(problem.key(), choice):
        return heuristic(problem)._replace(provisional=measuring.BUSY)
    winner = natives.get(choice.name) or Chosen(problem.m, problem.threads, problem.x, choice.name, 1, 1, "tuned")
    speedup, spread = ratio or (None, 0.0)
    winner = winner._replace(table=choice.table, speedup=speedup, spread=spread, measured=(small.m, small.n))
    numbers = {"threads": winner.plan_threads, "k_slices": winner.k_slices, "rows": small.m, "columns": small.n}
    remember(problem.key(), choice, Remembered(winner.name, numbers, choice.table, speedup, spread))
    return _refusing(winner, problem)


def believed(key: str, choice: race.Verdict) -> bool:
    """Whether a race for `key` told anything, which the process takes down: a busy machine tells nothing."""
    (measuring.process.failed if choice.busy else measuring.process.succeeded)(key)
    return not choice.busy


def remember(key: str, choice: race.Verdict, found: Remembered) -> None:
    """Keeps what a race found: for good, or for this process where it was too noisy to tell."""
    (cache().put if choice.decided else cache().hold)(key, found)


def _stock(problem: Problem, operands: Operands, x: Tensor) -> race.Candidate | None:
    """What the layer was before it was rounded or quantized, to tell the speed-up by: F.linear on the parameter and the
    activation; None where the parameter is gone, or does not go with x."""
    weight = operands.weight
    if weight is None or weight.dtype is not x.dtype or operands.out is not None:
        return None
    bias = operands.bias if operands.bias is None else operands.bias.to(x.dtype)
    run = rivals.make(rivals.BASELINE, weight, problem.transposed, problem.activation, {}).run
    return race.Candidate(rivals.BASELINE, functools.partial(run, x, weight, bias, *_beside(problem)))


def _input(problem: Problem) -> Tensor:
    # A generator of its own: tuning must not move the user's random numbers.
    shape, generator = (problem.m, problem.k), torch.Generator("cpu").manual_seed(0)
    if problem.x in DTYPES:
        return torch.randn(shape, generator=generator, dtype=DTYPES[problem.x], device="cpu")
    return torch.randint(0, 128, shape, generator=generator, device="cpu").to(dtype_of_rows(problem.x))


def _beside(problem: Problem) -> list[Tensor]:
    """Operands of the epilogue as they most often are: of the shape and dtype of y."""
    count, dtype = count_operands(problem.activation), DTYPES.get(problem.x, torch.float32)
    return [torch.ones(problem.m, problem.columns, dtype=dtype, device="cpu") for _ in range(count)]


def _proxy(problem: Problem, operands: Operands) -> tuple[Problem, Operands]:
    """The problem to measure instead of `problem`, and its tensors."""
    tiles = any(row["row_step"] > 1 for row in able(problem))
    work, rows = (_PROXY_TILE_WORK, _PROXY_TILE_ROWS) if tiles else (_PROXY_WORK, _PROXY_ROWS)
    area = work * problem.threads / max(problem.k, 1)  # rows x columns
    row_bytes = operands.packed.dtype.itemsize * max(problem.k, 1)
    nbytes = _PROXY_CACHES * l2() * problem.threads
    least = _PROXY_COLUMNS * max(2, problem.threads)
    m, n = problem.m, min(problem.n, max(least, nbytes // row_bytes))
    if m * max(n, 1) > area:
        m = min(m, max(1, int(area / max(n, 1)) // rows) * rows)
        n = min(n, max(least, int(area / m)))
    head = operands.head(n, problem.transposed)
    return problem._replace(m=m, n=head.packed.n), head


def _least_seconds(problem: Problem, operands: Operands) -> float:
    """What a call takes at the very least."""
    work, nbytes = problem.m * problem.n * problem.k, operands.packed.nbytes
    return max(work / _MOST_WORK, nbytes / _MOST_BYTES) / problem.threads


def _call_native(
    chosen: Chosen, problem: Problem, tensors: Operands, x: Tensor, beside: list[Tensor]
) -> Callable[[], object]:
    plan, steps = native(chosen), epilogue(problem.activation, tensors.out)
    dtype = DTYPES.get(problem.x, torch.float32) if tensors.out is None else tensors.out.dtype

    def call() -> None:
        out = torch.empty(x.shape[0], problem.columns, dtype=dtype, device="cpu")
        _products.run(tensors.packed, plan, steps, x, tensors.bias, out, tensors.rows, beside)

    return call


def spell(chosen: Chosen) -> str:
    """What the table of a tuning calls it."""
    return f"{chosen.name} t{chosen.plan_threads}" + (f" k/{chosen.k_slices}" if chosen.k_slices > 1 else "")


def _tell(problem: Problem, choice: race.Verdict) -> None:
    """The table of a tuning, like Inductor's AUTOTUNE log."""
    best = choice.table[0][1] if choice.table else 0.0
    lines = [f"AUTOTUNE linear({problem.m}x{problem.k}, {problem.n}x{problem.k}) {problem.key()}"]
    lines += [f"  {name:<28} {ms:9.4f} ms {best / ms:6.1%}" for name, ms in choice.table]
    verdict = f"chosen: {choice.name}" if choice.decided else f"too noisy to tell: {choice.name} for now"
    verdict = "the machine was busy: a plan by rule for now" if choice.busy else verdict
    lines.append(f"{verdict}; {choice.rounds} rounds, {choice.seconds * 1e3:.1f} ms")
    tell("\n".join(lines))


def tell(text: str) -> None:
    """Why a call is slow, for whoever looks for it: on stderr if FASTLINEAR_VERBOSE=1, else logged at debug level."""
    if environment.verbose():
        print(text, file=sys.stderr)
    else:
        _log.debug(text)
