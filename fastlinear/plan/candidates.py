"""What may run a problem: the kernels of the table that can, in a few splits, and the best of them by rule.

A kernel reads its own layout, and by widening it the layouts of narrower formats; the driver widens rows of x likewise,
and makes any rows into integers for a kernel that reads those.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

from fastlinear.plan.problem import Problem
from fastlinear.plan.table import Row, base, runnable
from fastlinear.spec.formats import DTYPES, FP32, INTEGER_ROWS

_COARSE = {*DTYPES} - {FP32}  # sums of these have to be asked for

# Below the first number of multiply-adds, waking a second thread costs more than it saves; above the second it always
# pays. In between both are candidates.
_SERIAL_WORK, _PARALLEL_WORK = 100e3, 4e6
_MIN_SLICE_K = 256
_FAIR = 1.1  # what a thread may have to do at most, over the mean


class Chosen(NamedTuple):
    """What runs for one bucket of M and format of x, and how it came to that."""

    bucket: int
    threads: int  # torch's number of threads that it is for
    x: str
    name: str  # a kernel of the table, or "torch/linear", "torch/mkl", "torch/mkldnn"
    plan_threads: int
    k_slices: int
    source: str  # "tuned", "equal" (to one that was), "cache", "neighbor" (in M), "heuristic", "override" or "forced"
    table: tuple[tuple[str, float], ...] = ()  # what was measured: candidate, milliseconds; best first
    speedup: float | None = None  # time of torch/linear on the parameter over that of this, where measured
    refused: str = ""  # the format of the pack, where something on the parameter's own was faster and may run
    provisional: str = ""  # why it could not be measured, where a later call is to try again, or has tried in vain
    spread: float = 0.0  # the share of itself that the speed-up is believed to be within, 95 %
    measured: tuple[int, int] = (0, 0)  # rows and columns that the table's times are of; (0, 0) where there are none


def able(problem: Problem) -> tuple[Row, ...]:
    """The kernels that can compute it: they read its panels, and its rows as they are or widened; or, where x is to
    become integers, those."""
    return _able(base(problem.panels), problem.rows, bool(problem.scheme))


@functools.cache
def _able(layout: str, rows: str, integers: bool) -> tuple[Row, ...]:
    allowed = INTEGER_ROWS if integers else {FP32, rows}
    return tuple(row for row in runnable() if layout in row["reads"] and row["rows"] in allowed)


@functools.cache
def _likely(layout: str, read: str, integers: bool, accumulate: str) -> tuple[Row, ...]:
    """Of the able kernels that read the same things in the same way, only the best ISA's: a tuning has no time for the
    scalar ones. All integers are one way; kernels of whole tiles are one beside those of single rows. Coarse sums have
    to be asked for."""
    rows = _able(layout, read, integers)
    best = {_way(row): row["isa"] for row in reversed(rows)}
    return tuple(
        row for row in rows if row["isa"] == best[_way(row)] and row["accumulate"] not in _COARSE - {accumulate}
    )


def native_candidates(problem: Problem) -> list[Chosen]:
    """The able kernels that may be fastest, on one thread and on all, with K slices where the tiles are too few.

    Without further row tiles to share a widened panel, widening it is work in vain, but where whole tiles multiply it.
    """
    work, panels = problem.m * problem.n * problem.k, base(problem.panels)
    counts = {1 if work < _PARALLEL_WORK else problem.threads, 1 if work < _SERIAL_WORK else problem.threads}
    return [
        Chosen(problem.m, problem.threads, problem.x, row["name"], threads, slices, "tuned")
        for row in _likely(panels, problem.rows, bool(problem.scheme), problem.accumulate)
        if row["layout"] == panels or problem.m > (row["mr"] if row["row_step"] == 1 else row["row_step"] // 4)
        for threads in sorted(counts)
        for slices in _slices(problem, row, threads)
    ]


def _way(row: Row) -> tuple[str, str, bool]:
    return row["format"], "integers" if row["rows"] in INTEGER_ROWS else row["rows"], row["row_step"] > 1


def _slices(problem: Problem, row: Row, threads: int) -> list[int]:
    """One, and, where whole tiles give some threads nothing or others more than their share, a number that does better:
    the least that leaves no thread more than a tenth above the mean, else the best of those that K is enough for."""
    tiles = -(-max(problem.m, 1) // row["mr"]) * -(-max(problem.n, 1) // row["columns"])
    allowed = range(1, min(-(-4 * threads // tiles), problem.k // _MIN_SLICE_K) + 1)

    def excess(slices: int) -> float:
        step = max(row["k_step"], row["kr"])
        longest = -(-problem.k // (slices * step)) * step
        return float(-(-tiles * slices // threads) * longest * threads / (tiles * problem.k))

    fair = next((s for s in allowed if excess(s) <= _FAIR), None) or min(allowed, key=excess, default=1)
    return [1, fair] if fair > 1 else [1]


def heuristic(problem: Problem) -> Chosen:
    """A good plan without measuring, on all threads unless the product is small.

    The kernel passes over each panel least often, and where equal reads x as it is, does not widen, has the wider tile.
    From three passes on, one that converts the weight in every pass comes last, and so does one of whole tiles for so
    few rows that most of each would be padding: it reads the weight no faster.
    """
    rows = {row["name"]: row for row in runnable()}
    threads = 1 if problem.m * problem.n * problem.k < _PARALLEL_WORK else problem.threads

    def rank(c: Chosen) -> tuple[int, ...]:
        row = rows[c.name]
        passes = -(-max(problem.m, 1) // row["mr"])
        converts, widens = row["format"] != row["rows"], row["format"] != problem.packed
        last = 4 * max(problem.m, 1) <= row["row_step"] or (converts and passes > 2)
        return last, passes, row["rows"] != problem.rows, widens, -row["columns"], -c.k_slices

    best = min((c for c in native_candidates(problem) if c.plan_threads == threads), key=rank)
    return best._replace(source="heuristic")
