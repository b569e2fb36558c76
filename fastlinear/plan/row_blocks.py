"""How many rows at a time go through two products of which one reads the other.

By rule, for what it saves is mostly less than the tuner can tell in the time that a shape may cost: see "Where what
lies between two products goes" in docs/performance-model.md.
"""

from __future__ import annotations

import math

from fastlinear.plan import caches

_BETWEEN = 0.75  # of the caches, for a block of what lies between the products
_LEAST = 64  # rows for each thread, which the kernels' tiles still fill
_MULTIPLE = 16
# Times the caches, for both weights, which are read for each block.
_WEIGHTS, _WEIGHTS_BESIDE_FRESH = 3, 16
_FRESH = 32 << 20  # bytes that glibc asks the system for in each call, page by page (M_MMAP_THRESHOLD, mallopt(3))


def fit(weight_bytes: int, threads: int, between: int = _FRESH) -> bool:
    """Whether products by two weights of so many bytes may gain by it, with so many between them."""
    return weight_bytes <= (_WEIGHTS if between < _FRESH else _WEIGHTS_BESIDE_FRESH) * threads * caches.l2()


def rows(m: int, row_bytes: int, weight_bytes: int, threads: int) -> int:
    """Rows of a block of m rows, at most m. row_bytes: of a row between the products."""
    held, between = threads * caches.l2(), m * row_bytes
    most = int(_BETWEEN * held / row_bytes) // _MULTIPLE * _MULTIPLE
    if between <= held or most < _LEAST * threads or not fit(weight_bytes, threads, between):
        return m
    even = math.ceil(m / math.ceil(m / most))
    return min(m, math.ceil(even / _MULTIPLE) * _MULTIPLE)
