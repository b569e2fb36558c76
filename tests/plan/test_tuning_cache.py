"""The tuning cache: what it keeps, what it refuses to believe, and that nothing on disk can break a process."""

from __future__ import annotations

import fcntl
import json
import logging
import multiprocessing
import os
import stat
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastlinear.plan import memory
from fastlinear.plan.memory import Machine, Remembered, TuningCache, default_folder

MACHINE = Machine("Some CPU", ("avx512", "avx2", "scalar"), "0.1.0", "2.13.0")
NAMES = {"fp32/avx512/6x64", "fp32/avx2/6x16", "torch/linear"}
LIMITS = {"threads": range(1, 1025), "k_slices": range(1, 65), "k_block": range(1 << 20)}
VALUE = Remembered(
    "fp32/avx512/6x64", {"threads": 2, "k_slices": 4}, (("fp32/avx512/6x64", 0.5), ("torch/linear", 0.75)), 1.5
)


def cache(folder: Path, machine: Machine = MACHINE) -> TuningCache:
    return TuningCache(machine, NAMES.__contains__, LIMITS, folder)


def written(folder: Path, **values: Remembered) -> Path:
    made = cache(folder)
    for key, value in (values or {"a": VALUE}).items():
        made.put(key, value)
    assert made.path is not None
    return made.path


def test_round_trip(tmp_path: Path) -> None:
    """What one process puts, the next gets, whole; a key never put is None; the file is the user's alone."""
    path = written(tmp_path / "new" / "folder", a=VALUE, b=Remembered("torch/linear", {}))
    fresh = cache(path.parent)
    assert fresh.get("a") == VALUE
    assert fresh.get("b") == Remembered("torch/linear", {})
    assert fresh.get("c") is None
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_disk_is_read_once(tmp_path: Path) -> None:
    """A shape costs one look at the disk in a process: gone files change nothing afterwards."""
    path = written(tmp_path)
    fresh = cache(tmp_path)
    assert fresh.get("a") == VALUE
    path.unlink()
    assert fresh.get("a") == VALUE
    assert fresh.get("b") is None


def test_clear(tmp_path: Path) -> None:
    """clear() forgets in memory and on disk, and putting goes on afterwards."""
    path = written(tmp_path)
    full = cache(tmp_path)
    assert full.get("a") == VALUE
    full.clear()
    assert full.get("a") is None
    assert not path.exists()
    full.put("b", VALUE)
    assert cache(tmp_path).get("a") is None
    assert cache(tmp_path).get("b") == VALUE


@pytest.mark.parametrize(
    "other",
    [
        MACHINE._replace(cpu="other"),
        MACHINE._replace(isas=("avx2", "scalar")),
        MACHINE._replace(fastlinear="0.1.1"),
        MACHINE._replace(torch="2.14.0"),
    ],
)
def test_each_machine_has_its_own_file(tmp_path: Path, other: Machine) -> None:
    """Another CPU, ISA list, fastlinear or torch shares nothing, even if its file is renamed to ours."""
    path = written(tmp_path)
    foreign = cache(tmp_path, other)
    assert foreign.get("a") is None
    assert foreign.path is not None
    os.rename(path, foreign.path)
    assert cache(tmp_path, other).get("a") is None


def test_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The variable wins, then XDG_CACHE_HOME if absolute, then ~/.cache; without a home the cache is memory."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("XDG_CACHE_HOME", "/xdg")
    monkeypatch.setenv("FASTLINEAR_CACHE_DIR", "/mine")
    assert default_folder() == Path("/mine")
    monkeypatch.setenv("FASTLINEAR_CACHE_DIR", "")
    assert default_folder() == Path("/xdg/fastlinear")
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    assert default_folder() == tmp_path / ".cache" / "fastlinear"

    def homeless() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "home", homeless)
    memory = TuningCache(MACHINE, NAMES.__contains__, LIMITS)
    memory.put("a", VALUE)
    assert memory.path is None
    assert memory.get("a") == VALUE


def believed(value: Remembered | None) -> bool:
    """Nothing was found, or something that is safe to use."""
    return value is None or (
        value.name in NAMES and all(number in LIMITS[which] for which, number in value.numbers.items())
    )


def test_truncated_or_flipped_anywhere(tmp_path: Path) -> None:
    """A file cut at any byte, or with any byte changed, never raises and yields nothing that is unsafe."""
    path = written(tmp_path)
    good = path.read_bytes()
    for i in range(len(good)):
        path.write_bytes(good[:i])
        assert cache(tmp_path).get("a") is None
        for mask in (0x01, 0x20, 0x80):
            path.write_bytes(good[:i] + bytes([good[i] ^ mask]) + good[i + 1 :])
            assert believed(cache(tmp_path).get("a"))
    path.write_bytes(good)
    assert cache(tmp_path).get("a") == VALUE


ANYTHING = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5) | st.sampled_from(sorted(NAMES)),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=3) | st.just("a"), inner, max_size=4),
    max_leaves=10,
)


@pytest.mark.parametrize("examples", [20, pytest.param(1000, marks=pytest.mark.exhaustive)])
def test_any_json_anywhere(tmp_path: Path, examples: int) -> None:
    """Any JSON, as the file, its entries, one entry or a field of one, is ignored or safe; its neighbor stays."""

    @settings(max_examples=examples, deadline=None)
    @given(content=ANYTHING, place=st.sampled_from(["file", "entries", "entry", *Remembered._fields]))
    def holds(content: Any, place: str) -> None:
        path = written(tmp_path, a=VALUE, b=VALUE)
        whole = json.loads(path.read_bytes())
        if place in Remembered._fields:
            whole["entries"]["a"][place] = content
        elif place == "entry":
            whole["entries"]["a"] = content
        elif place == "entries":
            whole["entries"] = content
        else:
            whole = content
        path.write_text(json.dumps(whole))
        found = cache(tmp_path)
        assert believed(found.get("a"))
        if place not in ("file", "entries"):
            assert found.get("b") == VALUE
        path.unlink()

    holds()


@pytest.mark.parametrize(
    "poison",
    [
        {"name": "fp32/avx9000/6x64"},
        {"name": "../../etc/passwd"},
        {"name": ["torch/linear"]},
        {"numbers": {"threads": -1}},
        {"numbers": {"threads": 0}},
        {"numbers": {"threads": 10**30}},
        {"numbers": {"threads": "2"}},
        {"numbers": {"threads": 2.0}},
        {"numbers": {"threads": True}},
        {"numbers": {"surprise": 1}},
        {"numbers": [1, 2]},
        {"table": [["torch/linear"]]},
        {"table": [["\x1b[2J", 1.0]]},
        {"table": [["torch/linear", float("nan")]]},
        {"table": [["torch/linear", 10**400]]},
        {"table": [["torch/linear", 1.0]] * 1000},
        {"speedup": float("inf")},
        {"speedup": "2"},
        {"spread": -0.1},
        {"extra": 1},
    ],
    ids=lambda poison: str(poison)[:40],
)
def test_poisoned_entry_is_ignored(tmp_path: Path, poison: dict[str, Any]) -> None:
    """An unknown kernel, a number out of range or a wrong type loses that entry alone, and is gone after a write."""
    path = written(tmp_path, a=VALUE, b=VALUE)
    whole = json.loads(path.read_bytes())
    whole["entries"]["a"].update(poison)
    path.write_text(json.dumps(whole))
    found = cache(tmp_path)
    assert found.get("a") is None
    assert found.get("b") == VALUE
    found.put("c", VALUE)
    assert set(json.loads(path.read_bytes())["entries"]) == {"b", "c"}


@pytest.mark.parametrize("content", [b"[" * 100_000, b" " * ((4 << 20) + 1), b"\xff\xfe", b"1" * 5000, b""])
def test_hostile_files(tmp_path: Path, content: bytes) -> None:
    """Deep nesting, oversize, bad UTF-8, numbers too long to parse: ignored, and replaced by the next put."""
    path = written(tmp_path)
    path.write_bytes(content)
    hit = cache(tmp_path)
    assert hit.get("a") is None
    hit.put("a", VALUE)
    assert cache(tmp_path).get("a") == VALUE


def test_oversize_is_ignored_though_valid(tmp_path: Path) -> None:
    """The cap is on bytes, whatever they say."""
    path = written(tmp_path)
    path.write_bytes(path.read_bytes() + b" " * memory.MAX_BYTES)
    assert cache(tmp_path).get("a") is None


def test_not_a_file_of_ours(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file of another user, one that others may write, a folder or a FIFO in its place: not believed, no hang."""
    path = written(tmp_path)
    with monkeypatch.context() as other:
        other.setattr(os, "getuid", lambda: path.stat().st_uid + 1)
        assert cache(tmp_path).get("a") is None
    for mode in (0o666, 0o660, 0o602):
        path.chmod(mode)
        assert cache(tmp_path).get("a") is None
    path.chmod(0o600)
    assert cache(tmp_path).get("a") == VALUE
    path.unlink()
    os.mkfifo(path)
    assert cache(tmp_path).get("a") is None
    path.unlink()
    path.mkdir()
    assert cache(tmp_path).get("a") is None


def test_unwritable_folder_warns_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """One message names the folder and the variable; the work goes on in memory."""
    (tmp_path / "file").write_text("in the way")
    folder = tmp_path / "file" / "below"
    stuck = cache(folder)
    with caplog.at_level(logging.WARNING, "fastlinear"):
        for key in "abc":
            stuck.put(key, VALUE)
        stuck.clear()
        stuck.put("a", VALUE)
    assert stuck.get("a") == VALUE
    (message,) = caplog.messages
    assert str(folder) in message
    assert "FASTLINEAR_CACHE_DIR" in message
    assert "Not a directory" in message


@pytest.mark.parametrize("step", ["replace", "unlink"])
def test_failed_write_keeps_the_old_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, step: str
) -> None:
    """A write that fails half way leaves the file as it was; the next process writes as if nothing had happened."""
    path = written(tmp_path)
    before = path.read_bytes()

    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as broken, caplog.at_level(logging.WARNING, "fastlinear"):
        broken.setattr(os, step, fail)
        full = cache(tmp_path)
        full.put("b", VALUE)
        full.put("c", VALUE)
        assert full.get("b") == VALUE
    assert path.read_bytes() == before
    assert len(caplog.messages) == 1
    written(tmp_path, d=VALUE)
    assert set(json.loads(path.read_bytes())["entries"]) == {"a", "d"}
    assert not list(tmp_path.glob("*.tmp"))


def test_a_held_lock_does_not_block(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """While another process writes, a put does not wait at all, and a later one, or flush, writes both."""
    monkeypatch.setattr(memory, "PATIENCE", 0.01)
    monkeypatch.setattr(memory.time, "sleep", _no_sleep)
    path = written(tmp_path)
    waiting = cache(tmp_path)
    with open(path.with_suffix(".lock"), "wb") as side:
        fcntl.flock(side, fcntl.LOCK_EX)
        waiting.put("b", VALUE)
        assert waiting.get("b") == VALUE
        assert cache(tmp_path).get("b") is None
    waiting.flush()
    assert cache(tmp_path).get("b") == VALUE
    waiting.put("c", VALUE)
    assert {key for key in "abc" if cache(tmp_path).get(key)} == set("abc")


def _no_sleep(seconds: float) -> None:
    raise AssertionError(f"a put slept for {seconds} s")


def test_the_lock_does_not_outlive_a_fork(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A child forked in the middle of a write, by whatever thread, holds no lock: the next process writes at once."""
    path = written(tmp_path)
    ours, done = cache(tmp_path), os.pipe()
    replace, children = os.replace, []

    def fork_and_replace(*paths: Any) -> None:
        child = os.fork()
        if child == 0:  # lives on with all that was open, as a worker would
            os.read(done[0], 1)
            os._exit(0)
        children.append(child)
        replace(*paths)

    with monkeypatch.context() as forking:
        forking.setattr(os, "replace", fork_and_replace)
        ours.put("b", VALUE)
    monkeypatch.setattr(memory.time, "sleep", _no_sleep)
    cache(tmp_path).put("c", VALUE)
    os.write(done[1], b"x")
    os.waitpid(children[0], 0)
    assert set(json.loads(path.read_bytes())["entries"]) == set("abc")


def test_a_child_lets_go_of_the_lock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a forked child has of a lock is closed there, and both it and the parent put afterwards."""
    path = written(tmp_path)
    ours = cache(tmp_path)

    def fork(_: object, __: object) -> None:
        child = os.fork()
        if child == 0:
            ours.forked()
            os._exit(0 if ours._handle is None and not ours._changing.locked() else 1)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0

    with monkeypatch.context() as forking:
        forking.setattr(ours, "_replace", fork)
        ours.put("b", VALUE)
    ours.put("c", VALUE)
    assert set(json.loads(path.read_bytes())["entries"]) == set("abc")


@pytest.mark.parametrize("suffix", [".lock", ".json"])
def test_links_are_not_followed(tmp_path: Path, caplog: pytest.LogCaptureFixture, suffix: str) -> None:
    """A symbolic link in the place of the lock or of the file: what it points at keeps its contents and is not read."""
    victim = tmp_path / "victim"
    path = written(tmp_path / "cache")
    victim.write_bytes(path.read_bytes())
    before = victim.read_bytes()
    path.with_suffix(suffix).unlink()
    path.with_suffix(suffix).symlink_to(victim)
    linked = cache(path.parent)
    assert (linked.get("a") is None) == (suffix == ".json")
    with caplog.at_level(logging.WARNING, "fastlinear"):
        linked.put("b", VALUE)
    assert victim.read_bytes() == before and linked.get("b") == VALUE
    assert len(caplog.messages) == (suffix == ".lock")


def test_the_oldest_entries_go(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """More than the file may hold pushes out what was put first, a quarter at a time; the file stays readable."""
    monkeypatch.setattr(memory, "MAX_BYTES", 20_000)
    full = cache(tmp_path)
    keys = [f"key{i}" for i in range(200)]
    for key in keys:
        full.put(key, VALUE)
    assert full.path is not None and full.path.stat().st_size <= 20_000
    found = [key for key in keys if cache(tmp_path).get(key)]
    assert len(found) >= 50 and found == keys[-len(found) :]
    cache(tmp_path).put("new", VALUE)
    assert cache(tmp_path).get("new") == VALUE and cache(tmp_path).get(found[-1]) == VALUE


def test_what_is_held_is_for_this_process(tmp_path: Path) -> None:
    """hold() is remembered here and written nowhere, not even by a later put; a put of the same key takes its place."""
    ours = cache(tmp_path)
    ours.hold("a", VALUE)
    assert ours.get("a") == VALUE
    ours.put("b", VALUE)
    assert cache(tmp_path).get("a") is None and cache(tmp_path).get("b") == VALUE
    ours.clear()
    assert ours.get("a") is None


def test_eight_processes_at_once_lose_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Eight processes that write ten entries each, starting together, leave one valid file with all eighty."""
    monkeypatch.setattr(memory, "PATIENCE", 60.0)  # a busy machine may make it wait, but not lose
    fork = multiprocessing.get_context("fork")
    together = fork.Barrier(8)

    def write(process: int) -> None:
        mine = cache(tmp_path)
        together.wait()
        for i in range(10):
            mine.put(f"{process}/{i}", VALUE)
        mine.flush()

    writers = [fork.Process(target=write, args=(process,)) for process in range(8)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    assert [writer.exitcode for writer in writers] == [0] * 8
    found = cache(tmp_path)
    assert all(found.get(f"{process}/{i}") == VALUE for process in range(8) for i in range(10))
