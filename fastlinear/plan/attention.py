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
from fastlinear.plan.decide import believed, cache, remember, tell
from fastlinear.plan.memory import Remembered
from fastlinear.plan.waits import Waits

OURS, TORCH = rivals.ATTENTION
_LANES = 32  # contract/attention.hpp
FEW_QUERIES = 8  # driver/few_queries.hpp
_TILES_WIN = 96  # keys or queries from which on torch's bf16 products in AMX tiles beat ours on widened numbers
_LARGEST = 256  # of heads


class Question(NamedTuple):
    """What is asked: attention of `heads` heads (a bucket of batch x heads) of `size` numbers each."""

    heads: int
    queries: int
    keys: int
    size: int
    format: str
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


@functools.cache
def _l2() -> int:
    return int(_kernels.cpu_info()["l2"]) or 1 << 20


@functools.cache
def _has_tiles() -> bool:
    return any(row["format"] == "bf16" and row["row_step"] > 1 and row["runnable"] for row in _kernels.kernels())


def why_never(asked: Question) -> str | None:
    """Why torch runs it, whatever would be faster; None where it may be ours."""
    nbytes = 4 * (2 * asked.keys * asked.size + _LANES * (asked.size + 2 * asked.keys))
    if asked.queries > FEW_QUERIES and nbytes > _l2():
        return f"{asked.keys} keys of {asked.size} do not fit the second-level cache"
    if asked.size > _LARGEST:
        return f"heads of {asked.size} are more than {_LARGEST} wide"
    return None


def by_rule(asked: Question) -> Answer:
    """Where nothing is measured."""
    many = asked.queries > FEW_QUERIES and max(asked.queries, asked.keys) >= _TILES_WIN
    if many and asked.format == "bf16" and _has_tiles():
        return Answer(False, "torch, by rule: it multiplies bf16 in tiles")
    return Answer(True, "fastlinear, by rule")


def answer(exact: Question, ours: Callable[[], object], stock: Callable[[], object], *, measure: bool = True) -> Answer:
    """Whether `ours` or `stock`, which do the same, is to answer the question; they may be called for measuring."""
    if (reason := why_never(exact)) is not None:
        return Answer(False, f"torch: {reason}")
    asked = exact.bucketed()
    if not measure or not environment.measures() or _products.forked():
        return by_rule(asked)
    key = asked.key()
    known = cache().get(key)
    if known is not None and known.name in rivals.ATTENTION:
        return _told(known)
    with measuring.process.turn(key) as why_not:
        if why_not:
            return by_rule(asked)._replace(due=measuring.process.due(key, why_not))
        with torch.inference_mode(), Waits(_products.pool_threads()) as waited:
            runs = [race.Candidate(OURS, ours, asked.threads), race.Candidate(TORCH, stock)]
            choice = race.choose(runs, TORCH, budget=race.BUDGET / 2, waited=waited)
    rows = "\n".join(f"  {name:<28} {ms:9.4f} ms" for name, ms in choice.table)
    tell(f"AUTOTUNE {key}\n{rows}\nchosen: {choice.name}")
    if not believed(key, choice):
        return by_rule(asked)._replace(due=measuring.process.due(key, measuring.BUSY))
    found = Remembered(choice.name, {}, choice.table, choice.speedup, choice.spread)
    remember(key, choice, found)
    return _told(found)


def _told(known: Remembered) -> Answer:
    if known.name == OURS:
        return Answer(True, f"fastlinear, {known.speedup or 1.0:.2f} times as fast as torch")
    return Answer(False, "torch, which was measured to be no slower")


def is_due(found: Answer) -> bool:
    return 0 < found.due <= time.monotonic()
