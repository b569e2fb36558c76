"""What of the kernel table runs on this machine, and the layout in which it wants a weight packed."""

from __future__ import annotations

import functools
from collections.abc import Mapping
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
    """FASTLINEAR_KERNEL, if it names a kernel that runs here or one of torch's ways; ValueError otherwise."""
    name = environment.kernel()
    if name is None:
        return None
    allowed = [*(row["name"] for row in runnable()), *rivals.NAMES]
    if name not in allowed:
        raise ValueError(f"FASTLINEAR_KERNEL is {name!r}; on this CPU it may be one of {', '.join(allowed)}")
    return name


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
