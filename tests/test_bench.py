"""The benchmark measures what it says and sums it up right. No test here asks how fast anything is."""

import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import fastlinear

FOLDER = Path(__file__).parent.parent / "benchmarks"
sys.path.insert(0, str(FOLDER))

import compare  # noqa: E402
import roofline  # noqa: E402
import shapes  # noqa: E402
import summary  # noqa: E402
import timing  # noqa: E402


def record(m: int = 1, state: str = "hot", fraction: float = 0.5, **us: float) -> dict[str, Any]:
    times = {"fastlinear": 10.0, "nn.Linear": 20.0, "mkl": 15.0, "onednn": 30.0} | us
    return {"threads": 1, "state": state, "m": m, "k": 8, "n": 4, "us": times, "fraction": fraction, "plan": "p"}


def test_the_grid_is_the_one_that_was_asked_for() -> None:
    """72 shapes, and every M of them in a band with a target."""
    assert len(shapes.MS) * len(shapes.SHAPES) == 72
    assert all(sum(band.least <= m <= band.most for band in shapes.BANDS) == 1 for m in shapes.MS)


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
    assert entry["geomean_over"]["nn.Linear"] == pytest.approx(math.sqrt(2 * 8))
    assert entry["geomean_over_best"] == pytest.approx(math.sqrt(1.5 * 0.9))
    assert entry["worst_over_best"] == pytest.approx(0.9) and entry["worst_shape"] == "2x8x4"
    assert entry["slower"] == [["2x8x4", pytest.approx(0.9)]]


def test_inductor_is_shown_but_is_no_rival_of_the_targets() -> None:
    """The best of nn.Linear, MKL and oneDNN stays what it is."""
    (entry,) = summary.summarise([record(inductor=5.0)], "avx512")
    assert entry["geomean_over"]["inductor"] == 0.5 and entry["worst_over_best"] == 1.5


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
    assert "8x8x4 0.80" in summary.text([entry]) and "below" not in summary.text([narrow])


def test_states_are_summed_up_apart() -> None:
    """Hot and cold cells never meet in one mean."""
    entries = summary.summarise([record(state="hot"), record(state="cold", fastlinear=5.0)], "avx512")
    assert {(e["state"], e["geomean_over"]["nn.Linear"]) for e in entries} == {("cold", 4.0), ("hot", 2.0)}


def test_the_attainable_time_is_the_longer_of_the_two() -> None:
    """2 M N K operations, and weight, x and bias read once."""
    assert roofline.bytes_read(2, 3, 5) == 4 * (15 + 6 + 5)
    assert roofline.attainable(2, 3, 5, flops=60.0, bandwidth=1e9) == 1.0
    assert roofline.attainable(2, 3, 5, flops=1e9, bandwidth=52.0) == 2.0


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
    with pytest.raises(ValueError, match="mmx"):
        roofline.Roofline("mmx")


def test_compare_matches_cells() -> None:
    """The same cell of both runs in one row; what only one has is counted, not compared."""
    before, after = {"records": [record(1), record(2)]}, {"records": [record(1, fastlinear=5.0), record(4)]}
    lines = list(compare.table(before, after))
    assert "1x8x4" in lines[1] and "2.00x" in lines[1]
    assert "2.000x faster" in lines[2] and "2 cells" in lines[3]


@pytest.mark.skipif("avx2" not in fastlinear.cpu_info()["isas"], reason="the roofline needs AVX2")
def test_a_tiny_run_writes_figures_and_plot(tmp_path: Path) -> None:
    """The whole command, limited to AVX2: every cell has every candidate, and the JSON says where it was measured."""
    figures, plot = tmp_path / "figures.json", tmp_path / "plot.png"
    grid = ["--quick", "--threads", "1", "--shapes", "1024x1024", "--ms", "1,5", "--isa", "avx2"]
    command = [sys.executable, str(FOLDER / "bench.py"), *grid, "--json", str(figures), "--plot", str(plot)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "by geometric mean" in done.stdout and "roofline" in done.stdout
    assert plot.read_bytes().startswith(b"\x89PNG")
    document = json.loads(figures.read_text())
    assert document["format"] == 1 and document["isa"] == "avx2"
    assert document["about"].keys() == {"cpu", "cores", "system", "versions", "date", "commit"}
    assert document["about"]["versions"].keys() == {"fastlinear", "torch", "python"}
    assert [(r["m"], r["state"]) for r in document["records"]] == [(1, "hot"), (1, "cold"), (5, "hot"), (5, "cold")]
    for r in document["records"]:
        assert r["us"].keys() == r["median_us"].keys() and {"fastlinear", "nn.Linear"} <= r["us"].keys()
        assert all(time > 0 for time in r["us"].values())
        assert r["fraction"] == pytest.approx(r["attainable_us"] / r["us"]["fastlinear"])
        cache = fastlinear.cpu_info()["l3"]
        assert r["copies"] * 4 << 20 > cache if r["state"] == "cold" else r["copies"] == 1
    assert document["summary"] == json.loads(json.dumps(summary.summarise(document["records"], "avx2")))
    assert {"no_op", "fastlinear", "nn.Linear"} <= document["tiny_calls"].keys()
    assert document["tuning"]["first_calls"] == 2 and document["once"]["import_ms"] > 0
