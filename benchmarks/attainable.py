"""The time that the machine itself needs for a product, measured beside the candidates.

attainable seconds = max(2 M N K / peak, bytes to read / read rate of that working set)

Peak and read rate are measured as fastlinear/plan/roofline.py does; bytes to read are the weight, x and the bias, each
once. The peak is that of fp32 kernels for every floating format and for weights that are widened to it, that of integer
kernels for int8; where the CPU multiplies the format itself, the peak of those kernels is measured too, as the "native"
one. All figures are sampled once a round, so a drifting frequency or a busy neighbor hits ceiling and candidates alike.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import fastlinear
from fastlinear.plan import roofline
from fastlinear.spec.formats import FP32, PRODUCTS


class Peaks(NamedTuple):
    """Whose peaks are measured: the kernels of one ISA, and those that multiply the format itself, if there are."""

    isa: str
    kernels: tuple[str, ...]
    native_isa: str | None = None
    native: tuple[str, ...] = ()


def peaks_of(form: str, in_groups: bool = False) -> Peaks:
    """For weights in this format: of the best ISA that runs here; in_groups: of integers as vectors multiply them,
    under which weights in groups of K are, too."""
    packed = "int8" if in_groups else form if form in PRODUCTS else FP32
    rows = [row for row in fastlinear.kernels() if row["runnable"]]  # best first
    rows = [row for row in rows if row["row_step"] == 1] if in_groups else rows
    ours = [row for row in rows if row["format"] == packed]
    own = [row for row in rows if row["rows"] == row["format"] == form != FP32 and row["accumulate"] == FP32]
    isa, native_isa = ours[0]["isa"], own[0]["isa"] if own else None
    kernels, native = (
        tuple(row["name"] for row in of if row["isa"] == best) for of, best in ((ours, isa), (own, native_isa))
    )
    return Peaks(isa, kernels, native_isa, native)


class Ceiling:
    """What the machine can do while one cell of the grid is measured. Call it once a round."""

    def __init__(self, peaks: Peaks, threads: int, working_set: int, hot: bool) -> None:
        self._peaks, self._threads, self._hot = peaks, threads, hot
        self._memory = roofline.memory_of(working_set)
        self._flops: list[float] = []
        self._native: list[float] = []
        self._reads: dict[int, list[float]] = {ahead: [] for ahead in roofline.AHEAD}

    def __call__(self) -> None:
        ahead = roofline.AHEAD[len(self._flops) % len(roofline.AHEAD)]  # in turn, which costs a round less
        self._flops.append(roofline.peak(self._peaks.kernels, self._threads))
        if self._peaks.native:
            self._native.append(roofline.peak(self._peaks.native, self._threads))
        rate = roofline.read_rate(self._memory, self._threads, not self._hot, (ahead,))
        self._reads[ahead].append(rate)

    @property
    def flops(self) -> float:
        return upper_quartile(self._flops)

    @property
    def bandwidth(self) -> float:
        """Of the way to prefetch that reads fastest here."""
        return max(upper_quartile(rates) for rates in self._reads.values() if rates)

    def figures(self, m: int, k: int, n: int, itemsizes: tuple[int, float], seconds: float) -> dict[str, float]:
        """What a record says of the roofline, and of the native one if there is one; `seconds` is FastLinear's time."""
        least = attainable(m, k, n, self.flops, self.bandwidth, itemsizes)
        figures = {
            "bytes": bytes_read(m, k, n, itemsizes),
            "peak_gflops": self.flops / 1e9,
            "read_gbs": self.bandwidth / 1e9,
            "attainable_us": 1e6 * least,
            "fraction": least / seconds,
        }
        if self._native:
            flops = upper_quartile(self._native)
            least = attainable(m, k, n, flops, self.bandwidth, itemsizes)
            figures |= {
                "native_gflops": flops / 1e9,
                "native_attainable_us": 1e6 * least,
                "native_fraction": least / seconds,
            }
        return figures


def upper_quartile(rates: Sequence[float]) -> float:
    """What the lower quartile is for times."""
    return sorted(rates, reverse=True)[len(rates) // 4]


def attainable(m: int, k: int, n: int, flops: float, bandwidth: float, itemsizes: tuple[int, float] = (4, 4)) -> float:
    """Seconds that a product [m, k] x [n, k]^T + [n] takes at least; itemsizes: see bytes_read."""
    return max(2 * m * n * k / flops, bytes_read(m, k, n, itemsizes) / bandwidth)


def bytes_read(m: int, k: int, n: int, itemsizes: tuple[int, float] = (4, 4)) -> int:
    """itemsizes: bytes of an element of x and bias, and of the weight."""
    of_x, of_weight = itemsizes
    return round(of_weight * n * k) + of_x * (m * k + n)
