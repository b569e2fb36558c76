"""What of the kernel table runs on this machine, and the layout in which it wants a weight packed."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from types import MappingProxyType
from typing import Any

import fastlinear._environment as environment
import fastlinear._kernels as _kernels
from fastlinear.plan import rivals

Row = Mapping[str, Any]


@functools.cache
def runnable() -> tuple[Row, ...]:
    return tuple(MappingProxyType(row) for row in _kernels.kernels() if row["runnable"])


def override() -> str | None:
    """FASTLINEAR_KERNEL, if it names a kernel that runs here or one of torch's ways; ValueError otherwise, with the
    nearest of those."""
    name = environment.kernel()
    if name is None:
        return None
    allowed = [*(str(row["name"]) for row in runnable()), *rivals.NAMES]
    if name not in allowed:
        raise ValueError(f"FASTLINEAR_KERNEL is {name!r}, {why_unknown(name, allowed)}")
    return name


def why_unknown(name: str, allowed: Sequence[str]) -> str:
    """Of a kernel that is not allowed: that it does not run here, or that there is none, and the nearest that are."""
    isa = next((str(row["isa"]) for row in _kernels.kernels() if row["name"] == name), None)
    refused = None if isa is None else _kernels.cpu_info()["refused"].get(isa)
    what = "which is no kernel" if isa is None else "which does not run here" + (f" ({refused})" if refused else "")
    near = ", ".join(get_close_matches(name, allowed, 4, 0.0))
    return f"{what}; near it are {near}, and `python -m fastlinear info` lists all"


def layout(packed: str) -> str:
    """The layout to pack weights of a format in: one that the kernel FASTLINEAR_KERNEL names can read, if there is one,
    else that of the best kernel of this format that runs here. Asked when a weight is packed; from then on the pack
    knows."""
    return _layout(packed, override())


def base(layout: str) -> str:
    """The layout of the panels alone, as the kernels' rows have it, of one that says how its groups are scaled, too."""
    return layout.partition(":")[0]


@functools.cache
def _layout(packed: str, name: str | None) -> str:
    read = [layout for row in runnable() if row["name"] == name for layout in row["reads"]]
    own = [row["layout"] for row in runnable() if row["format"] == packed]
    return str(next(layout for layout in (*read, *own) if layout.split("/")[0] == packed))
