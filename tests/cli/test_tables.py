"""Tables of the command line: rich's on a terminal that has it, plain columns everywhere else."""

import importlib.util
import sys
from typing import Any

import pytest

from fastlinear.cli import tables

HEAD, ROWS = ("runs on", "for"), [("fp32/avx2/6x16", "a"), ("torch/linear", "b")]


def test_plain_in_a_pipe(capsys: pytest.CaptureFixture[str]) -> None:
    """Columns as wide as their contents, in ASCII, with nothing behind the last one."""
    tables.show(HEAD, ROWS)
    assert capsys.readouterr().out.splitlines() == [
        "runs on         for",
        "--------------  ---",
        "fp32/avx2/6x16  a",
        "torch/linear    b",
    ]


@pytest.mark.parametrize("installed", [True, False])
def test_rich_on_a_terminal(
    installed: bool, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """rich draws the same cells; without it the plain table comes, and nothing is raised."""
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    if not installed:
        find = importlib.util.find_spec
        monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name == "rich" else find(name, *a))
    tables.show(HEAD, ROWS)
    text = capsys.readouterr().out
    cells: list[Any] = [cell for row in (HEAD, *ROWS) for cell in row]
    assert all(cell in text for cell in cells) and text.isascii() != installed


def test_rows_that_come_one_by_one(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Plain columns of a given width, without progress in a pipe; on a terminal rich draws the same cells."""
    for terminal in (False, True):
        monkeypatch.setattr(sys.stdout, "isatty", lambda now=terminal: now, raising=False)
        with tables.growing(HEAD, [20, 1], "<>") as table:
            table.progress("working")
            for row in ROWS:
                table.add(row)
            table.progress("")
        text = capsys.readouterr().out
        assert all(cell in text for row in (HEAD, *ROWS) for cell in row)
        assert terminal or text.splitlines()[2] == "fp32/avx2/6x16          a"
