"""Every test starts from the same state: a private tuning cache, no overrides from outside, a seed, one thread."""

import gc
import math
import os
import random
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from itertools import combinations
from typing import Any

import pytest
from refusal import refuse_tiles

# Before fastlinear is imported by a test module. FASTLINEAR_MAX_ISA stays: it runs the suite as a smaller CPU would.
for name in [name for name in os.environ if name.startswith("FASTLINEAR_") and name != "FASTLINEAR_MAX_ISA"]:
    del os.environ[name]
_cache = tempfile.TemporaryDirectory(prefix="fastlinear-tests-")
os.environ["FASTLINEAR_CACHE_DIR"] = _cache.name
os.environ["TORCHINDUCTOR_VEC_ISA_OK"] = "1"  # what CPUID allows is compiled, without a program that tries each: 8 s
os.environ["TORCHINDUCTOR_COMPILE_THREADS"] = "1"  # without processes for it, each of which imports torch
os.environ["TORCHINDUCTOR_CPP_CACHE_PRECOMPILE_HEADERS"] = "0"  # which takes as long as three compilations with them
if "PYTEST_XDIST_WORKER" not in os.environ:  # what is compiled for the tests, once for all workers
    _build = tempfile.TemporaryDirectory(prefix="fastlinear-build-")
    os.environ["TESTS_BUILD_FOLDER"] = _build.name


class Idle:
    """A `waits.Waits` of threads that never wait."""

    def __init__(self, *_: object) -> None:
        pass

    def __call__(self) -> float:
        return 0.0

    def __enter__(self) -> "Idle":
        return self

    def __exit__(self, *_: object) -> None:
        pass


@pytest.fixture(autouse=True)
def same_start(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Seeds torch and runs the test on one thread of torch's pool; a test that wants more says so itself. Tuning has
    all its seconds, and, unless a test brings its own `waits`, holds the machine for idle: other tests keep it busy."""
    import torch  # here, since the process that deals out the tests needs none of it

    from fastlinear.plan import decide, measuring, race, roofline

    measuring.process.reset()
    monkeypatch.setattr(decide, "Waits", Idle)
    if request.path.name != "test_roofline.py":  # reports need one, and measuring it takes some time
        monkeypatch.setattr(
            roofline, "_measured", lambda x, packed, threads: roofline.Roofline(packed, threads, 1e11, 5e10, 2e10, 1e10)
        )
    if request.path.parent.name != "plan":  # where the race's own tests are
        for contradiction in ("PHASES", "UNSTEADY", "BEATEN"):
            monkeypatch.setattr(race, contradiction, math.inf)
    torch.default_generator.manual_seed(0)  # torch.manual_seed writes down the stack for devices that are not there
    torch.set_num_threads(1)
    guards: Any = sys.modules.get("torch._dynamo.guards")
    if guards is not None:  # it times the guards of all that it compiles, for a log, with caches that it empties: 30 ms
        guards.profile_guard_manager = lambda *_: 0.0
    yield
    torch.set_num_threads(1)
    dynamo: Any = sys.modules.get("torch._dynamo")
    if dynamo is not None and dynamo.utils.counters:  # it counts what all tests compile against one limit
        dynamo.reset()
        dynamo.utils.counters.clear()


SHORT = "not exhaustive"  # the marks that `make test` asks for
AHEAD = {"test_mutants.py", "test_recipes.py", "test_tensor_parallel.py", "test_bench.py"}
FORKING = {"kernel", "emulator"}  # rooms whose tests fork: while the process is small, that is cheap
FEW = 8  # parameters of one test that `make test` runs in full


def sample(calls: list[Any], costly: bool) -> set[str]:
    """Ids of calls of one test in which each value of every `parametrize` appears, and, where it has three or more and
    is not costly, every two values of different ones together. The same ones in every run."""
    rows = [(call.id, call._idlist) for call in calls]
    random.Random(0).shuffle(rows)
    factors = [i for i, values in enumerate(zip(*(values for _, values in rows), strict=True)) if len({*values}) > 1]
    alone = len(factors) < 3 or costly
    together = [(i,) for i in factors or [0]] if alone else list(combinations(factors, 2))
    kept, met = set(), set()
    for wanted in range(len(together), 0, -1):  # first those that bring most, so that few are enough
        for id, values in rows:
            new = {(which, *(values[i] for i in which)) for which in together} - met
            if len(new) >= wanted:
                met |= new
                kept.add(id)
    return kept


def has(call: Any, mark: str) -> bool:
    return any(each.name == mark for each in call.marks)


@pytest.hookimpl(wrapper=True)  # around all that parametrizes
def pytest_generate_tests(metafunc: pytest.Metafunc) -> Iterator[None]:
    """What a sample of a test's parameters leaves out is exhaustive. Where that is not asked for, as in `make test`,
    it is not made: there are more of those than of the others. Nor is what is skipped, such as kernels that this CPU
    has not, which the summary names."""
    yield
    whole = metafunc.definition.get_closest_marker("exhaustive") is not None
    calls = [] if whole else [call for call in metafunc._calls if not has(call, "exhaustive")]
    costly = metafunc.definition.get_closest_marker("costly") is not None
    if len(calls) > FEW or (calls and costly):
        kept = sample(calls, costly)
        for call in calls:
            if call.id not in kept:
                call.marks.append(pytest.mark.exhaustive.mark)
    if metafunc.config.option.markexpr == SHORT:
        made = [call for call in metafunc._calls if not has(call, "exhaustive")] or metafunc._calls[:1]
        run = [call for call in made if not has(call, "skip")] or made[:1]  # an empty list would be no parameters
        metafunc._calls = run[:1] if whole else run


def parts_of(text: str) -> tuple[int, int]:
    """ "2/5" as (2, 5)."""
    part, of = map(int, text.split("/"))
    if not 1 <= part <= of:
        raise pytest.UsageError(f"--part is {text}, not the number of a part and of how many, such as 1/4")
    return part, of


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--part", type=parts_of, metavar="I/N", help="run every Nth test, from the Ith on")
    parser.addoption("--without-tiles", action="store_true", help="AMX is emulated also where the CPU has it")


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Iterator[None]:
    """What is imported and collected stays: Python does not look for garbage in it, and no forked child copies its
    pages because of that."""
    gc.disable()
    yield
    gc.freeze()
    gc.set_threshold(50_000, 20, 20)  # the graphs of compilers are looked through again and again, else
    gc.enable()


def pytest_configure(config: pytest.Config) -> None:
    if config.option.without_tiles:  # before anything asks for them, in each worker of pytest-xdist too
        refuse_tiles()


@pytest.hookimpl(wrapper=True)  # around the choice by markers
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> Iterator[None]:
    """Files that compile or start what all their tests need go first, and so to one worker of pytest-xdist, which deals
    out the tests in runs; then those that fork; what is left for the end is short. Parts take tests in turns."""
    yield
    items.sort(key=lambda item: (item.path.name not in AHEAD, item.path.parent.name not in FORKING))
    if config.option.part:
        part, of = config.option.part
        config.hook.pytest_deselected(items=[item for i, item in enumerate(items) if i % of != part - 1])
        items[:] = items[part - 1 :: of]


ran: Counter[str] = Counter()  # products on each row of the table of kernels, by id
ways: dict[str, str] = {}  # how each row of it is executed, or why it is skipped


def pytest_testnodedown(node: Any) -> None:
    """Adds what a worker of pytest-xdist ran."""
    output = getattr(node, "workeroutput", {})
    ran.update(output.get("products", {}))
    ways.update(output.get("ways", {}))


@pytest.hookimpl(tryfirst=True)  # before the summary is written
def pytest_sessionfinish(session: pytest.Session) -> None:
    """A row of the table of kernels that a run of all tests never executed, though it can be, fails the run."""
    native = sys.modules.get("native")
    if native is not None:
        ran.update(native.products)
        ways.update({kernel["id"]: kernel["way"] for kernel in native.ALL})
    if hasattr(session.config, "workeroutput"):
        session.config.workeroutput.update(products=dict(ran), ways=ways)
    elif unexecuted(session.config) and session.exitstatus == pytest.ExitCode.OK:
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def unexecuted(config: pytest.Config) -> list[str]:
    """Rows that should have been executed and were not, if all tests were asked for."""
    option = config.option
    every = config.args_source is pytest.Config.ArgsSource.TESTPATHS and option.markexpr == SHORT
    if not every or option.keyword or option.collectonly or option.part:
        return []
    return [row for row, way in ways.items() if "skipped" not in way and not ran[row]]


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """How every row of the kernel table was executed; none is left out in silence."""
    if not ran:
        return
    terminalreporter.section("kernels")
    width = max(map(len, ways))
    for row, way in ways.items():
        terminalreporter.line(f"{row:<{width}}  {way if 'skipped' in way else f'{way}, {ran[row]} products'}")
    for row in unexecuted(terminalreporter.config):
        terminalreporter.line(f"FAILED: {row} was never executed", red=True)
