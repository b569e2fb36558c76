"""What keeps this process from all CPUs and all memory of the machine: its affinity, and the quotas of its cgroups.

Both versions of cgroups are read (Documentation/admin-guide/cgroup-v2.rst, scheduler/sched-bwc.rst): a group is held by
its own quota and by those of all groups above it, and a container sees its own group as the root.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

_MOUNTS, _OWN = "sys/fs/cgroup", "proc/self/cgroup"
_NONE = 1 << 60  # bytes; version 1 writes "no limit" as the largest number of whole pages


def affinity() -> int:
    """CPUs that this process may run on."""
    return len(os.sched_getaffinity(0))


def cpu_quota(root: Path = Path("/")) -> float | None:
    """CPUs' worth of time that the cgroups grant, 1.5 for one and a half; None where they set no limit."""
    pairs = []
    for folder in _groups("cpu", root):
        old = (*_numbers(folder / "cpu.cfs_quota_us"), *_numbers(folder / "cpu.cfs_period_us"))
        pairs += [_numbers(folder / "cpu.max"), old]
    # Version 1 writes "no limit" as -1, version 2 as "max".
    return min((pair[0] / pair[1] for pair in pairs if len(pair) == 2 and min(pair) > 0), default=None)


def memory_limit(root: Path = Path("/")) -> int | None:
    """Bytes that the cgroups grant; None where they set no limit."""
    files = ("memory.max", "memory.limit_in_bytes")
    limits = [limit for folder in _groups("memory", root) for file in files for limit in _numbers(folder / file)]
    return min((limit for limit in limits if 0 < limit < _NONE), default=None)


def _groups(controller: str, root: Path) -> Iterator[Path]:
    """The folders of this process's group and of those above it, for a controller."""
    for line in _read(root / _OWN).splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers and controller not in controllers.split(","):
            continue
        mount = root / _MOUNTS / controllers
        for group in (PurePosixPath(path), *PurePosixPath(path).parents):
            yield mount / group.relative_to("/")


def _numbers(file: Path) -> tuple[int, ...]:
    """The numbers in a file; none where it says "max" or does not exist."""
    words = _read(file).split()
    return tuple(map(int, words)) if words and all(word.lstrip("-").isdecimal() for word in words) else ()


def _read(file: Path) -> str:
    try:
        return file.read_text()
    except OSError:
        return ""
