"""FastLinear with relu against nn.Linear + ReLU, MKL and oneDNN on prepacked weights, and the machine's roofline.

    python benchmarks/bench.py                    the whole grid, written to benchmarks/results/ (about 8 minutes)
    python benchmarks/bench.py --dtype bfloat16   weights and inputs in bf16; the fp32 FastLinear stands beside them
    python benchmarks/bench.py --quick            a few shapes, nothing written
    python benchmarks/bench.py --isa avx2         all of it as on a CPU without AVX-512

docs/benchmarks.md tells how it measures and what the figures mean.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import once
import peers
import plot
import shapes
import summary
import torch
from roofline import Ceiling, Roofline
from shapes import FP32, OURS
from timing import Rotation, race

import fastlinear
from fastlinear import _kernels

RESULTS = Path(__file__).with_name("results")
STATES = ("hot", "cold")
DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in _kernels.FORMATS}
# Seconds, fewest and most rounds for one cell of the grid.
FULL, QUICK = (1.2, 5, 40), (0.05, 3, 5)
COLD_CACHES = 2  # copies of the weights fill the last-level cache so many times: none survives one turn of the rotation
COLD_BYTES = 64 << 20  # at least
# --isa: what keeps this package and each rival from wider instructions; read when they are loaded.
LIMITS = {
    "avx2": {
        "FASTLINEAR_MAX_ISA": "avx2",
        "ATEN_CPU_CAPABILITY": "avx2",
        "MKL_ENABLE_INSTRUCTIONS": "AVX2",
        "ONEDNN_MAX_CPU_ISA": "AVX2",
    }
}


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="few shapes and rounds")
    parser.add_argument("--dtype", choices=DTYPES, default="float32", help="of weights, biases and inputs")
    parser.add_argument("--threads", type=shapes.parse_numbers, default=(1, 2), help="numbers of threads, as 1,2")
    parser.add_argument("--shapes", type=shapes.parse_shapes, help="KxN,KxN,...")
    parser.add_argument("--ms", type=shapes.parse_numbers, help="numbers of rows M, as 1,16,128")
    parser.add_argument(
        "--states", default="hot,cold", help="hot, cold, or both: whether the weights are in the caches"
    )
    parser.add_argument("--isa", choices=LIMITS, help="use nothing wider")
    parser.add_argument("--inductor", action="store_true", help="torch.compile too, hot only: several seconds a shape")
    parser.add_argument("--json", type=Path, help="where the figures go")
    parser.add_argument("--plot", type=Path, help="where the plot goes (PNG)")
    options = parser.parse_args()
    options.dtype = DTYPES[options.dtype]
    options.states = tuple(options.states.split(","))
    if not set(options.states) <= set(STATES):
        parser.error(f"--states are {' and '.join(STATES)}, not {','.join(options.states)}")
    if not (options.quick or options.shapes or options.ms):
        limit = options.isa or os.environ.get("FASTLINEAR_MAX_ISA")
        suffix = f"-{limit}" if limit else ""
        default = RESULTS / f"{slug(fastlinear.cpu_info()['model'])}-{_kernels.FORMATS[options.dtype]}{suffix}.json"
        options.json = options.json or default
        options.plot = options.plot or options.json.with_suffix(".png")
    options.shapes = options.shapes or (shapes.QUICK_SHAPES if options.quick else shapes.SHAPES)
    options.ms = options.ms or (shapes.QUICK_MS if options.quick else shapes.MS)
    return options


def slug(cpu: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", cpu.lower()).strip("-") or "cpu"


def run_grid(options: argparse.Namespace, roofline: Roofline, makers: peers.Makers) -> Iterator[dict[str, Any]]:
    """The records of all cells (summary.py tells what is in one)."""
    for threads in options.threads:
        torch.set_num_threads(threads)
        for k, n in options.shapes:
            layer = torch.nn.Linear(k, n, dtype=options.dtype)
            layers = copies(options, layer, options.dtype)
            fast = {OURS: peers.Fast(layers)}
            if options.dtype is not torch.float32:
                fast[FP32] = peers.Fast(copies(options, layer, torch.float32))
            for m in options.ms:
                with torch.inference_mode():
                    yield from run_cell(options, roofline, makers, threads, m, layers, fast)


def copies(options: argparse.Namespace, layer: torch.nn.Linear, dtype: torch.dtype) -> list[torch.nn.Linear]:
    """As many as no cache holds, where cold weights are to be measured."""
    wanted = max(COLD_BYTES, COLD_CACHES * int(fastlinear.cpu_info()["l3"]))
    enough = max(2, -(-wanted // (dtype.itemsize * layer.weight.numel())))
    return peers.copies(layer, enough if "cold" in options.states else 1, dtype)


def run_cell(
    options: argparse.Namespace,
    roofline: Roofline,
    makers: peers.Makers,
    threads: int,
    m: int,
    layers: list[torch.nn.Linear],
    fast: dict[str, peers.Fast],
) -> Iterator[dict[str, Any]]:
    n, k = layers[0].weight.shape
    x = torch.randn(m, k).to(options.dtype)
    tuned = {name: of_name.tune(x) for name, of_name in fast.items()}
    _, chosen, tune_ms = tuned[OURS]
    candidates = {name: peers.Candidate(make(layers, m), x) for name, make in makers.items()}
    candidates |= {name: candidate for name, (candidate, *_) in tuned.items()}
    if options.inductor and "hot" in options.states:
        candidates["inductor"] = peers.Candidate(peers.inductor(layers, m), x)
    peers.check(candidates, layers[0], x)
    for state in options.states:
        hot, size = state == "hot", x.itemsize
        rotations = {
            name: Rotation(calls[:1] if hot else calls, its_x)
            for name, (calls, its_x) in candidates.items()
            if hot or name != "inductor"
        }
        used = 1 if hot else len(layers)
        ceiling = Ceiling(roofline, threads, size * (used * n * k + m * k + m * n + n), hot)
        timings = race(rotations, ceiling, *effort(options))
        yield {
            "threads": threads,
            "state": state,
            "m": m,
            "k": k,
            "n": n,
            "copies": used,
            "us": {name: 1e6 * timing.quartile for name, timing in timings.items()},
            "median_us": {name: 1e6 * timing.median for name, timing in timings.items()},
            "rounds": timings[OURS].rounds,
            "plan": f"{chosen.name} t{chosen.plan_threads} k/{chosen.k_slices}",
            "source": chosen.source,
            "tune_ms": tune_ms,
            "beyond_l2": not hot or size * n * k > threads * int(fastlinear.cpu_info()["l2"]),
            **ceiling.figures(m, k, n, size, timings[OURS].quartile),
        }


def effort(options: argparse.Namespace) -> tuple[float, int, int]:
    return QUICK if options.quick else FULL


def isas(form: str) -> tuple[str, str | None]:
    """The ISA of the fp32 FMA, and the one that multiplies this format itself and sums up in fp32, if it runs here."""
    rows = [row for row in fastlinear.kernels() if row["runnable"] and row["accumulate"] == "fp32"]  # best first
    own = (row["isa"] for row in rows if row["rows"] == form != "fp32")
    return next(row["isa"] for row in rows if row["format"] == "fp32"), next(own, None)


def line(record: dict[str, Any]) -> str:
    shape, us = f"{record['m']}x{record['k']}x{record['n']}", record["us"]
    times = " ".join(f"{name} {time:9.1f}" for name, time in us.items())
    own = f" (native {record['native_fraction']:4.0%})" if "native_fraction" in record else ""
    return (
        f"t{record['threads']} {record['state']:<4} {shape:<14} {times} us  roofline {record['fraction']:4.0%}{own}  "
        f"over best {summary.over_best(record):5.2f}x  {record['plan']}"
    )


def about() -> dict[str, Any]:
    """Where and with what these figures were measured."""
    git = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        commit = subprocess.run(git, check=True, capture_output=True, text=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):  # no git, or no repository
        commit = None
    return {
        "cpu": fastlinear.cpu_info(),
        "cores": os.cpu_count(),
        "system": platform.platform(),
        "versions": {
            "fastlinear": version("fastlinear"),
            "torch": torch.__version__,
            "python": platform.python_version(),
        },
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "commit": commit,
    }


def run(options: argparse.Namespace) -> dict[str, Any]:
    """The whole benchmark, printing as it goes; what it returns is what the JSON holds."""
    form = _kernels.FORMATS[options.dtype]
    isa, native_isa = isas(form)
    roofline = Roofline(isa, native_isa)
    makers, refused = peers.willing(options.dtype)
    records = []
    for record in run_grid(options, roofline, makers):
        records.append(record)
        print(line(record), flush=True)
    torch.set_num_threads(1)
    document = {
        "format": 1,
        "about": about(),
        "dtype": form,
        "isa": isa,
        "native_isa": roofline.native,
        "refused": refused,
        "records": records,
        "tiny_calls": once.tiny_calls(shapes.SMALL, options.dtype),
        "tuning": once.tuning(records),
        "once": once.once(1 if options.quick else 5, str(options.dtype).removeprefix("torch.")),
        "summary": summary.summarise(records, isa, form),
    }
    print(summary.text(document["summary"]), summary.extras(document), sep="\n")
    return document


def main() -> None:
    options = arguments()
    limits = LIMITS.get(options.isa, {})
    if any(os.environ.get(name) != value for name, value in limits.items()):
        os.execve(sys.executable, [sys.executable, *sys.argv], {**os.environ, **limits})
    with tempfile.TemporaryDirectory() as folder:  # every run tunes anew, and leaves the user's cache alone
        os.environ["FASTLINEAR_CACHE_DIR"] = folder
        document = run(options)
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(document, indent=1) + "\n")
        print(f"\nfigures: {options.json}")
    if options.plot:
        plot.draw(document, options.plot)
        print(f"plot: {options.plot}")


if __name__ == "__main__":
    main()
