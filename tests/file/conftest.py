"""What tests of files share."""

from collections.abc import Iterator

import pytest

from fastlinear.plan import decide
from fastlinear.plan.candidates import Chosen
from fastlinear.plan.problem import Problem


@pytest.fixture
def tuned(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """The keys of what is tuned from here on; the winner is always the best native kernel by rule."""
    keys: list[str] = []

    def tune(problem: Problem, operands: decide.Operands) -> Chosen:
        keys.append(problem.key())
        return decide.heuristic(problem)._replace(source="tuned", speedup=1.5)

    monkeypatch.setattr(decide, "_tuned", tune)
    decide.cache().clear()
    yield keys
    decide.cache().clear()
