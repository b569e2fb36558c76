"""When this process measures: one thread at a time, some seconds in all, and again later where the machine was busy.

Nobody waits for another's measurement: who does not get the turn runs a plan by rule meanwhile, and asks again.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

_log = logging.getLogger("fastlinear")

SECONDS = 5.0  # that first calls of a process may measure in all; `thorough` lifts it
AGAIN = (0.5, 2.0, 8.0)  # seconds from one attempt to the next where the machine was too busy to tell
MEANWHILE = 0.05  # seconds until a call asks again whether another thread has measured: about what that takes

# Why there is no turn.
SPENT = "spent"  # the seconds are
BUSY = "busy"  # the machine was, and the next attempt is not due, or was the last
ELSEWHERE = "elsewhere"  # another thread is measuring


class Measuring:
    """Hands out turns to measure, by the key of what is measured. Times are those of `clock`, monotonic seconds."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._lock = threading.Lock()
        self._mode = threading.local()
        self.reset()

    def reset(self) -> None:
        """As in a new process."""
        self.spent = 0.0
        self._failures: dict[str, tuple[int, float]] = {}  # key -> attempts in vain, when the next one is due
        self._told = False

    def at_fork(self) -> None:
        """In the child: another thread of the parent may have held the lock."""
        self._lock = threading.Lock()

    @contextmanager
    def thorough(self) -> Iterator[None]:
        """This thread measures whatever it asks for: it waits for its turns, and none counts as spent or too early."""
        before, self._mode.thorough = self._thorough, True
        try:
            yield
        finally:
            self._mode.thorough = before

    @property
    def _thorough(self) -> bool:
        return getattr(self._mode, "thorough", False)

    @contextmanager
    def turn(self, key: str) -> Iterator[str]:
        """Yields "" to the one who may measure `key` now, and holds the turn for it; to others why not."""
        reason = self._refusal(key)
        if not reason and not self._lock.acquire(blocking=self._thorough):
            reason = ELSEWHERE
        if reason:
            yield reason
            return
        began = self._clock()
        try:
            yield ""
        finally:
            if not self._thorough:
                self.spent += self._clock() - began
            self._lock.release()

    def _refusal(self, key: str) -> str:
        if self._thorough:
            return ""
        if key in self._failures and not 0 < self._failures[key][1] <= self._clock():
            return BUSY
        if self.spent < SECONDS:
            return ""
        if not self._told:
            self._told = True
            _log.info(
                "measuring has taken its %.0f s in this process: new shapes and batch sizes run by rule, or as "
                "neighboring batch sizes do; fastlinear.tune measures without this limit",
                SECONDS,
            )
        return SPENT

    def failed(self, key: str) -> None:
        """Notes that the machine was too busy to measure `key`: not again before the next of AGAIN is over, and not
        more often than there are."""
        attempts = self._failures.get(key, (0, 0.0))[0]
        due = self._clock() + AGAIN[attempts] if attempts < len(AGAIN) else 0.0
        self._failures[key] = attempts + 1, due

    def succeeded(self, key: str) -> None:
        self._failures.pop(key, None)

    def due(self, key: str, reason: str) -> float:
        """When to ask again for what was not measured for that reason; 0 for never."""
        if reason == ELSEWHERE:
            return self._clock() + MEANWHILE
        return self._failures.get(key, (0, 0.0))[1] if reason == BUSY else 0.0


process = Measuring()
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=process.at_fork)
