"""Choose the fastest of several ways to do the same thing, on a noisy machine, within a time budget.

Pure policy: the candidates and the clock are passed in; nothing here knows what is measured. The protocol:

1. Warm-up. Every candidate runs once. These times calibrate and are discarded, unless calls are so long that the
   budget allows hardly any others: then the slowest leave here, and no hot samples follow.
2. Race. In each round every live candidate is sampled once, in shuffled order, so that drift hits all alike; candidates
   are compared within rounds only. A sample is one cold call (the weights evicted from the caches) and a few hot ones,
   a score their geometric mean: weights rarely stay in the caches of a real model, and tuning on hot data alone is how
   Inductor comes to pick losers. Losers leave once that is certain, and the others have their time.
3. Duel. The winner of a race is partly a lucky one, so the best challenger meets the baseline afresh, in ABBA pairs,
   and is adopted only if it is faster with confidence.

On a busy machine a sample may tell who had the CPUs instead of who is faster: a pool of threads waits for the one that
is not running. `waited` says how long they stood in line, and a sample in which they did is taken anew; where it stays
so, its round or pair counts for nobody. Where too few are left, nothing was learned: the choice is `busy`.

A hypervisor steals and does not say so. What it takes only lengthens calls, those of one candidate now and of another
then, so measurements that contradict each other tell of it: the race and the duel, or usual calls and the best ones,
the chosen one's and those of all others. Then the choice is `busy`, too.

After a pause the threads of a pool may wake up on one CPU and share it for some 10 ms, and then a call of 17 us on two
threads takes milliseconds; no sample shows this, since samples have the pool awake. So where one thread needs less than
WAKE, plans on several are not considered.

The race is that of gemma.cpp's MMAutoTune, but ranks by an interquartile mean, not by the minimum: threads that are not
pinned see "lucky shots" of 1.2x to 1.6x (highway's auto_tune.h).

The promise, held by tests/plan/test_autotune.py on simulated machines: at most 1 of 100 choices is truly more than 2 %
slower than the best candidate, if the budget lasts for PASSES passes of (evict, cold call, hot call) over all
candidates. With fewer the choice is a best guess: pass fewer candidates where calls are long.
"""

from __future__ import annotations

import itertools
import logging
import math
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

from fastlinear.plan.estimates import Score, estimate, middle, minus, share

_log = logging.getLogger("fastlinear")

PASSES = 8  # what the promise asks of the caller's list of candidates
BUDGET = 0.045  # seconds, of the 60 ms a new shape may cost with packing
RACE_SHARE = 0.5  # of the budget; the duel has what the race leaves
SAMPLE = 50e-6  # seconds of hot calls in a sample: about 500 times the resolution and the cost of perf_counter
PAIRS = 20  # a duel does not end early before so many
FEW_PAIRS = 3  # fewer than these cannot expose a spike: all must show a CLEAR_LOSS of the baseline
TOLERANCE = math.log(1.02)  # a choice this much slower than the best is no mistake
CLEAR_LOSS = math.log(1.25)  # slower than that in two rounds, and in all: out
ROUNDS_TO_JUDGE = 4  # smaller losses are judged after so many, when one spike or lucky shot no longer decides
CERTAIN = 2.5  # standard errors: a race makes many comparisons, many times over
CONFIDENT = 1.645  # standard errors of a one-sided 95 % bound
STOLEN_SHARE, STOLEN = 0.05, 20e-6  # a sample is stolen if threads waited for this share of it and these seconds
TRIES = 3  # at a sample that is stolen
PATIENCE = 2  # budgets that stolen samples may take beside the one
MOST_STOLEN = 0.5  # of the samples; if it is more, the rest is not believed either
SPREAD = math.log(1.25)  # by how much a speed-up may exceed that of the best calls
SLOW = math.log(2)  # behind the fastest in the warm-up; called once more, since one call may have been stolen
# What contradicts a choice:
PHASES = math.log(1.1)  # by which the race saw the other ahead, beyond its spread
UNSTEADY = math.log(1.6)  # by which calls differ from the best ones; a lucky shot makes that 1.5
BEATEN = math.log(1.2)  # by another's best calls
WAKE = (
    20e-6  # seconds; several threads save less than this, and lose some 100 us to 10 ms at the first calls of a burst
)


class Candidate(NamedTuple):
    name: str
    run: Callable[[], object]  # one call
    threads: int = 0  # that it runs on; 0 where only it knows


class Verdict(NamedTuple):
    name: str
    table: tuple[tuple[str, float], ...]  # every candidate that ran and its milliseconds, best first
    speedup: float  # baseline / chosen as the duel saw it; 1.0 where the baseline stays
    decided: bool  # False: too noisy to tell, so the baseline stays; worth another try later
    rounds: int
    pairs: int
    seconds: float
    busy: bool = False  # True: others had the CPUs, or so it seems, and nothing here is believed; the baseline stays
    spread: float = 0.0  # the speed-up is believed to be within this share of itself, 95 %; 0 where the baseline stays


@dataclass(eq=False)
class _Runner:
    name: str
    run: Callable[[], object]
    threads: int = 0
    call: float = math.inf  # seconds of its fastest call yet
    cost: float = 0.0  # seconds that its next sample will take
    scores: list[Score] = field(default_factory=list)  # one a round
    best: list[float] = field(default_factory=list)  # the score of its best calls; copies share it
    failed: bool = False


class Duel(NamedTuple):
    gains: list[Score]  # log ratios baseline / challenger, one a pair
    disturbed: bool = False  # the best calls tell otherwise


def _lead(a: _Runner, b: _Runner) -> float:
    """Log ratio b / a of the best calls of both, cold and hot where both were sampled."""
    if a.best and b.best:
        return (math.fsum(b.best) - math.fsum(a.best)) / len(a.best)
    return math.log(b.call / a.call)


def _behind(runner: _Runner, leader: _Runner) -> list[Score]:
    """Log ratios runner / leader in the rounds that both ran."""
    return [minus(a, b) for a, b in zip(runner.scores, leader.scores, strict=False)]


def _ranked(live: Sequence[_Runner]) -> list[_Runner]:
    """Best first. Each round's median is subtracted first: one sweep of Tukey's median polish, against drift."""
    rounds = zip(*(r.scores for r in live), strict=True)
    levels = [tuple(sorted(column)[len(live) // 2] for column in zip(*row, strict=True)) for row in rounds]
    return sorted(live, key=lambda r: estimate([minus(s, v) for s, v in zip(r.scores, levels, strict=True)]))


def _clear(losses: Sequence[Score]) -> bool:
    return all(sum(s) / len(s) > CLEAR_LOSS for s in losses)


def _has_lost(losses: Sequence[Score]) -> bool:
    center, error = estimate(losses)
    certain = len(losses) >= ROUNDS_TO_JUDGE and center > CERTAIN * error
    return certain or (len(losses) >= 2 and _clear(losses))


@dataclass
class _Bench:
    """What measures. A candidate that raises is out, the baseline excepted: its errors are the caller's."""

    clock: Callable[[], float]
    evict: Callable[[], object] | None
    baseline: str
    deadline: float
    waited: Callable[[], float]
    floor: float  # seconds; less is a fault of the clock
    patience: float  # seconds by which the deadline may yet move, as stolen time is given back
    hot: bool = True
    lost: float = 0.0  # seconds of stolen calls in the warm-up
    samples: int = 0
    stolen: int = 0
    spoilt: bool = False  # the present round or pair is, by a sample that was stolen in all tries

    def _seconds(self, run: Callable[[], object], repeat: int) -> float:
        began = self.clock()
        for _ in range(repeat):
            run()
        return max(self.clock() - began, 1e-9) / repeat  # a coarse clock may see no time pass

    def _survives(self, measure: Callable[[_Runner], None], runner: _Runner) -> bool:
        try:
            measure(runner)
        except Exception as error:  # whatever it is, a candidate that fails is one not to choose
            if runner.name == self.baseline:
                raise
            runner.failed = True
            _log.warning("autotune: %s failed and is left out: %s: %s", runner.name, type(error).__name__, error)
            return False
        return True

    def _calibrate(self, runner: _Runner) -> None:
        for _ in range(TRIES):  # while the CPU is stolen, or the call so short that its first run may hide that
            before = self.waited()
            seconds = self._seconds(runner.run, 1)
            stolen = self._is_stolen(seconds, before)
            self.lost += seconds * stolen
            runner.call = min(runner.call, max(seconds, self.floor))
            if (runner.call >= 2 * WAKE and not stolen) or self.clock() > self.deadline:
                break

    def _is_stolen(self, seconds: float, before: float) -> bool:
        return self.waited() - before > max(STOLEN, STOLEN_SHARE * seconds)

    def _give_back(self, seconds: float) -> None:
        given_back = min(seconds, self.patience)
        self.patience -= given_back
        self.deadline += given_back

    def _sample(self, runner: _Runner) -> None:
        """Appends a score: one that was not stolen, if TRIES or the time left are enough for that."""
        for _ in range(TRIES):
            began, before = self.clock(), self.waited()
            score = self._score(runner)
            cost = self.clock() - began
            self.samples += 1
            possible = min(score) >= math.log(max(self.floor, 1e-9))
            if possible:
                runner.best[:] = map(min, runner.best or score, (*score[:-1], min(score[-1], math.log(runner.call))))
            if possible and not self._is_stolen(cost, before):
                runner.cost = cost
                break
            self.stolen += 1
            self._give_back(cost)
            if self.clock() + runner.cost > self.deadline:
                self.spoilt = True
                break
        else:
            self.spoilt = True
        runner.scores.append(score)

    def _together(self, runners: Sequence[_Runner]) -> tuple[list[_Runner], bool]:
        """Samples each once: those that survive, and whether all samples count. If not, none is kept."""
        self.spoilt = False
        live = [r for r in runners if self._survives(self._sample, r)]
        if self.spoilt:
            for r in live:
                r.scores.pop()
        return live, not self.spoilt

    def _score(self, runner: _Runner) -> Score:
        score: Score = ()
        if self.evict is not None:
            self.evict()
            score += (math.log(self._seconds(runner.run, 1)),)
        if self.hot:  # after the cold call the data is there
            seconds = self._seconds(runner.run, math.ceil(SAMPLE / runner.call))
            runner.call = min(runner.call, max(seconds, self.floor))
            score += (math.log(seconds),)
        return score

    def warm_up(self, runners: Sequence[_Runner]) -> list[_Runner]:
        """Those that run, fastest first; not all, where more than the `patience` is `lost`.

        Where not even half the PASSES fit, more rounds beat hot samples.
        """
        live = [r for r in runners if self.lost <= self.patience and self._survives(self._calibrate, r)]
        fastest = min((r.call for r in live), default=0.0)
        for r in live:
            if r.call > fastest * math.exp(SLOW) and r.call <= self.patience:
                self._give_back(r.call)
                self._survives(self._calibrate, r)
        live = sorted((r for r in live if not r.failed), key=lambda r: r.call)
        self.hot = self.evict is None or PASSES / 2 * sum(2 * r.call for r in live) <= self.deadline - self.clock()
        for r in live:
            r.cost = r.call * (self.hot + (self.evict is not None))
        serial = min((r.call for r in live if r.threads == 1), default=math.inf)
        return live if serial >= WAKE else [r for r in live if r.threads < 2 or r.name == self.baseline]

    def _affordable(self, live: Sequence[_Runner], reserve: float) -> list[_Runner]:
        """As many of the best as one more round has time for."""
        time_left = self.deadline - self.clock() - reserve
        return [r for r, end in zip(live, itertools.accumulate(r.cost for r in live), strict=True) if end <= time_left]

    def race(self, live: list[_Runner], rng: random.Random, reserve: float) -> tuple[list[_Runner], int]:
        """Who was never beaten, best first, and the number of rounds; keeps `reserve` seconds for the duel."""
        rounds = 0
        while len(affordable := self._affordable(live, reserve)) > 1:
            live, counts = self._together(rng.sample(affordable, len(affordable)))
            if not counts:
                continue
            live = _ranked(live)
            live = live[:1] + [r for r in live[1:] if not _has_lost(_behind(r, live[0]))]
            rounds += 1
        return live, rounds

    def duel(self, challenger: _Runner, baseline: _Runner) -> Duel:
        """Fresh ABBA pairs, of which at least one is tried; none if the challenger failed."""
        challenger, baseline = replace(challenger, scores=[]), replace(baseline, scores=[])
        gains: list[Score] = []
        tried = 0
        while not tried or self.clock() + challenger.cost + baseline.cost <= self.deadline:
            order = (challenger, baseline) if tried % 2 else (baseline, challenger)
            tried += 1
            if len(self._together(order)[0]) < 2:
                return Duel([])
            gains = _behind(baseline, challenger)
            if len(gains) >= PAIRS:
                gain, error = estimate(gains)
                if abs(gain) > CERTAIN * error:
                    break
        return Duel(gains, _is_disturbed(gains, challenger, baseline))


def _is_disturbed(gains: Sequence[Score], challenger: _Runner, baseline: _Runner) -> bool:
    """Whether a duel says something else than the best calls of both; of few pairs, whether they took longer than those
    do."""
    if not gains:
        return False
    if len(gains) < FEW_PAIRS:
        both = (zip(zip(*r.scores, strict=True), r.best, strict=False) for r in (challenger, baseline))
        return any(middle(column)[0] - best > UNSTEADY for each in both for column, best in each)
    return abs(estimate(gains)[0] - _lead(challenger, baseline)) > UNSTEADY


def _refutes(raced: Sequence[Score], challenger_won: bool) -> bool:
    """Whether the race, by the log ratios baseline / challenger of its rounds, is certain of the contrary."""
    if not raced:
        return False
    gain, error = estimate(raced)
    return (-gain if challenger_won else gain) > CERTAIN * error + PHASES


def _table(runners: Sequence[_Runner], leader: _Runner) -> tuple[tuple[str, float], ...]:
    """Seconds by way of the leader, in the rounds that both ran, so that who left early is compared fairly."""

    def seconds(r: _Runner) -> float:
        return math.exp(estimate(leader.scores)[0] + estimate(_behind(r, leader))[0]) if r.scores else r.call

    return tuple(sorted(((r.name, seconds(r) * 1e3) for r in runners), key=lambda row: row[1]))


def choose(
    candidates: Sequence[Candidate],
    baseline: str,
    *,
    clock: Callable[[], float] = time.perf_counter,
    evict: Callable[[], object] | None = None,
    budget: float = BUDGET,
    rng: random.Random | None = None,
    waited: Callable[[], float] = lambda: 0.0,
    floor: float = 0.0,
) -> Verdict:
    """The candidate to use: the baseline, or one that is faster with confidence.

    `candidates` include the baseline. `evict`, common to all, takes the operands out of the caches; None where they
    exceed the caches anyway. No measurement begins that is likely to end after `budget` seconds of `clock`, stolen time
    aside, but every candidate runs at least once, unless stolen time makes even that too long, and the best challenger
    meets the baseline at least once more. The challenger is adopted if the 95 % bound of its gain is above zero; the
    baseline stays, decided, if a gain of 2 % is beyond the bound; otherwise noise hides the answer, and the baseline
    stays, undecided.

    The choice is `busy`, and the baseline's, where threads were kept waiting or what was measured contradicts itself.

    `waited` gives the seconds for which the threads have stood in line for a CPU so far; `floor` those that no call can
    do without, whatever runs it.

    A candidate that raises is left out with a warning in the log; what the baseline raises is passed on.
    """
    if baseline not in [c.name for c in candidates]:
        raise ValueError(f"baseline {baseline!r} is not among the candidates {[c.name for c in candidates]}")
    began = clock()
    bench = _Bench(clock, evict, baseline, began + budget, waited, floor, PATIENCE * budget)
    runners = bench.warm_up([_Runner(c.name, c.run, c.threads) for c in candidates])
    if bench.lost > bench.patience:
        return Verdict(
            baseline, _table(runners, runners[0]) if runners else (), 1.0, False, 0, 0, clock() - began, True
        )
    live, rounds = bench.race(runners, rng or random.Random(0), (1 - RACE_SHARE) * budget)
    base = next(r for r in runners if r.name == baseline)
    challenger = next((r for r in live if r is not base), None)
    if challenger is None or rounds < FEW_PAIRS:  # some may have lost by a stolen sample
        others = (r for r in runners if r is not base and not r.failed)
        challenger = max(others, key=lambda r: _lead(r, base), default=None)
    duel = bench.duel(challenger, base) if challenger else Duel([])
    gains = duel.gains
    chosen, speedup, spread, decided = base, 1.0, 0.0, challenger is None
    busy = bench.stolen > MOST_STOLEN * bench.samples or (bench.stolen > 0 and challenger is not None and not gains)
    if challenger and gains:
        gain, error = estimate(gains)
        decided = gain + CONFIDENT * error < TOLERANCE
        if gain > CONFIDENT * error if len(gains) >= FEW_PAIRS else _clear(gains):
            chosen, speedup, decided = challenger, math.exp(min(gain, _lead(challenger, base) + SPREAD)), True
            spread = share(error)
        raced = _behind(base, challenger)
        busy = busy or duel.disturbed or _refutes(raced, chosen is challenger)
    if busy or any(_lead(r, chosen) > BEATEN for r in runners if not r.failed):
        busy, chosen, speedup, spread, decided = True, base, 1.0, 0.0, False
    table = _table(runners, live[0] if live else base)
    return Verdict(chosen.name, table, speedup, decided, rounds, len(gains), clock() - began, busy, spread)


def compare(
    run: Candidate,
    baseline: Candidate,
    *,
    evict: Callable[[], object] | None = None,
    waited: Callable[[], float] = lambda: 0.0,
    floor: float = 0.0,
) -> tuple[float, float] | None:
    """(time of the baseline over that of `run`, the share of itself that this is believed to be within), from fresh
    ABBA pairs as in a duel, where nothing hangs on the answer; None where the machine was too busy, or one failed."""
    budget, clock = BUDGET / 4, time.perf_counter
    bench = _Bench(clock, evict, baseline.name, clock() + budget, waited, floor, PATIENCE * budget)
    runners = {r.name: r for r in bench.warm_up([_Runner(c.name, c.run, c.threads) for c in (run, baseline)])}
    if len(runners) < 2:
        return None
    duel = bench.duel(runners[run.name], runners[baseline.name])
    if not duel.gains or duel.disturbed:
        return None
    gain, error = estimate(duel.gains)
    return math.exp(gain), share(error)
