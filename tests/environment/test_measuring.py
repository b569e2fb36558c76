"""When measuring happens: bounded in a process, one thread at a time with nobody waiting, again if it was in vain."""

import logging
import mmap
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import fastlinear
import fastlinear._kernels as _kernels
import fastlinear._products as _products
import fastlinear._weights as _weights
from fastlinear import FastLinear
from fastlinear.plan import decide, measuring, race, table
from fastlinear.plan.candidates import Chosen
from fastlinear.plan.memory import Remembered
from fastlinear.plan.problem import Problem


class Clock:
    """Of a process: time passes where a measurement says so. It begins with the real one, which layers compare with."""

    def __init__(self) -> None:
        self.now = time.monotonic()

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Iterator[Clock]:
    clock = Clock()
    monkeypatch.setattr(measuring, "process", measuring.Measuring(clock))
    decide.cache().clear()
    yield clock
    decide.cache().clear()


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch, clock: Clock) -> list[Problem]:
    """The problems that were measured, each in 0.05 s of the clock; the plan is that of the rule."""
    problems: list[Problem] = []

    def tuned(problem: Problem, operands: decide.Operands) -> Chosen:
        problems.append(problem)
        clock.now += 0.05
        chosen = decide.heuristic(problem)._replace(source="tuned", speedup=1.5)
        numbers = {"threads": chosen.plan_threads, "k_slices": chosen.k_slices}
        decide.cache().put(problem.key(), Remembered(chosen.name, numbers, (), 1.5))
        return chosen

    monkeypatch.setattr(decide, "_tuned", tuned)
    return problems


def layer(k: int = 24, n: int = 40) -> Any:
    return FastLinear(k, n).eval().requires_grad_(False)


def sources(fast: Any) -> list[str]:
    return [chosen.source for chosen in fast.plans]


def test_many_batch_sizes_measure_for_some_seconds(measured: list[Problem], caplog: pytest.LogCaptureFixture) -> None:
    """300 batch sizes of 20 shapes measure until SECONDS are over; then the rule decides, or what was measured for a
    batch size nearby, the log has one line, every output is right, and tune() still measures."""
    layers = [layer(16 + i) for i in range(20)]
    with caplog.at_level(logging.INFO, "fastlinear"):
        for m in range(1, 301):
            for fast in layers:
                y = fast(x := torch.randn(m, fast.in_features))
                if m % 50 == 1:
                    torch.testing.assert_close(y, nn.functional.linear(x, fast.weight, fast.bias))
    assert 0 < len(measured) <= measuring.SECONDS / 0.05 + 1
    assert len([message for message in caplog.messages if "measuring has taken" in message]) == 1
    assert {source for fast in layers for source in sources(fast)} == {"tuned", "neighbor", "heuristic"}
    assert not any(chosen.provisional or chosen.speedup for chosen in layers[-1].plans if chosen.source != "tuned")
    before = len(measured)
    fastlinear.tune(nn.Sequential(layers[0]), torch.randn(300, 16), progress=False)
    assert len(measured) == before + 1 and measured[-1].m == 384


def test_nobody_waits_for_a_measurement(monkeypatch: pytest.MonkeyPatch, measured: list[Problem]) -> None:
    """While one thread measures, calls of others return: by rule, and provisional until they may measure themselves;
    a layer that measures nothing is not concerned."""
    monkeypatch.setattr(measuring, "MEANWHILE", 0.0)
    begun, may_end, tuned = threading.Event(), threading.Event(), decide._tuned

    def slowly(problem: Problem, operands: decide.Operands) -> Chosen:
        if problem.k == 31:
            begun.set()
            assert may_end.wait(60)
        return tuned(problem, operands)

    monkeypatch.setattr(decide, "_tuned", slowly)
    first, second, off = layer(31), layer(32), fastlinear.convert(nn.Linear(33, 8).eval(), tune="off")
    worker = threading.Thread(target=lambda: first(torch.randn(3, 31)))
    worker.start()
    assert begun.wait(60)
    try:
        second(torch.randn(3, 32))
        with torch.no_grad():
            off(torch.randn(3, 33))
        first(torch.randn(3, 31))
        for fast in (first, second):
            assert [(c.source, c.provisional) for c in fast.plans] == [("heuristic", measuring.ELSEWHERE)]
        assert [(c.source, c.provisional) for c in off.plans] == [("heuristic", "")]
        assert "another thread was measuring" in str(fastlinear.report(nn.Sequential(second)))
    finally:
        may_end.set()
        worker.join(60)
    second(torch.randn(3, 32))
    assert sources(first) == sources(second) == ["tuned"]
    assert [problem.k for problem in measured] == [31, 32]


@pytest.fixture
def verdicts(monkeypatch: pytest.MonkeyPatch) -> list[race.Verdict]:
    """What the next races end with, the last of them for ever."""
    given: list[race.Verdict] = []

    def choose(candidates: Any, baseline: str, **_: Any) -> race.Verdict:
        for candidate in candidates:
            candidate.run()
        verdict = given.pop(0) if len(given) > 1 else given[0]
        return verdict._replace(name=baseline)

    monkeypatch.setattr(race, "choose", choose)
    return given


BUSY = race.Verdict("", (("torch/linear", 1.0),), 1.0, False, 1, 1, 0.05, busy=True)
GOOD = BUSY._replace(decided=True, busy=False, speedup=1.25)


def make_due(fast: Any, clock: Clock) -> Callable[[float], None]:
    """Lets so many seconds pass, also for the plans of `fast`, which look at the real clock."""

    def wait(seconds: float) -> None:
        clock.now += seconds
        for chosen in fast.plans:
            plan = decide.native(chosen)
            plan.due = 1e-9 if chosen.provisional else 0.0
            fast._engine.plan_for(chosen.bucket, chosen.threads, torch.float32, plan)

    return wait


def test_a_busy_machine_is_asked_again(clock: Clock, verdicts: list[race.Verdict]) -> None:
    """A plan that could not be measured is the rule's, marked, and in no file; a later call measures, not before it is
    due, and then the mark is gone and the cache has it."""
    verdicts += [BUSY, GOOD]
    fast, x = layer(), torch.randn(3, 24)
    wait = make_due(fast, clock)
    fast(x)
    (first,) = fast.plans
    assert (first.source, first.provisional, first.speedup) == ("heuristic", measuring.BUSY, None)
    assert len(decide.cache()) == 0
    shown = str(fastlinear.report(nn.Sequential(fast)))
    assert f"{first.name}?" in shown and "others had the CPUs" in shown
    wait(measuring.AGAIN[0] / 2)
    fast(x)
    assert fast.plans[0].provisional and len(verdicts) == 1
    wait(measuring.AGAIN[0])
    fast(x)
    (second,) = fast.plans
    assert (second.source, second.provisional, second.speedup) == ("tuned", "", 1.25)
    assert len(decide.cache()) == 1


def test_attempts_are_bounded(monkeypatch: pytest.MonkeyPatch, clock: Clock, verdicts: list[race.Verdict]) -> None:
    """On a machine that is never idle a plan is measured 1 + len(AGAIN) times, and then stays the rule's, marked, until
    tune() asks."""
    attempts = 0
    verdicts += [BUSY]
    choose = race.choose

    def counted(*args: Any, **kwargs: Any) -> race.Verdict:
        nonlocal attempts
        attempts += 1
        return choose(*args, **kwargs)

    monkeypatch.setattr(race, "choose", counted)
    fast, x = layer(), torch.randn(3, 24)
    wait = make_due(fast, clock)
    for _ in range(20):
        fast(x)
        wait(100.0)
    assert attempts == 1 + len(measuring.AGAIN) and fast.plans[0].provisional == measuring.BUSY
    verdicts[:] = [GOOD]
    fastlinear.tune(nn.Sequential(fast), x, progress=False)
    assert sources(fast) == ["tuned"] and attempts == 2 + len(measuring.AGAIN)


def test_equal_layers_tune_once_though_undecided(clock: Clock, verdicts: list[race.Verdict]) -> None:
    """Twelve equal layers whose candidates noise hides are measured once in a process; no file has the guess."""
    verdicts += [GOOD._replace(decided=False), BUSY]
    layers = [layer() for _ in range(12)]
    for fast in layers:
        fast(torch.randn(3, 24))
    assert [sources(fast) for fast in layers] == [["tuned"]] + 11 * [["equal"]]
    assert len(verdicts) == 1 and len(decide.cache()) == 0


@pytest.mark.parametrize("numbers", [{"k_slices": 4096}, {"threads": 77}, {"threads": 2}, {"k_slices": 2}])
def test_only_todays_candidates_are_believed(measured: list[Problem], numbers: dict[str, int]) -> None:
    """What a cache or a file remembers runs if it is a candidate now, name and numbers; else the shape is measured."""
    fast, x = layer(), torch.randn(3, 24)
    fast(x)
    (problem,) = measured
    known = decide.cache().get(problem.key())
    assert known is not None
    decide.cache().put(problem.key(), known._replace(numbers={**known.numbers, **numbers}))
    other = layer()
    other(x)
    assert len(measured) == 2 and sources(other) == ["tuned"]
    assert other.plans[0]._replace(source="") == fast.plans[0]._replace(source="")


def test_a_late_override_does_not_raise(monkeypatch: pytest.MonkeyPatch) -> None:
    """FASTLINEAR_KERNEL, set after a layer was packed, runs where it reads that pack, and is passed over where not."""
    for row in table.runnable():
        monkeypatch.delenv("FASTLINEAR_KERNEL", raising=False)
        fast = layer()
        fast(torch.randn(3, 24))
        monkeypatch.setenv("FASTLINEAR_KERNEL", row["name"])
        x = torch.randn(4, 24)
        torch.testing.assert_close(fast(x), nn.functional.linear(x, fast.weight, fast.bias))
        (chosen,) = [chosen for chosen in fast.plans if chosen.bucket == 4]
        reads = fast._engine.packed.layout in row["reads"] and row["rows"] == "fp32"
        assert (chosen.name == row["name"] and chosen.source == "override") == reads, row["name"]


@pytest.mark.parametrize("threads", [1, 2, 16, 96])
@pytest.mark.parametrize(("m", "k"), [(1, 4096), (16, 4096), (512, 4096), (512, 256), (1, 256)])
def test_the_proxy_has_work_for_all_threads(threads: int, m: int, k: int) -> None:
    """What is measured instead of a large problem is no larger, and has a group of panels for every thread."""
    n = 64 * 128
    layout = table.layout("fp32")
    packed = _weights.Packed.over(mmap.mmap(-1, _weights.packed_nbytes(layout, n, k)), layout, n, k)
    problem = Problem(m, n, k, "fp32", "fp32", "none", "fp32", False, None, False, threads, layout=layout)
    small, operands = decide._proxy(problem, decide.Operands(None, None, packed))
    assert small.m <= m and small.n <= n and small.n == operands.packed.n and small.k == k
    assert small.n >= 64 * threads
    least = decide._PROXY_COLUMNS * max(2, threads)
    assert small.m * small.n * k <= max(decide._PROXY_WORK * threads + 48 * 32 * k, 48 * least * k)


@pytest.mark.parametrize("part", ["model", "family", "number", "stepping", "l1d", "l2", "l3"])
def test_machines_of_equal_brand_are_told_apart(part: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The key of a machine changes with each number that CPUID gives, with the CPUs, and with the build."""
    before, info = decide._machine(), _kernels.cpu_info()
    assert decide._machine() == before
    changed = info | {part: "other" if part == "model" else info[part] + (1 << 20)}
    monkeypatch.setattr(_kernels, "cpu_info", lambda: changed)
    assert decide._machine() != before
    monkeypatch.setattr(_kernels, "cpu_info", lambda: info)
    assert decide._machine() == before
    monkeypatch.setattr("os.cpu_count", lambda: 4097)
    assert decide._machine() != before


@pytest.mark.parametrize("module", [_kernels, _products])
def test_another_build_is_another_machine(module: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was measured with other kernels, or another driver, of the same version is not believed."""
    before, other = decide._machine(), tmp_path / "library.so"
    other.write_bytes(b"other kernels")
    monkeypatch.setattr(module, "__file__", str(other))
    assert decide._machine() != before
