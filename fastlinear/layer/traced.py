"""Whether the calls of this thread are being written down into a graph, in which a fast layer is to stand as its op."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

_thread = threading.local()


def is_recorded() -> bool:
    """Whether a recording of `graph/recording.py` is made."""
    return getattr(_thread, "is_recorded", False)


@contextmanager
def recorded() -> Iterator[None]:
    """While it lasts, fast layers that this thread calls are their ops."""
    _thread.is_recorded = True
    try:
        yield
    finally:
        _thread.is_recorded = False
