"""The grid of the benchmark and the speeds it is to reach."""

from __future__ import annotations

import math
from typing import NamedTuple

MS = (1, 2, 4, 8, 16, 32, 64, 128, 512)
SHAPES = ((384, 384), (384, 1536), (768, 768), (768, 3072), (3072, 768), (1024, 1024), (1024, 4096), (4096, 4096))
QUICK_MS = (1, 16, 64)
QUICK_SHAPES = ((384, 384), (768, 768))
SMALL = (64, 16, 32)  # M, K, N of a layer so small that the call around the kernel decides


class Band(NamedTuple):
    """A range of M and the share of the roofline that is wanted there, by ISA; an ISA not named has no target."""

    name: str
    least: int
    most: float
    targets: dict[str, float]


BANDS = (
    Band("M = 1", 1, 1, {"avx512": 0.90}),
    Band("M = 2..16", 2, 16, {"avx512": 0.85}),
    Band("M >= 32", 32, math.inf, {"avx512": 0.90, "avx2": 0.88}),
)
NEVER_UNDER = 0.98  # of the best peer, on any shape
MEAN_OVER_LINEAR, MEAN_OVER_BEST = 1.4, 1.08  # geometric means


def parse_shapes(text: str) -> tuple[tuple[int, int], ...]:
    """ "384x1536,768x768" -> ((K, N), ...); ValueError where it is none."""
    shapes = tuple(tuple(int(part) for part in item.split("x")) for item in text.split(","))
    if any(len(shape) != 2 or min(shape) < 1 for shape in shapes):
        raise ValueError(f"shapes are KxN,KxN,..., all at least 1, not {text!r}")
    return shapes  # type: ignore[return-value]


def parse_numbers(text: str) -> tuple[int, ...]:
    """ "1,2,4" -> (1, 2, 4); ValueError where it is none."""
    numbers = tuple(int(part) for part in text.split(","))
    if min(numbers) < 1:
        raise ValueError(f"numbers must be at least 1, not {text!r}")
    return numbers
