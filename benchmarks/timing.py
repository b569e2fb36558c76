"""Candidates in turn, in an order that is shuffled for every round, so that drift, noise and what the one before leaves
behind hit all alike; and the lower quartile of each."""

from __future__ import annotations

import itertools
import math
import random
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

Call = Callable[[Any], object]

SAMPLE = 1e-3  # seconds that the calls of a sample last at least
SLOW = 0.25  # a call that takes longer is sampled as it is: next to that, what the others evicted is read in no time
REST = 2e-3  # seconds that a process at rest spends next to no time on a CPU
COLD_SAMPLE = 10e-3  # a cold sample is one pass over the copies, or as many of them as fit in here
WAKE = 2e-3  # seconds of untimed calls that bring back the threads and the code of a process that rested
WHOLE = 10e-3  # the same before a sample of a whole model, whose weights others evicted as a whole


class Timing(NamedTuple):
    """Seconds a call."""

    quartile: float
    median: float
    rounds: int


class Sampled(Protocol):
    cost: float  # seconds that one sample takes

    def sample(self) -> float:
        """Seconds a call."""


class Rotation:
    """One candidate: a single call to repeat (hot), or one for each copy of the weights, used in turn (cold)."""

    def __init__(self, calls: Sequence[Call], x: object, wake: float = WAKE) -> None:
        self._next, self._x, self._hot = itertools.cycle(calls), x, len(calls) == 1
        once = self._seconds(1)
        if once < SLOW:
            once = self._seconds(2)
        wanted = SAMPLE if self._hot else min(COLD_SAMPLE, once * len(calls))
        self._count = math.ceil(max(wanted, SAMPLE) / once)
        # Before a hot sample, as many untimed calls bring back what the other candidates evicted: the last-level cache
        # takes in a weight of its own size only after several passes. Before a cold one, whose weights may not be
        # there, the pool and all else are brought back: where others ran in their own processes, all was asleep.
        self._warm_up = 0 if once >= SLOW else max(self._count * self._hot, math.ceil(wake / once))
        self.cost = once * (self._count + self._warm_up)  # seconds that one sample takes

    def _seconds(self, count: int) -> float:
        x, calls = self._x, itertools.islice(self._next, count)
        start = time.perf_counter()
        for call in calls:
            call(x)
        return (time.perf_counter() - start) / count

    def sample(self) -> float:
        """Seconds a call."""
        if self._warm_up:
            self._seconds(self._warm_up)
        return self._seconds(self._count)


def settle() -> None:
    """Returns once this process is at rest: pools of threads spin for some ms after a call, on the CPUs of others.
    RuntimeError where they never stop."""
    for _ in range(1000):
        spent = time.process_time()
        time.sleep(REST)
        if time.process_time() - spent < REST / 4:
            return
    raise RuntimeError("the threads of this process do not come to rest")


class Turns:
    """What a process that serves (apart.py) takes its turns with."""

    _rotation: Rotation

    def rotate_over(self, calls: Sequence[Call], wake: float = WAKE) -> float:
        """Prepares samples; seconds that one takes."""
        self._rotation = Rotation(calls, None, wake)
        settle()
        return self._rotation.cost

    def sample(self) -> float:
        """Seconds a call; the answer comes when the pool has gone to sleep."""
        seconds = self._rotation.sample()
        settle()
        return seconds


def race(
    candidates: Mapping[str, Sampled], each_round: Callable[[], None], seconds: float, least: int, most: int
) -> dict[str, Timing]:
    """Samples every candidate once a round, for about so many seconds, but `least` to `most` rounds.

    `each_round` is called before every round. The time of its very first call, which may allocate, says nothing.
    """
    names = list(candidates)
    each_round()
    start = time.perf_counter()
    each_round()
    cost = time.perf_counter() - start + sum(rotation.cost for rotation in candidates.values())
    rounds = min(most, max(least, int(seconds / cost)))
    samples: dict[str, list[float]] = {name: [] for name in names}
    shuffled = random.Random(0)
    for _ in range(rounds):
        each_round()
        for name in shuffled.sample(names, len(names)):
            samples[name].append(candidates[name].sample())
    return {
        name: Timing(sorted(times)[len(times) // 4], statistics.median(times), rounds)
        for name, times in samples.items()
    }
