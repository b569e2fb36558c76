"""What the machine itself needs for a product, measured in the same run: the roofline (Williams, Waterman, Patterson,
CACM 52(4), 2009), and for tiles also what their published throughput says.

attainable seconds = max(2 M N K / peak, bytes to read / read rate of that many bytes)

The peak is that of the best kernel with its rows in L1 and its panels in L2; bytes to read are those of the packed
weight and of x.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

import fastlinear._plans as _plans
import fastlinear._products as _products
import fastlinear._weights as _weights
from fastlinear.cli.options import UsageError
from fastlinear.plan.table import Row, runnable
from fastlinear.spec.formats import INTEGER_ROWS, PRODUCTS
from fastlinear.spec.schemes import Scheme

# Operations a cycle of a core's tile unit: a product of 16 x 16 sums and 64 bytes of K takes 16 cycles (Intel 64 and
# IA-32 Architectures Optimization Reference Manual, chapter 20).
_TILE_ROWS, _TILE_BYTES, _TILE_CYCLES = 16, 64, 16
_AHEAD = (0, 512, 4096)  # bytes to prefetch: which is fastest depends on the level of the memory
_LEAST_BYTES = 16 << 20  # to read between two looks at the clock


class Ceiling(NamedTuple):
    """Of one product: bytes to read, operations, operations and bytes a second, cycles that tiles need, the clock."""

    nbytes: int
    work: int
    flops: float
    read_rate: float
    tile_cycles: float | None
    clock: float

    def record(self, seconds: float) -> dict[str, Any]:
        """Shares of the roofline, and of the calculated time where there are tiles, that `seconds` reach."""
        read = self.nbytes / self.read_rate
        least = max(self.work / self.flops, read)
        found = {"peak_gflops": self.flops / 1e9, "peak_read_gbs": self.read_rate / 1e9, "roofline": least / seconds}
        if self.tile_cycles is None:
            return found
        return found | {
            "clock_ghz": self.clock / 1e9,
            "calculated_us": 1e6 * max(self.tile_cycles / self.clock, read),
            "calculated": max(self.tile_cycles / self.clock, read) / seconds,
        }


class Roofline:
    """The ceilings of weights packed in `form`, or as a scheme says, of one ISA or of the best that runs here.

    UsageError where that ISA has no kernel for such weights.
    """

    def __init__(self, form: str, isa: str | None, scheme: Scheme | None = None) -> None:
        self.isa = isa
        self._coding = None if scheme is None else scheme.coding()
        of_integers = form in PRODUCTS or (scheme is not None and scheme.integers)
        rows = [row for row in runnable() if row["format"] == form and (row["rows"] in INTEGER_ROWS) == of_integers]
        self._rows = [row for row in rows if isa in (None, row["isa"])]
        if not self._rows:
            has = sorted({str(row["isa"]) for row in rows})
            raise UsageError(f"--isa {isa} has no kernel for weights in {form}; those that run here: {', '.join(has)}")
        self._isa = str(self._rows[0]["isa"])
        self._rows = [row for row in self._rows if row["isa"] == self._isa]

    @property
    def tiles(self) -> bool:
        return bool(self._rows[0]["row_step"] > 1)

    def kernels(self) -> list[str]:
        return [str(row["name"]) for row in self._rows]

    def says(self) -> str:
        also = f"; calculated: {_TILE_CYCLES} cycles a product of tiles" if self.tiles else ""
        return f"peak of {self._isa} from cache, read rate of as many bytes{also}."

    def measure(self, m: int, k: int, n: int, itemsize: int) -> Ceiling:
        """Of x [m, k], of elements of so many bytes, times a weight [n, k]."""
        row, threads = self._rows[0], _products.num_threads()
        layout = str(row["layout"]) if self._coding is None else self._coding.layout(str(row["layout"]))
        nbytes = _weights.packed_nbytes(layout, n, k) + itemsize * m * k
        flops = max(_products.peak(_plans.Plan(name, count)) for name in self.kernels() for count in {1, threads})
        memory = torch.ones(-(-nbytes // 64) * 64, dtype=torch.uint8, device="cpu")
        passes = max(2, _LEAST_BYTES // memory.numel())
        rate = max(_products.read_rate(memory, threads, passes, ahead) for ahead in _AHEAD)
        cycles = _tile_cycles(row, m, k, n) / threads if self.tiles else None
        return Ceiling(nbytes, 2 * m * n * k, flops, rate, cycles, _products.clock_rate())


def _tile_cycles(row: Row, m: int, k: int, n: int) -> float:
    """Of one core: each product of whole tiles that the arithmetic needs."""
    depth = _TILE_BYTES if row["accumulate"] == "int32" else _TILE_BYTES // 2
    return float(-(-m // _TILE_ROWS) * -(-n // _TILE_ROWS) * -(-k // depth) * _TILE_CYCLES)
