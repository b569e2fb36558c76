"""How long threads have waited for a CPU that others had: what tells a slow candidate from a stolen CPU.

Linux counts it for each thread, exactly and with no privilege: the second number of /proc/self/task/<tid>/schedstat,
nanoseconds on a run queue (Documentation/scheduler/sched-stats.rst). A hypervisor that stops a virtual CPU is not seen.
"""

from __future__ import annotations

import os
import resource
from collections.abc import Iterable

_MOST = 8  # threads that are looked at, since each look is a system call of 2 us: where CPUs are short, these tell
_SWITCH = 1e-3  # seconds that an involuntary switch counts for, where the kernel keeps no schedstat; a slice is longer


class Waits:
    """Called, it gives the seconds that the threads with these ids have waited so far, all together.

    A wait is counted when it is over. Where the system does not tell, involuntary switches of the whole process count.
    A context manager, as it holds files open.
    """

    def __init__(self, threads: Iterable[int]) -> None:
        self._files: list[int] = []
        try:
            for thread in [*threads][:_MOST]:
                self._files.append(os.open(f"/proc/self/task/{thread}/schedstat", os.O_RDONLY | os.O_CLOEXEC))
            told = all(int(os.pread(file, 64, 0).split()[0]) > 0 for file in self._files)
        except (OSError, ValueError, IndexError):
            told = False
        if not told:
            self.close()

    def __call__(self) -> float:
        if not self._files:
            return _SWITCH * resource.getrusage(resource.RUSAGE_SELF).ru_nivcsw
        return 1e-9 * sum(int(os.pread(file, 64, 0).split()[1]) for file in self._files)

    def close(self) -> None:
        while self._files:
            os.close(self._files.pop())

    def __enter__(self) -> Waits:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
