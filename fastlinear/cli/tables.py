"""Tables on standard output: by rich on a terminal where that is installed, in plain columns otherwise."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol


class Growing(Protocol):
    """A table whose rows come one by one."""

    def add(self, row: Sequence[str]) -> None: ...

    def progress(self, text: str) -> None:
        """What is going on now, on a terminal only; "" takes it away."""


def are_drawn() -> bool:
    """Whether tables are rich's."""
    return sys.stdout.isatty() and importlib.util.find_spec("rich") is not None


def show(head: Sequence[str], rows: Sequence[Sequence[str]], sides: str = "") -> None:
    """sides: "<" or ">" for each column, to which its cells keep; all keep to the left where it is empty."""
    if are_drawn():
        from rich.console import Console

        table = _drawn(head, sides or "<" * len(head))
        for row in rows:
            table.add_row(*_texts(row))
        Console().print(table)
        return
    widths = [max((len(row[i]) for row in rows if len(row) > i), default=0) for i in range(len(head))]
    plain = _Plain(head, widths, sides or "<" * len(head))
    for row in rows:
        plain.add(row)


@contextmanager
def growing(head: Sequence[str], widths: Sequence[int], sides: str) -> Iterator[Growing]:
    """widths: what plain columns are made wide enough for, beside the head; sides: as of `show`."""
    if not are_drawn():
        yield _Plain(head, widths, sides)
        return
    from rich.live import Live

    table = _drawn(head, sides)
    with Live(table, auto_refresh=False, vertical_overflow="visible") as live:
        yield _Rich(table, live)


def _drawn(head: Sequence[str], sides: str) -> Any:
    from rich.table import Table

    table = Table()
    for name, side in zip(head, sides, strict=True):
        table.add_column(name, justify="left" if side == "<" else "right", overflow="fold")
    return table


def _texts(row: Sequence[str]) -> list[Any]:
    """Cells as they stand: [...] in a name is no markup."""
    from rich.text import Text

    return [Text(cell) for cell in row]


class _Plain:
    def __init__(self, head: Sequence[str], widths: Sequence[int], sides: str) -> None:
        self._columns = [(side, max(len(name), width)) for side, name, width in zip(sides, head, widths, strict=True)]
        for row in (head, ["-" * width for _, width in self._columns]):
            self.add(row)

    def add(self, row: Sequence[str]) -> None:
        cells = (f"{cell:{side}{width}}" for cell, (side, width) in zip(row, self._columns, strict=False))
        print("  ".join(cells).rstrip(), flush=True)

    def progress(self, text: str) -> None:
        if sys.stderr.isatty():
            print(f"\r\033[K{text}", end="", file=sys.stderr, flush=True)


class _Rich:
    def __init__(self, table: Any, live: Any) -> None:
        self._table, self._live = table, live

    def add(self, row: Sequence[str]) -> None:
        self._table.add_row(*_texts(row))
        self._live.refresh()

    def progress(self, text: str) -> None:
        self._table.caption = text
        self._live.refresh()
