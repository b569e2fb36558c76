"""The roofline: what this CPU can do at most, measured with the package's own kernels, and the time that it leaves to a
product (Williams, Waterman, Patterson: Roofline, CACM 52(4), 2009).

    seconds >= max(2 M N K / operations, bytes / bandwidth)

Operations a second are those of a kernel that has its rows in L1 and its panels in L2 (`peak`); bandwidth is that of
reading as many bytes from where they lie (`read_rate`). So the roof is what was reached once, not what a data sheet
says, and it is measured on as many threads as the product runs on. `measure` has the roof of a format, for reports;
benchmarks measure the two beside each of their products.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

import fastlinear._cpu as _cpu
import fastlinear._kernels as _kernels
import fastlinear._plans as _plans
import fastlinear._products as _products
from fastlinear.plan import measuring
from fastlinear.plan.caches import l2
from fastlinear.plan.candidates import Chosen, native_candidates
from fastlinear.plan.problem import FROZEN, Problem
from fastlinear.plan.waits import Waits
from fastlinear.spec.formats import DTYPES, FP32, PRODUCTS

AHEAD = (0, 512, 4096)  # bytes to prefetch: which is fastest depends on the level of the memory
_LEAST_BYTES = 16 << 20  # to read between two looks at the clock
_CACHED, BEYOND = 1 << 20, 16 << 20  # bytes a thread: what a second-level cache holds, and what it does not
_MANY = 512  # rows, columns and K of a product that all kernels are for
_STOLEN = 0.1  # of the time, in which threads waited for others: what was measured is not believed


def peak(kernels: Iterable[str], threads: int) -> float:
    """Operations a second, two a multiply-add, of the fastest of these kernels on so many threads, or on one."""
    return max(_products.peak(_plans.Plan(name, count)) for name in kernels for count in {1, threads})


def memory_of(nbytes: int) -> Tensor:
    """So many bytes, or up to a line more, to read."""
    return torch.ones(-(-nbytes // 64) * 64, dtype=torch.uint8, device="cpu")


def read_rate(memory: Tensor, threads: int, cold: bool, ahead: Sequence[int] = AHEAD) -> float:
    """Bytes a second that so many threads read, each its share, again and again, or once from memory where it is cold;
    of the fastest of ways to prefetch."""
    passes = 1 if cold else max(2, _LEAST_BYTES // memory.nbytes)
    best = 0.0
    for each in ahead:
        if cold:
            _cpu.evict(memory.data_ptr(), memory.nbytes)
        best = max(best, _products.read_rate(memory, threads, passes, each))
    return best


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
        if working_set <= l2() * self.threads:
            return self.cached
        return self.shared if working_set <= _kernels.cpu_info()["l3"] else self.memory

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
    whole = packed in PRODUCTS
    problem = Problem(_MANY, _MANY, _MANY, x, packed, FROZEN, FP32, False, None, False, threads, "symmetric" * whole)
    with measuring.process.thorough(), measuring.process.turn("roofline"):
        operations = peak(dict.fromkeys(plan.name for plan in native_candidates(problem)), threads)
        near, far = (memory_of(nbytes * threads) for nbytes in (_CACHED, BEYOND))
        cached, shared, beyond = (read_rate(m, threads, cold) for m, cold in ((near, False), (far, False), (far, True)))
    return Roofline(packed, threads, operations, cached, shared, beyond)
