"""What the caches of this machine hold, as rules ask for it."""

from __future__ import annotations

import functools

import fastlinear._kernels as _kernels


@functools.cache
def l2() -> int:
    """Bytes of a core's second-level cache; 1 MB where the system does not say."""
    return int(_kernels.cpu_info()["l2"]) or 1 << 20
