"""Every test starts from the same state: a private tuning cache, no overrides from outside, a seed, one thread."""

import os
import sys
import tempfile
from collections.abc import Iterator

import pytest
import torch

# Before fastlinear is imported by a test module. FASTLINEAR_MAX_ISA stays: it runs the suite as a smaller CPU would.
for name in [name for name in os.environ if name.startswith("FASTLINEAR_") and name != "FASTLINEAR_MAX_ISA"]:
    del os.environ[name]
_cache = tempfile.TemporaryDirectory(prefix="fastlinear-tests-")
os.environ["FASTLINEAR_CACHE_DIR"] = _cache.name


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
def same_start(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Seeds torch and runs the test on one thread of torch's pool; a test that wants more says so itself. Tuning has
    all its seconds, and, unless a test brings its own `waits`, holds the machine for idle: other tests keep it busy."""
    from fastlinear.plan import decide, measuring

    measuring.process.reset()
    monkeypatch.setattr(decide, "Waits", Idle)
    torch.manual_seed(0)
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(1)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """How every row of the kernel table was executed; none is left out in silence."""
    native = sys.modules.get("native")
    if native is None:
        return
    terminalreporter.section("kernels")
    width = max(len(kernel["id"]) for kernel in native.ALL)
    for kernel in native.ALL:
        count = native.products[kernel["id"]]
        ran = kernel["way"] if "skipped" in kernel["way"] else f"{kernel['way']}, {count} products"
        terminalreporter.line(f"{kernel['id']:<{width}}  {ran}")
