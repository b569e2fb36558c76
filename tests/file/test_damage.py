"""Damaged files, and saves that are killed: whatever lies on the disk, load refuses it or loads it whole, in little
memory and time, and a file that is replaced is the old one or the new one.

All that reads damaged files runs in a child process with a limit on its address space and a time-out, so that a crash,
a huge allocation or a hang is seen as what it is.
"""

import copy
import json
import os
import random
import resource
import signal
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from forge import Small, join, on_meta, split
from models import OFF
from torch import nn

import fastlinear
from fastlinear import FormatError
from fastlinear.file.safetensors import LENGTH

IDS = torch.tensor([0, 3, 4])
ROOM = 512 << 20  # bytes a child may allocate


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A small file, in which all that a file can have stands."""
    fast = OFF(Small().eval())
    with torch.inference_mode():
        fast(IDS)
    for layer in (fast.fc, fast.head):
        for key, chosen in layer._plans.items():
            layer._plans[key] = chosen._replace(source="tuned")
    path = tmp_path / "model.safetensors"
    fastlinear.save(fast, path)
    return path


@pytest.fixture
def coded(tmp_path: Path) -> Path:
    """A small file with weights of 4 bits."""
    path = tmp_path / "coded.safetensors"
    fastlinear.save(OFF(Small().eval(), quantize=fastlinear.Int4WeightOnly(16, offsets=True), include="*"), path)
    return path


def in_child(work: Callable[[], Any], seconds: int) -> Any:
    """The result of work(), from a forked child with limits; fails with what went wrong there."""
    readable, writable = os.pipe()
    child = os.fork()
    if child == 0:
        signal.alarm(seconds)
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        room = pages * resource.getpagesize() + ROOM
        resource.setrlimit(resource.RLIMIT_AS, (room, room))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        try:
            told = {"result": work()}
        except BaseException:
            told = {"error": traceback.format_exc()}
        with open(writable, "w") as pipe:
            json.dump(told, pipe)
        os._exit(0)
    os.close(writable)
    with open(readable) as pipe:
        text = pipe.read()
    status = os.waitpid(child, 0)[1]
    assert status == 0, f"the child died of signal {os.WTERMSIG(status)}"
    told = json.loads(text)
    assert "error" not in told, told["error"]
    return told["result"]


class Loader:
    """Loads files into one model after the other, a new one only where the last was filled."""

    def __init__(self) -> None:
        self.outcomes: Counter[str] = Counter()
        self._renew()

    def _renew(self) -> None:
        self.model = on_meta(Small)
        self.state = self._state()

    def _state(self) -> list[Any]:
        modules = self.model.modules()
        return [
            (type(m), *map(id, (*m._parameters.values(), *m._buffers.values(), *m._modules.values()))) for m in modules
        ]

    def __call__(self, path: Path) -> str:
        """ "refused", the model being as it was, or "loaded", and then it runs."""
        try:
            fastlinear.load(path, self.model)
        except FormatError as error:
            assert str(error).startswith(f"'{path}' cannot be loaded: ") and len(str(error)) < 1000
            assert self._state() == self.state
            outcome = "refused"
        else:
            with torch.inference_mode():
                assert self.model(IDS).shape == (3, 5)
            self._renew()
            outcome = "loaded"
        self.outcomes[outcome] += 1
        return outcome


# ---- files cut and flipped ----


@pytest.mark.parametrize("step", [7, pytest.param(1, marks=pytest.mark.exhaustive)])
def test_cut_at_every_byte(path: Path, step: int) -> None:
    """A file that ends anywhere before its end is refused, and so is one that goes on behind it."""

    def work() -> Any:
        load = Loader()
        assert load(path) == "loaded"
        size = path.stat().st_size
        lengths = [size + 1, size + 4096, *range(size - 1, -1, -step)]
        for length in lengths:
            os.truncate(path, length)
            assert load(path) == "refused", length
        return load.outcomes["refused"] - len(lengths)

    assert in_child(work, 120) == 0


def flips(path: Path, masks: Callable[[int], tuple[int, ...]]) -> Counter[str]:
    """Outcomes of loading it with one byte of the header xor each of its masks, which are given by its place."""
    raw = path.read_bytes()
    begin = LENGTH + int.from_bytes(raw[:LENGTH], "little")

    def work() -> Any:
        load = Loader()
        with open(path, "r+b", buffering=0) as file:
            for i in range(begin):
                for mask in masks(i):
                    os.pwrite(file.fileno(), bytes([raw[i] ^ mask]), i)
                    load(path)
                os.pwrite(file.fileno(), raw[i : i + 1], i)
        assert load(path) == "loaded"
        return load.outcomes

    return Counter(in_child(work, 1800))


def test_every_header_byte_flipped(path: Path) -> None:
    """Nearly all of it is refused; what passes is a plan or a version that reads otherwise, and such a file loads.
    Bytes lose their last bit and their first in turns."""
    outcomes = flips(path, lambda i: (0x80,) if i % 2 else (0x01,))
    assert outcomes["refused"] > 5 * outcomes["loaded"] > 0


@pytest.mark.exhaustive
def test_every_header_bit_flipped(path: Path) -> None:
    """Each of them, and all of a byte at once."""
    outcomes = flips(path, lambda _: (0xFF, *(1 << bit for bit in range(8))))
    assert outcomes["refused"] > 5 * outcomes["loaded"] > 0


# ---- random mutations ----

NUMBERS = [-1, 0, 1, 2, 3, 4, 7, 8, 15, 16, 31, 32, 63, 64, 4095, 4096, 4097, 2**31, 2**32, 2**63, 2**64, 10**30]
VALUES: list[Any] = [
    *NUMBERS,
    True,
    None,
    1.0,
    1e300,
    float("inf"),
    "",
    "fc",
    "F32",
    "U8",
    "fc.packed",
    [],
    {},
    [0],
    [[]],
]


def places(value: Any) -> Iterator[tuple[Any, Any]]:
    """Every container and key in a JSON value."""
    keys = value.keys() if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ()
    for key in list(keys):
        yield value, key
        yield from places(value[key])


def mutate_values(header: dict[str, Any], random: random.Random) -> None:
    """Another value, none, one of another place or a nearby number, at one to three places."""
    for _ in range(random.choice((1, 1, 2, 3))):
        every = list(places(header))
        container, key = random.choice(every)
        other, other_key = random.choice(every)
        old = container[key]
        act = random.randrange(5)
        if act == 0:
            del container[key]
        elif act == 1:
            container[key] = random.choice(VALUES)
        elif act == 2:
            container[key] = copy.deepcopy(other[other_key])
        elif act == 3 and isinstance(container, list):
            container.insert(key, copy.deepcopy(old))
        elif isinstance(old, int):
            container[key] = old + random.choice((-4096, -64, -8, -1, 1, 8, 64, 4096))
        else:
            container[key] = random.choice(NUMBERS)


def mutate_bytes(raw: bytearray, random: random.Random) -> None:
    """Some bytes changed, cut, doubled or moved, most of them in the header."""
    header = LENGTH + int.from_bytes(raw[:LENGTH], "little")
    for _ in range(random.choice((1, 1, 2, 5))):
        end = len(raw) if random.random() < 0.2 else min(header, 3000, len(raw))
        if end < 2:
            return
        i, j = sorted(random.randrange(end) for _ in range(2))
        j = min(j, i + random.choice((1, 8, 100, 4096)))
        act = random.randrange(5)
        if act == 0:
            raw[i] = random.randrange(256)
        elif act == 1:
            del raw[i:j]
        elif act == 2:
            raw[i:i] = raw[i:j]
        elif act == 3:
            raw[i:j] = random.randbytes(j - i)
        else:
            k = random.randrange(end)
            raw[k : k + j - i] = raw[i:j]


def mutations(path: Path, count: int) -> Counter[str]:
    good, (header, data) = path.read_bytes(), split(path)

    def work() -> Any:
        load, dice = Loader(), random.Random(5)
        for i in range(count):
            if i % 2:
                forged = copy.deepcopy(header)
                mutate_values(forged, dice)
                if isinstance(forged.get("__metadata__"), dict):
                    join(path, forged, data)
                else:
                    join(path, json.dumps(forged), data)
            else:
                raw = bytearray(good)
                mutate_bytes(raw, dice)
                path.write_bytes(raw)
            load(path)
        return load.outcomes

    return Counter(in_child(work, 1800))


def test_random_mutations(path: Path) -> None:
    """Bytes and values of the header replaced at random: refused, or loaded whole, and the model then runs."""
    outcomes = mutations(path, 500)
    assert outcomes.total() == 500 and outcomes["refused"] > 250 and outcomes["loaded"] > 10


def test_random_mutations_of_codes(coded: Path) -> None:
    """A file of weights in groups is refused or loaded whole as any other is."""
    outcomes = mutations(coded, 200)
    assert outcomes.total() == 200 and outcomes["refused"] > 100 and outcomes["loaded"] > 4


@pytest.mark.exhaustive
def test_random_mutations_for_long(path: Path) -> None:
    """20,000 of them."""
    outcomes = mutations(path, 20_000)
    assert outcomes.total() == 20_000 and outcomes["refused"] > 10_000 and outcomes["loaded"] > 400


def test_a_header_of_200_mb(path: Path) -> None:
    """Its length is looked at before it is read: it is refused within a fraction of that memory."""
    raw = path.read_bytes()
    begin = LENGTH + int.from_bytes(raw[:LENGTH], "little")
    text = raw[LENGTH:begin] + b" " * (200 << 20)
    path.write_bytes(len(text).to_bytes(LENGTH, "little") + text + raw[begin:])
    del text

    def work() -> Any:
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        room = pages * resource.getpagesize() + (50 << 20)
        resource.setrlimit(resource.RLIMIT_AS, (room, room))
        return Loader()(path)

    assert in_child(work, 60) == "refused"


@pytest.mark.parametrize(
    "filling",
    ["[],", '{"a":', *(pytest.param(text, marks=pytest.mark.exhaustive) for text in ("{},", '"ab",', "0.5,"))],
)
def test_the_worst_headers_allowed(path: Path, filling: str) -> None:
    """JSON that takes most memory for its length, up to the limit: refused within the bound that the limit is for."""
    limit = 16 << 20
    text = '{"a":[' + filling * ((limit - 10_000) // len(filling)) + "0]}"
    join(path, text, b"")
    assert in_child(lambda: Loader()(path), 120) == "refused"


# ---- killed saves ----


class Constant(nn.Module):
    """All of its numbers are one number, which tells who wrote it."""

    def __init__(self, value: float) -> None:
        super().__init__()
        self.fc = nn.Linear(512, 512)
        self.rest = nn.Parameter(torch.empty(1 << 18))
        for parameter in self.parameters():
            nn.init.constant_(parameter, value)


def who_wrote(path: Path) -> float:
    """The one number in the file."""
    with torch.device("meta"):
        model: Any = Constant(0.0)
    fastlinear.load(path, model)
    (value,) = {float(v) for t in (model.fc.weight, model.fc.bias, model.rest) for v in torch.unique(t)}
    return value


def litter(path: Path) -> list[Path]:
    return [other for other in path.parent.iterdir() if other != path]


def kill_saves(path: Path, kills: int) -> tuple[Counter[float], int]:
    """Whose the file was after each kill, and how many kills hit a save while it was writing."""
    models = [OFF(Constant(value)) for value in (1.0, 2.0)]
    for model in models:
        fastlinear.freeze(model)
    dice, found, hits = random.Random(3), Counter[float](), 0
    fastlinear.save(models[0], path)
    for _ in range(kills):
        child = os.fork()
        if child == 0:
            try:
                while True:
                    for model in reversed(models):
                        fastlinear.save(model, path)
            finally:
                os._exit(1)
        time.sleep(dice.uniform(0.0, 0.03))
        os.kill(child, signal.SIGKILL)
        assert os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGKILL
        found[who_wrote(path)] += 1
        left = litter(path)
        hits += bool(left)
        for other in left:
            other.unlink()
    return found, hits


def test_killed_saves(tmp_path: Path) -> None:
    """30 saves over an existing file are killed at any moment: each time the file is one of the two, whole."""
    found, hits = kill_saves(tmp_path / "file", 30)
    assert found.total() == 30 and hits >= 3


@pytest.mark.exhaustive
def test_a_thousand_killed_saves(tmp_path: Path) -> None:
    """Torn: none."""
    found, hits = kill_saves(tmp_path / "file", 1000)
    assert found.total() == 1000 and min(found[1.0], found[2.0]) > 50 and hits > 300


def test_readers_among_writers(tmp_path: Path) -> None:
    """Two processes save to one path while a third loads from it: each file it meets is whole, and no other is left."""
    path = tmp_path / "file"
    models = [OFF(Constant(value)) for value in (1.0, 2.0)]
    fastlinear.save(models[0], path)
    writers = []
    for model in models:
        child = os.fork()
        if child == 0:
            code = 1
            try:
                for _ in range(15):
                    fastlinear.save(model, path)
                code = 0
            finally:
                os._exit(code)
        writers.append(child)
    seen: Counter[float] = Counter()
    stop = time.monotonic() + 60
    while writers and time.monotonic() < stop:
        seen[who_wrote(path)] += 1
        done = [child for child in writers if os.waitpid(child, os.WNOHANG)[0]]
        writers = [child for child in writers if child not in done]
    assert not writers and set(seen) <= {1.0, 2.0} and not litter(path)
