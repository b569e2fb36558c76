"""How the threads of larger machines would share the benchmark's products, by the code that cuts them.

    python benchmarks/cutting.py                          8, 16, 64 and 128 threads, and 128 on two sockets
    python benchmarks/cutting.py --threads 32 --dtype bfloat16 --ms 1,16,128

Nothing is computed. For each shape and number of threads the plan is the one that the rule chooses, since what a
machine would measure is not known here; a tuning has it among its candidates. Printed are, with work counted in sums of
whole tiles:

    busiest   work of the thread that has the most, over the mean of all threads
    waiting   share of the threads' time in which they would wait for the busiest one
    panels    bytes of packed weights that the threads' second-level caches take in, over those there are
    far       share of these bytes that a second socket holds, where pages lie by halves on two
    slices    of K

    a * stands where the tiles are too few for a fair share, whoever cuts them
"""

from __future__ import annotations

import argparse
from collections import Counter
from typing import NamedTuple

import shapes
import torch

import fastlinear._kernels as _kernels
import fastlinear._plans as _plans
import fastlinear._products as _products
import fastlinear._tensors as _tensors
from fastlinear.plan.candidates import Chosen, heuristic, native_candidates
from fastlinear.plan.problem import Problem

THREADS, FAIR = (8, 16, 64, 128), 1.1
DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in _tensors.FORMATS}
ROWS = {row["name"]: row for row in _kernels.rows()}


class Cut(NamedTuple):
    """What a plan gives the threads to do."""

    name: str
    k_slices: int
    busiest: float  # the most work of a thread, over the mean
    panels: float  # bytes of panels read, over those there are
    far: float  # share of the bytes read that lie on the other one of two sockets
    shareable: bool  # whether whole tiles can be shared so that no thread has more than a tenth above the mean
    working: int  # threads that have something to do


def problem(m: int, n: int, k: int, threads: int, form: str) -> Problem:
    return Problem(m, n, k, form, form, form, "fp32", True, None, False, threads)


def cut(plan: Chosen, of: Problem, dtype: torch.dtype) -> Cut:
    row, threads = ROWS[plan.name], plan.plan_threads
    native = _plans.Plan(plan.name, threads, plan.k_slices)
    work: dict[tuple[int, int], int] = Counter()  # by part and thread, in sums of whole tiles
    panels: dict[tuple[int, int, int], set[int]] = {}  # by columns and K: who reads them
    tiles = 0
    for part, thread, rows, columns, ks in _products.pieces(native, of.panels, dtype, of.m, of.n, of.k):
        row_tiles = -(-(rows[1] - rows[0]) // row["mr"])
        work[part, thread] += row_tiles * (ks[1] - ks[0])
        tiles += row_tiles
        panels.setdefault((columns[0], *ks), set()).add(thread)
    parts = {part for part, _ in work}
    busiest = sum(max(work[part, thread] for thread in range(threads)) for part in parts)
    size = {key: min(row["columns"], of.n - key[0]) * (key[2] - key[1]) for key in panels}
    read = sum(size[key] * len(readers) for key, readers in panels.items())
    far = sum(
        size[key] * sum((2 * key[0] < of.n) != (2 * thread < threads) for thread in readers)
        for key, readers in panels.items()
    )
    tiles //= plan.k_slices
    fair = -(-tiles // threads) * threads / tiles <= FAIR
    return Cut(
        plan.name,
        plan.k_slices,
        busiest * threads / sum(work.values()),
        read / sum(size.values()),
        far / read,
        fair,
        len({thread for _, thread in work}),
    )


def best(of: Problem, dtype: torch.dtype) -> Cut:
    """The cut of the rule's kernel, with one slice of K or with several, whichever leaves less waiting."""
    chosen = heuristic(of)
    same = [c for c in native_candidates(of) if (c.name, c.plan_threads) == (chosen.name, chosen.plan_threads)]
    return min((cut(c, of, dtype) for c in same), key=lambda c: (round(max(c.busiest, FAIR), 3), c.k_slices))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=shapes.parse_numbers, default=THREADS)
    parser.add_argument("--ms", type=shapes.parse_numbers, default=shapes.GRID.ms)
    parser.add_argument("--dtype", choices=DTYPES, default="bfloat16")
    options = parser.parse_args()
    dtype = DTYPES[options.dtype]
    print(f"{'threads':>7}  {'M x K x N':<18}{'busiest':>9}{'waiting':>9}{'panels':>8}{'far':>6}{'slices':>8}  kernel")
    for threads in options.threads:
        for k, n in shapes.GRID.shapes:
            for m in options.ms:
                of = problem(m, n, k, threads, _tensors.FORMATS[dtype])
                c = best(of, dtype)
                print(
                    f"{threads:>7}  {f'{m} x {k} x {n}':<18}{c.busiest:>8.2f}{' ' if c.shareable else '*'}"
                    f"{1 - 1 / c.busiest:>8.0%}{c.panels:>8.2f}{c.far:>6.0%}{c.k_slices:>8}  {c.name}"
                )


if __name__ == "__main__":
    main()
