"""The roofline: the time that the machine itself needs for a product, measured beside the candidates.

attainable seconds = max(2 M N K / FMA peak, bytes to read / read bandwidth of that working set)

(Williams, Waterman, Patterson: Roofline, CACM 52(4), 2009.) Bytes to read are the weight, x and the bias, each once.
The FMA peak is that of fp32 for every floating dtype; where the CPU multiplies the dtype itself, the peak of that
instruction is measured too, as the "native" one. For int8 it is the peak of VNNI where the CPU has it. All figures are
sampled once a round, so a drifting frequency or a busy neighbor hits ceiling and candidates alike.
"""

from __future__ import annotations

import ctypes
import os
import subprocess
import tempfile
from collections.abc import Sequence
from functools import cache
from pathlib import Path

SOURCE = Path(__file__).with_name("roofline.cpp")
# (streams read side by side, bytes prefetched ahead): which is fastest depends on the level of the memory.
VARIANTS = ((1, 0), (4, 0), (1, 512), (1, 4096))
_FMA_REPEATS = 40  # of 0.1 ms each: the threads of torch's pool spin for some ms after a call, this outlasts them
# A pass over a small buffer is too short to be timed: at least so many bytes are read between two looks at the clock,
# and in one measurement.
_BYTES_A_LOOK, _BYTES_A_SAMPLE = 2 << 20, 64 << 20


@cache
def probes() -> ctypes.CDLL:
    """Compiled with $CXX, g++ if unset, once a process."""
    with tempfile.TemporaryDirectory() as folder:
        library = Path(folder, "roofline.so")
        compiler = os.environ.get("CXX", "g++").split()
        flags = ["-std=c++20", "-O3", "-shared", "-fPIC", "-pthread", f"-I{SOURCE.parents[1] / 'include'}"]
        subprocess.run([*compiler, *flags, "-o", library, SOURCE], check=True)
        return ctypes.CDLL(str(library))


class Roofline:
    """Measures with the probes.

    isa: of the multiply-adds and the reads, a row of kProbes: "avx2" and "avx512" are fp32 FMA, "avx_vnni" and
    "avx512_vnni" sums of four byte products. native: whose multiply-adds are measured beside them, as
    "avx512_bf16"; `native` is None where that is not to be had.
    """

    def __init__(self, isa: str, native: str | None = None) -> None:
        self._isa = isa
        loaded = probes()
        size = ctypes.c_size_t
        self._fma, self._read = loaded.fma_peak, loaded.read_bandwidth
        self._fma.restype = self._read.restype = ctypes.c_double
        self._fma.argtypes = [ctypes.c_char_p, size, size]
        self._read.argtypes = [ctypes.c_char_p, *[size] * 6]
        if self.flops(1) == 0:
            raise ValueError(f"the roofline has no probe for {isa}, or this CPU has no {isa}")
        self.native = native if native and self.flops(1, native) else None

    def flops(self, threads: int, isa: str | None = None) -> float:
        """Operations a second of so many threads, an FMA being two: of its own ISA, or of `isa`."""
        return float(self._fma((isa or self._isa).encode(), threads, _FMA_REPEATS))

    def bandwidth(self, threads: int, nbytes: int, variant: tuple[int, int], hot: bool) -> float:
        """Bytes a second that so many threads read, each its share of `nbytes`: again and again, or once if not hot.

        A second pass would find some of the bytes in the caches, even of a buffer that is larger than they are.
        """
        passes = max(1, _BYTES_A_LOOK // nbytes) if hot else 1
        repeats = max(2, _BYTES_A_SAMPLE // (nbytes * passes)) if hot else 1
        return float(self._read(self._isa.encode(), threads, repeats, nbytes, passes, *variant))


class Ceiling:
    """What the machine can do while one cell of the grid is measured. Call it once a round."""

    def __init__(self, roofline: Roofline, threads: int, working_set: int, hot: bool) -> None:
        self._roofline, self._threads, self._working_set, self._hot = roofline, threads, working_set, hot
        self._flops: list[float] = []
        self._native: list[float] = []
        self._reads: dict[tuple[int, int], list[float]] = {variant: [] for variant in VARIANTS}

    def __call__(self) -> None:
        variant = VARIANTS[len(self._flops) % len(VARIANTS)]
        self._flops.append(self._roofline.flops(self._threads))
        if self._roofline.native:
            self._native.append(self._roofline.flops(self._threads, self._roofline.native))
        rate = self._roofline.bandwidth(self._threads, self._working_set, variant, self._hot)
        self._reads[variant].append(rate)

    @property
    def flops(self) -> float:
        return upper_quartile(self._flops)

    @property
    def bandwidth(self) -> float:
        """Of the variant that reads fastest here."""
        return max(upper_quartile(rates) for rates in self._reads.values() if rates)

    def figures(self, m: int, k: int, n: int, itemsizes: tuple[int, int], seconds: float) -> dict[str, float]:
        """What a record says of the roofline, and of the native one if there is one; `seconds` is FastLinear's time."""
        least = attainable(m, k, n, self.flops, self.bandwidth, itemsizes)
        figures = {
            "bytes": bytes_read(m, k, n, itemsizes),
            "fma_gflops": self.flops / 1e9,
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


def attainable(m: int, k: int, n: int, flops: float, bandwidth: float, itemsizes: tuple[int, int] = (4, 4)) -> float:
    """Seconds that a product [m, k] x [n, k]^T + [n] takes at least; itemsizes: see bytes_read."""
    return max(2 * m * n * k / flops, bytes_read(m, k, n, itemsizes) / bandwidth)


def bytes_read(m: int, k: int, n: int, itemsizes: tuple[int, int] = (4, 4)) -> int:
    """itemsizes: bytes of an element of x and bias, and of the weight."""
    of_x, of_weight = itemsizes
    return of_weight * n * k + of_x * (m * k + n)
