"""FastLinear with relu against nn.Linear + ReLU, MKL and oneDNN on prepacked weights, and the machine's roofline.

    python benchmarks/bench.py                    the whole grid, written to benchmarks/results/ (about 12 minutes)
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
from roofline import Ceiling, Roofline, attainable, bytes_read
from timing import Rotation, race

import fastlinear

RESULTS = Path(__file__).with_name("results")
STATES = ("hot", "cold")
# Seconds, fewest and most rounds for one cell of the grid.
FULL, QUICK = (1.5, 5, 40), (0.05, 3, 5)
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
    options.states = tuple(options.states.split(","))
    if not set(options.states) <= set(STATES):
        parser.error(f"--states are {' and '.join(STATES)}, not {','.join(options.states)}")
    if not (options.quick or options.shapes or options.ms):
        limit = options.isa or os.environ.get("FASTLINEAR_MAX_ISA")
        suffix = f"-{limit}" if limit else ""
        default = RESULTS / f"{slug(fastlinear.cpu_info()['model'])}-fp32{suffix}.json"
        options.json = options.json or default
        options.plot = options.plot or options.json.with_suffix(".png")
    options.shapes = options.shapes or (shapes.QUICK_SHAPES if options.quick else shapes.SHAPES)
    options.ms = options.ms or (shapes.QUICK_MS if options.quick else shapes.MS)
    return options


def slug(cpu: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", cpu.lower()).strip("-") or "cpu"


def run_grid(options: argparse.Namespace, roofline: Roofline) -> Iterator[dict[str, Any]]:
    """The records of all cells (summary.py tells what is in one)."""
    for threads in options.threads:
        torch.set_num_threads(threads)
        for k, n in options.shapes:
            count = cold_copies(k, n) if "cold" in options.states else 1
            layers = peers.copies(k, n, count)
            fast = peers.Fast(layers)
            for m in options.ms:
                with torch.inference_mode():
                    yield from run_cell(options, roofline, threads, m, layers, fast)


def run_cell(
    options: argparse.Namespace,
    roofline: Roofline,
    threads: int,
    m: int,
    layers: list[torch.nn.Linear],
    fast: peers.Fast,
) -> Iterator[dict[str, Any]]:
    n, k = layers[0].weight.shape
    x = torch.randn(m, k)
    chosen, tune_ms = fast.tune(x)
    calls = {name: make(layers, m) for name, make in peers.PEERS.items()}
    calls[peers.OURS] = [*fast.modules]
    peers.check(calls, x)
    for state in options.states:
        used = {name: of_name if state == "cold" else of_name[:1] for name, of_name in calls.items()}
        if options.inductor and state == "hot":
            used["inductor"] = peers.inductor(layers, m)
        weights = len(layers) * 4 * n * k if state == "cold" else 4 * n * k
        ceiling = Ceiling(roofline, threads, weights + 4 * (m * k + m * n + n), state == "hot")
        timings = race({name: Rotation(of, x) for name, of in used.items()}, ceiling, *effort(options))
        least = attainable(m, k, n, ceiling.flops, ceiling.bandwidth)
        yield {
            "threads": threads,
            "state": state,
            "m": m,
            "k": k,
            "n": n,
            "copies": len(layers) if state == "cold" else 1,
            "us": {name: 1e6 * timing.quartile for name, timing in timings.items()},
            "median_us": {name: 1e6 * timing.median for name, timing in timings.items()},
            "rounds": timings[peers.OURS].rounds,
            "plan": f"{chosen.name} t{chosen.plan_threads} k/{chosen.k_slices}",
            "source": chosen.source,
            "tune_ms": tune_ms,
            "bytes": bytes_read(m, k, n),
            "fma_gflops": ceiling.flops / 1e9,
            "read_gbs": ceiling.bandwidth / 1e9,
            "attainable_us": 1e6 * least,
            "fraction": least / timings[peers.OURS].quartile,
        }


def effort(options: argparse.Namespace) -> tuple[float, int, int]:
    return QUICK if options.quick else FULL


def cold_copies(k: int, n: int) -> int:
    wanted = max(COLD_BYTES, COLD_CACHES * int(fastlinear.cpu_info()["l3"]))
    return max(2, -(-wanted // (4 * k * n)))


def line(record: dict[str, Any]) -> str:
    shape, us = f"{record['m']}x{record['k']}x{record['n']}", record["us"]
    times = " ".join(f"{name} {time:9.1f}" for name, time in us.items())
    return (
        f"t{record['threads']} {record['state']:<4} {shape:<14} {times} us  roofline {record['fraction']:4.0%}  "
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
    isa = next(row["isa"] for row in fastlinear.kernels() if row["runnable"])  # best first
    roofline = Roofline(isa)
    records = []
    for record in run_grid(options, roofline):
        records.append(record)
        print(line(record), flush=True)
    torch.set_num_threads(1)
    document = {
        "format": 1,
        "about": about(),
        "isa": isa,
        "records": records,
        "tiny_calls": once.tiny_calls(shapes.SMALL),
        "tuning": once.tuning(records),
        "once": once.once(1 if options.quick else 5),
        "summary": summary.summarise(records, isa),
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
