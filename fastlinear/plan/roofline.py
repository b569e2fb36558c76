"""The roofline: what this CPU can do at most, measured with the package's own kernels, and the time that it leaves to a
product (Williams, Waterman, Patterson: Roofline, CACM 52(4), 2009).

    seconds >= max(2 M N K / operations, bytes / bandwidth)

Operations a second are those of the fastest kernel of a format on operands in the second-level caches; bandwidth is
that of the fastest read of a weight by one row of x, from the caches and from memory. So the roof is what was reached
once, not what a data sheet says, and it is measured on as many threads as the product runs on.
"""

from __future__ import annotations

import math
import time
from typing import NamedTuple

import torch

import fastlinear._cpu as _cpu
import fastlinear._kernels as _kernels
import fastlinear._plans as _plans
import fastlinear._products as _products
import fastlinear._weights as _weights
from fastlinear.plan import measuring, table
from fastlinear.plan.candidates import Chosen, native_candidates
from fastlinear.plan.problem import FROZEN, Problem
from fastlinear.plan.waits import Waits
from fastlinear.spec.formats import DTYPES, FP32, PRODUCTS

_ROWS, _COLUMNS, _K = 192, 256, 512  # a thread's share: operands of 0.6 MB in fp32, which a second-level cache holds
_LONG, _CACHED, _BEYOND = 1024, 256, 4096  # K, and columns a thread: 1 MB in fp32, and 16 MB that are evicted first
_CALLS, _COLD_CALLS = 20, 2  # of each candidate, of which the fastest counts
_SECONDS = 0.1  # at most, for all candidates
_STOLEN = 0.1  # of the time, in which threads waited for others: what was measured is not believed


class Roofline(NamedTuple):
    """operations: a second, two a multiply-add, on weights of one format; bytes a second of weights that lie in the
    second-level caches (cached), in a larger one (shared, as memory where there is none), and in memory."""

    packed: str
    threads: int
    operations: float
    cached: float
    shared: float
    memory: float

    def bandwidth(self, working_set: float) -> float:
        """Bytes a second of what lies where so many bytes lie that are read again and again."""
        info = _kernels.cpu_info()
        if working_set <= (info["l2"] or 1 << 20) * self.threads:
            return self.cached
        return self.shared if working_set <= info["l3"] else self.memory

    def seconds(self, m: int, n: int, k: int, weight_bytes: float, working_set: float = math.inf) -> float:
        """The least time of x [m, k] times a weight [n, k] of so many bytes, which lies where `working_set` does."""
        bandwidth = self.bandwidth(working_set)
        return max(2 * m * n * k / self.operations, (weight_bytes + 4 * m * (n + k)) / bandwidth)

    def spot(self, plan: Chosen, k: int, milliseconds: float, weight_bytes: float) -> Spot:
        """Where a plan's candidate of K = k stands below it. Its time, which the tuner measured, is the geometric mean
        of a call whose weight comes from memory and of one whose weight lies where it did after that."""
        m, n = plan.measured
        least = (self.seconds(m, n, k, weight_bytes, working_set) for working_set in (math.inf, weight_bytes))
        seconds, work = milliseconds * 1e-3, 2 * m * n * k
        return Spot(
            math.sqrt(math.prod(least)) / seconds, work / seconds, work / (weight_bytes + 4 * m * (n + k)), self
        )


class Spot(NamedTuple):
    """A measured product below a roof. share: of the operations a second that are possible, 1 for all; operations: a
    second; intensity: operations for each byte read or written."""

    share: float
    operations: float
    intensity: float
    roof: Roofline


_known: dict[tuple[str, str, int], Roofline] = {}


def measure(x: str, packed: str, threads: int) -> Roofline | None:
    """The roofline of rows and weights in these formats on that many of torch's threads; None while others have the
    CPUs. Measured once in a process, in some 0.2 s.

    Formats that kernels widen, but have no products of their own for, are under the roof of fp32.
    """
    packed = packed if packed in DTYPES or packed in PRODUCTS else FP32
    x = x if packed in DTYPES and packed != FP32 else FP32
    if (x, packed, threads) not in _known:
        with Waits(_products.pool_threads()) as waited:
            began, before = time.perf_counter(), waited()
            found = _measured(x, packed, threads)
            if waited() - before > _STOLEN * (time.perf_counter() - began):
                return None
        _known[x, packed, threads] = found
    return _known[x, packed, threads]


def _measured(x: str, packed: str, threads: int) -> Roofline:
    """The fastest product, and the bytes that one row of x reads a second, from the caches and from memory."""
    with measuring.process.thorough(), measuring.process.turn("roofline"), torch.inference_mode():
        seconds = _fastest(x, packed, threads, _ROWS, _COLUMNS * threads, _K)
        cached, shared, memory = (
            4 * columns * threads * _LONG / _fastest(FP32, FP32, threads, 1, columns * threads, _LONG, cold=cold)
            for columns, cold in ((_CACHED, False), (_BEYOND, False), (_BEYOND, True))
        )
    return Roofline(packed, threads, 2 * _ROWS * _COLUMNS * threads * _K / seconds, cached, shared, memory)


def _fastest(of_x: str, packed: str, threads: int, m: int, n: int, k: int, *, cold: bool = False) -> float:
    """Seconds of the fastest call of any kernel on so many threads."""
    whole = packed in PRODUCTS
    weight = _weight(packed, n, k)
    problem = Problem(m, n, k, of_x, packed, FROZEN, FP32, False, None, False, threads, "symmetric" * whole)
    rows = _plans.RowQuantizer("symmetric") if whole else None
    x, nothing = torch.ones(m, k, dtype=DTYPES[of_x], device="cpu"), _plans.Epilogue(())
    out, best, end = torch.empty(m, n, dtype=x.dtype, device="cpu"), math.inf, time.perf_counter() + _SECONDS
    for plan in native_candidates(problem):
        if plan.plan_threads != threads or plan.k_slices > 1:
            continue
        runs = _plans.Plan(plan.name, threads)
        for _ in range(_COLD_CALLS if cold else _CALLS):
            if cold:
                _cpu.evict(weight.data.data_ptr(), weight.data.nbytes)
            began = time.perf_counter()
            _products.run(weight, runs, nothing, x, None, out, rows)
            best = min(best, time.perf_counter() - began)
            if time.perf_counter() > end:
                return best
    return best


def _weight(packed: str, n: int, k: int) -> _weights.Packed:
    if packed in DTYPES:
        return _weights.Packed(torch.ones(n, k, dtype=DTYPES[packed], device="cpu"), table.layout(packed))
    ones = torch.ones(n, k, dtype=torch.int8, device="cpu")
    return _weights.Packed(ones, table.layout(packed), torch.ones(n, device="cpu"))
