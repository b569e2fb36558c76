"""What was tuned, kept between runs: one JSON file per machine, written atomically, read with distrust.

    {"machine": {"cpu": ..., "isas": [...], "fastlinear": ..., "torch": ...},
     "entries": {key: {"name": "fp32/avx512/6x64", "numbers": {"threads": 2}, "table": [["torch/linear", 0.21]],
                       "speedup": 1.3}}}

A value is a registry name and small integers, and each is checked when read: a wrong file can slow things down but
never break them. What is malformed, foreign or out of range is ignored, entry by entry, and the shape is tuned again.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import logging
import math
import os
import stat
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import fastlinear._environment as environment

_log = logging.getLogger("fastlinear")

MAX_BYTES = 1 << 20  # some 2000 shapes, read and written in 20 ms; a larger file is not ours
KEPT = 0.75  # of MAX_BYTES, where more is to be written: the newest entries
MAX_TEXT = 200  # characters of a key or a name
MAX_ROWS = 256  # of a table
PATIENCE = 1.0  # seconds that `flush` waits for another process's write, which takes some milliseconds


class Machine(NamedTuple):
    """Whom the measurements hold for; `isas` are those that may run, so FASTLINEAR_MAX_ISA has a file of its own."""

    cpu: str
    isas: tuple[str, ...]
    fastlinear: str
    torch: str


class Remembered(NamedTuple):
    name: str  # a kernel or "torch/..."
    numbers: Mapping[str, int]  # the rest of the plan: threads, k_slices, ...
    table: tuple[tuple[str, float], ...] = ()  # what was measured, milliseconds, for the report
    speedup: float | None = None  # over torch/linear on the parameter, where there was one
    spread: float = 0.0


def default_folder() -> Path | None:
    """$FASTLINEAR_CACHE_DIR, else fastlinear in $XDG_CACHE_HOME or ~/.cache; None where there is no home either."""
    if chosen := environment.cache_folder():
        return Path(chosen)
    shared = Path(os.environ.get("XDG_CACHE_HOME", ""))
    if shared.is_absolute():  # the XDG specification: a relative one is to be ignored
        return shared / "fastlinear"
    try:
        return Path.home() / ".cache" / "fastlinear"
    except RuntimeError:
        return None


def _read_own(path: Path) -> bytes:
    """The bytes of a regular file of this user that nobody else may write; OSError or ValueError otherwise."""
    # O_NONBLOCK: a FIFO must not hang us
    handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOFOLLOW | os.O_CLOEXEC)
    with open(handle, "rb") as file:
        status = os.fstat(handle)
        shared = status.st_mode & (stat.S_IWGRP | stat.S_IWOTH)
        if not stat.S_ISREG(status.st_mode) or status.st_uid != os.getuid() or shared:
            raise ValueError("not a file of this user alone")
        data = file.read(MAX_BYTES + 1)
    if len(data) > MAX_BYTES:
        raise ValueError(f"more than {MAX_BYTES} bytes")
    return data


def _is_text(value: object) -> bool:
    return isinstance(value, str) and 0 < len(value) <= MAX_TEXT and value.isprintable()


def _is_measure(value: object) -> bool:
    return isinstance(value, float) and math.isfinite(value) and value > 0


def _lock(handle: int, patience: float) -> bool:
    """Whether the lock came in so many seconds."""
    deadline = time.monotonic() + patience
    while True:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() > deadline:
                return False
            time.sleep(1e-3)
        else:
            return True


class TuningCache:
    """`get`, `put` and `clear` by key. Never raises for what the disk holds or refuses.

    `known(name)` says whether a registry name may run here; `limits` hold the allowed values of each number.
    The file is read once, at the first `get`; every `put` writes, unless another process is just doing so: then the
    next one does, or `flush`.
    """

    def __init__(
        self,
        machine: Machine,
        known: Callable[[str], bool],
        limits: Mapping[str, range],
        folder: Path | None = None,
    ) -> None:
        self.machine = {**machine._asdict(), "isas": list(machine.isas)}
        self._known, self._limits = known, limits
        self._own: dict[str, Remembered] = {}
        self._held: dict[str, Remembered] = {}
        self._found: dict[str, Remembered] | None = None
        folder = folder or default_folder()
        digest = hashlib.sha256(json.dumps(self.machine).encode()).hexdigest()[:16]
        self.path = folder / f"tuning-{digest}.json" if folder else None
        self._refused = self._unwritten = False
        self._changing = threading.Lock()
        self._handle: int | None = None  # of the file's lock, while this process has it

    def get(self, key: str) -> Remembered | None:
        if self._found is None:
            self._found = self._read()
        return self._own.get(key) or self._held.get(key) or self._found.get(key)

    def is_of_this_process(self, key: str) -> bool:
        """Whether `get` gives what was put or held here, and not what a file says."""
        return key in self._own or key in self._held

    def __len__(self) -> int:
        """Entries in the file as it is now, and those it refused."""
        return len(self._read() | self._own)

    def learn(self, entries: Mapping[str, object]) -> int:
        """Takes what another file says of this machine, in memory alone, and tells how much of it is believed; what is
        known already stays."""
        if self._found is None:
            self._found = self._read()
        believed = self._believed(entries)
        self._found = believed | self._found
        return len(believed)

    def forget(self, keys: Iterable[str]) -> None:
        """As if these had never been put, for this process; on disk until they are put anew."""
        if self._found is None:
            self._found = self._read()
        for key in keys:
            for held in (self._own, self._held, self._found):
                held.pop(key, None)

    def entries(self) -> dict[str, Remembered]:
        """All that is known, by key."""
        if self._found is None:
            self._found = self._read()
        return self._found | self._held | self._own

    def hold(self, key: str, value: Remembered) -> None:
        """Remembers it for this process alone: `get` gives it, no file will."""
        self._held[key] = value

    def put(self, key: str, value: Remembered) -> None:
        self._own[key] = value
        self._held.pop(key, None)
        self._unwritten = True
        self._write(0.0)

    def flush(self) -> None:
        """Writes what a `put` could not, and waits for others for that."""
        if self._unwritten:
            self._write(PATIENCE)

    def _write(self, patience: float) -> None:
        # Merged with what is there by now, so that processes that tune at the same time lose nothing.
        def merge(path: Path) -> None:
            older = {key: value for key, value in self._read().items() if key not in self._own}
            self._replace(path, {**older, **self._own})
            self._unwritten = False

        self._locked(merge, patience)

    def clear(self) -> None:
        """Forget everything, on disk too."""
        self._own, self._held, self._found = {}, {}, {}
        self._unwritten = False
        self._locked(lambda path: path.unlink(missing_ok=True), PATIENCE)

    def _locked(self, change: Callable[[Path], None], patience: float) -> None:
        """Change the file, alone among threads and processes; not if other processes have it all the time. After a
        first failure all stays in memory."""
        if self.path is None or self._refused:
            return
        with self._changing:
            self._change(self.path, change, patience)

    def _change(self, file: Path, change: Callable[[Path], None], patience: float) -> None:
        try:
            file.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC  # whatever lies there is not written to
            self._handle = os.open(file.with_suffix(".lock"), flags, 0o600)
            try:
                if _lock(self._handle, patience):
                    change(file)
            finally:
                self._unlock()
        except OSError as error:
            self._refused = True
            _log.warning(
                "the tuning cache cannot be written to %s (%s): what is tuned lasts for this process only; "
                "%s may name a folder that is writable",
                file.parent,
                error.strerror or error,
                "FASTLINEAR_CACHE_DIR",
            )

    def _unlock(self) -> None:
        if self._handle is not None:
            # A child that was forked meanwhile has the file open, too, and would keep the lock beyond our closing it.
            fcntl.flock(self._handle, fcntl.LOCK_UN)
            os.close(self._handle)
            self._handle = None

    def forked(self) -> None:
        """In a child: what it has of the locks is not its own."""
        self._changing = threading.Lock()
        if self._handle is not None:
            os.close(self._handle)
            self._handle = None

    def _replace(self, path: Path, entries: Mapping[str, Remembered]) -> None:
        kept = {key: value._asdict() for key, value in entries.items()}
        content = {"machine": self.machine, "entries": kept}
        text = json.dumps(content)
        if len(text) > MAX_BYTES:
            sizes = {key: len(json.dumps({key: value})) for key, value in kept.items()}
            excess = len(text) - KEPT * MAX_BYTES
            for key in list(kept):  # oldest first: they stand as they were put
                if excess <= 0:
                    break
                excess -= sizes[key]
                del kept[key]
            text = json.dumps(content)
        temporary = path.with_suffix(".tmp")  # one name will do under the lock, and leaves no litter after a crash
        temporary.unlink(missing_ok=True)
        with open(temporary, "x", opener=lambda name, flags: os.open(name, flags, 0o600)) as file:
            file.write(text)
        # No fsync, which takes 10 to 1000 ms: what a power failure leaves is read with distrust and tuned again.
        os.replace(temporary, path)

    def _read(self) -> dict[str, Remembered]:
        if self.path is None:
            return {}
        try:
            content = json.loads(_read_own(self.path))
        except (OSError, ValueError, RecursionError) as error:
            if not isinstance(error, FileNotFoundError):
                _log.info("tuning cache: %s is ignored: %s", self.path, error)
            return {}
        if not isinstance(content, dict) or content.get("machine") != self.machine:
            return {}
        entries = content.get("entries")
        if not isinstance(entries, dict):
            return {}
        return self._believed(entries)

    def _believed(self, entries: Mapping[Any, object]) -> dict[str, Remembered]:
        checked = {key: self._checked(raw) for key, raw in entries.items() if _is_text(key)}
        return {key: value for key, value in checked.items() if value is not None}

    def _checked(self, raw: object) -> Remembered | None:
        if not isinstance(raw, dict) or raw.keys() != set(Remembered._fields):
            return None
        name, numbers, table, speedup, spread = (raw[field] for field in Remembered._fields)
        sound = (
            _is_text(name)
            and self._known(name)
            and isinstance(numbers, dict)
            and all(type(n) is int and n in self._limits.get(which, ()) for which, n in numbers.items())
            and isinstance(table, list)
            and len(table) <= MAX_ROWS
            and all(isinstance(r, list) and len(r) == 2 and _is_text(r[0]) and _is_measure(r[1]) for r in table)
            and (speedup is None or _is_measure(speedup))
            and (spread == 0.0 or _is_measure(spread))
        )
        return Remembered(name, numbers, tuple((r[0], r[1]) for r in table), speedup, spread) if sound else None
