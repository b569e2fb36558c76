"""What the machine itself needs for a product, measured in the same run: the roofline (plan/roofline.py), and for tiles
also what their published throughput says. Bytes to read are those of the packed weight and of x.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import fastlinear._products as _products
import fastlinear._weights as _weights
from fastlinear.cli.options import UsageError
from fastlinear.plan import roofline
from fastlinear.plan.table import Row, runnable
from fastlinear.spec.formats import INTEGER_ROWS, PRODUCTS
from fastlinear.spec.schemes import Scheme

# Operations a cycle of a core's tile unit: a product of 16 x 16 sums and 64 bytes of K takes 16 cycles (Intel 64 and
# IA-32 Architectures Optimization Reference Manual, chapter 20).
_TILE_ROWS, _TILE_BYTES, _TILE_CYCLES = 16, 64, 16

_PASSES = 3  # over cold memory, each way: a single one is too short to be believed


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


class Ceilings:
    """Those of weights packed in `form`, or as a scheme says, of one ISA or of the best that runs here.

    cold: whether the weights come from memory in each call.

    UsageError where that ISA has no kernel for such weights.
    """

    def __init__(self, form: str, isa: str | None, scheme: Scheme | None = None, cold: bool = False) -> None:
        self.isa, self._cold = isa, cold
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
        read = "memory" if self._cold else "as many bytes"
        return f"peak of {self._isa} from cache, read rate of {read}{also}."

    def measure(self, m: int, k: int, n: int, itemsize: int) -> Ceiling:
        """Of x [m, k], of elements of so many bytes, times a weight [n, k]."""
        row, threads = self._rows[0], _products.num_threads()
        layout = str(row["layout"]) if self._coding is None else self._coding.layout(str(row["layout"]))
        nbytes = _weights.packed_nbytes(layout, n, k) + itemsize * m * k
        flops = roofline.peak(self.kernels(), threads)
        memory = roofline.memory_of(max(nbytes, roofline.BEYOND * threads) if self._cold else nbytes)
        tries = _PASSES if self._cold else 1
        rate = roofline.read_rate(memory, threads, self._cold, roofline.AHEAD * tries)
        cycles = _tile_cycles(row, m, k, n) / threads if self.tiles else None
        return Ceiling(nbytes, 2 * m * n * k, flops, rate, cycles, _products.clock_rate())


def _tile_cycles(row: Row, m: int, k: int, n: int) -> float:
    """Of one core: each product of whole tiles that the arithmetic needs."""
    depth = _TILE_BYTES if row["accumulate"] == "int32" else _TILE_BYTES // 2
    return float(-(-m // _TILE_ROWS) * -(-n // _TILE_ROWS) * -(-k // depth) * _TILE_CYCLES)
