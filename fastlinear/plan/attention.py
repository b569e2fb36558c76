"""Whether attention runs on kernels of our own or is torch's: remembered, measured, or by a rule."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from typing import NamedTuple

import torch

import fastlinear._environment as environment
import fastlinear._kernels as _kernels
import fastlinear._products as _products
from fastlinear._plans import bucket
from fastlinear.plan import measuring, race, rivals
from fastlinear.plan.caches import l2
from fastlinear.plan.decide import believed, cache, remember, tell
from fastlinear.plan.memory import Remembered
from fastlinear.plan.waits import Waits

OURS, ROUNDED, TORCH = rivals.ATTENTION
_LANES = 32  # contract/attention.hpp
FEW_QUERIES = 8  # driver/few_queries.hpp
_ROUNDED_WINS = 48  # keys or queries from which on products of bf16 repay their packing
_TILES_WIN = 224  # and from which on torch's, in AMX tiles too, are no slower
_LARGEST = 256  # of heads


class Question(NamedTuple):
    """What is asked: attention of `heads` heads (a bucket of batch x heads) of `size` numbers each."""

    heads: int
    queries: int
    keys: int
    size: int
    format: str  # of q, k and v; fp32 that may be rounded is "fp32 as bf16"
    mask: str  # "none", "causal", "row" for one that all queries share, "full"
    threads: int

    def key(self) -> str:
        shape = f"h{self.heads}/q{self.queries}/k{self.keys}/d{self.size}"
        return f"attention/x={self.format}/{self.mask}/{shape}/t{self.threads}"

    def bucketed(self) -> Question:
        return self._replace(heads=bucket(self.heads), queries=bucket(self.queries), keys=bucket(self.keys))


class Answer(NamedTuple):
    ours: bool
    why: str  # for the report
    due: float = 0.0  # when to ask again, by time.monotonic(); 0 for never
    products: str | None = None  # the kernel that multiplies in bf16, if one does


ROUNDABLE = ("bf16", "fp32 as bf16")


def rounding_kernels() -> list[str]:
    """The kernels that attention may multiply in bf16 by, the best first."""
    rows = (row for row in _kernels.kernels() if row["runnable"] and row["rows"] == row["format"] == "bf16")
    return [row["name"] for row in sorted(rows, key=lambda row: -row["mr"] * row["row_step"])]


@functools.cache
def rounding_kernel() -> str | None:
    """That which does; None where the CPU has none."""
    return next(iter(rounding_kernels()), None)


def rounding(asked: Question) -> str | None:
    """The kernel that may answer a question in products of bf16, where torch's own would, or users said so."""
    return rounding_kernel() if asked.format in ROUNDABLE and asked.queries > FEW_QUERIES else None


@functools.cache
def _caches() -> tuple[int, int]:
    """Bytes of the second-level cache, and of the largest."""
    return l2(), max(l2(), int(_kernels.cpu_info()["l3"]))


def _exceeds(asked: Question, cache: int) -> bool:
    """Whether what many queries read over and over, keys, values and scores, is more than a cache holds."""
    nbytes = 4 * (2 * asked.keys * asked.size + _LANES * (asked.size + 2 * asked.keys))
    return asked.queries > FEW_QUERIES and nbytes > cache


def why_never(asked: Question) -> str | None:
    """Why torch runs it, whatever would be faster; None where it may be ours."""
    if _exceeds(asked, _caches()[1]):
        return f"{asked.keys} keys of {asked.size} do not fit the caches"
    if asked.size > _LARGEST:
        return f"heads of {asked.size} are more than {_LARGEST} wide"
    return None


def by_rule(asked: Question) -> Answer:
    """Where nothing is measured."""
    if _exceeds(asked, _caches()[0]):
        return Answer(False, f"torch, by rule: {asked.keys} keys of {asked.size} do not fit the second-level cache")
    kernel, longest = rounding(asked), max(asked.queries, asked.keys)
    if kernel is not None and "/amx" in kernel and asked.format == "bf16" and longest >= _TILES_WIN:
        return Answer(False, "torch, by rule: it multiplies bf16 in tiles")
    return Answer(True, "fastlinear, by rule", products=kernel if longest >= _ROUNDED_WINS else None)


def answer(
    exact: Question, ours: Callable[[str | None], object], stock: Callable[[], object], *, measure: bool = True
) -> Answer:
    """Whether `ours`, given the kernel that multiplies in bf16 or None, or `stock`, which do the same, is to answer the
    question; they may be called for measuring."""
    if (reason := why_never(exact)) is not None:
        return Answer(False, f"torch: {reason}")
    asked = exact.bucketed()
    if not measure or not environment.measures() or _products.forked():
        return by_rule(asked)
    key = asked.key()
    known = cache().get(key)
    kernel = rounding(asked)
    if known is not None and known.name in rivals.ATTENTION and (kernel or known.name != ROUNDED):
        return _told(known, kernel)
    with measuring.process.turn(key) as why_not:
        if why_not:
            return by_rule(asked)._replace(due=measuring.process.due(key, why_not))
        with torch.inference_mode(), Waits(_products.pool_threads()) as waited:
            runs = [race.Candidate(OURS, lambda: ours(None), asked.threads), race.Candidate(TORCH, stock)]
            if kernel is not None:
                runs.append(race.Candidate(ROUNDED, lambda: ours(kernel), asked.threads))
            choice = race.choose(runs, TORCH, budget=race.BUDGET / 2, waited=waited)
    rows = "\n".join(f"  {name:<28} {ms:9.4f} ms" for name, ms in choice.table)
    tell(f"AUTOTUNE {key}\n{rows}\nchosen: {choice.name}")
    if not believed(key, choice):
        return by_rule(asked)._replace(due=measuring.process.due(key, measuring.BUSY))
    found = Remembered(choice.name, {}, choice.table, choice.speedup, choice.spread)
    remember(key, choice, found)
    return _told(found, kernel)


def _told(known: Remembered, kernel: str | None) -> Answer:
    if known.name != TORCH:
        rounded = kernel if known.name == ROUNDED else None
        how = f"fastlinear{'' if rounded is None else ' in products of bf16'}"
        return Answer(True, f"{how}, {known.speedup or 1.0:.2f} times as fast as torch", products=rounded)
    return Answer(False, "torch, which was measured to be no slower")


def is_due(found: Answer) -> bool:
    return 0 < found.due <= time.monotonic()
