"""FastLinear with relu against nn.Linear + ReLU, MKL and oneDNN on prepacked weights, and the machine's roofline.

    python benchmarks/bench.py                    the whole grid, written to benchmarks/results/ (about 8 minutes)
    python benchmarks/bench.py --dtype bfloat16   weights and inputs in bf16; the fp32 FastLinear stands beside them
    python benchmarks/bench.py --quantize int8    int8 weights and products, or w8f: int8 weights only
    python benchmarks/bench.py --quantize int4    weights of 4 bits in groups of 32; int4g128, and int4wo: weights only
    python benchmarks/bench.py --quantize int8 --peers  and ONNX Runtime and OpenVINO beside, in processes of their own
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
from importlib.metadata import version
from pathlib import Path
from typing import Any

import once
import peers
import plot
import remote
import shapes
import summary
import torch
from attainable import peaks_of
from grid import run_grid

import fastlinear
import fastlinear._tensors as _tensors

RESULTS = Path(__file__).with_name("results")
STATES = ("hot", "cold")
DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in _tensors.FORMATS}
# --isa: what keeps this package and each rival from wider instructions; read when they are loaded.
LIMITS = {
    "avx2": {
        "FASTLINEAR_MAX_ISA": "avx2",
        "ATEN_CPU_CAPABILITY": "avx2",
        "MKL_ENABLE_INSTRUCTIONS": "AVX2",
        "ONEDNN_MAX_CPU_ISA": "AVX2",
        "FBGEMM_ENABLE_INSTRUCTIONS": "AVX2",
    }
}


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="few shapes and rounds")
    parser.add_argument("--dtype", choices=DTYPES, default="float32", help="of weights, biases and inputs")
    parser.add_argument("--quantize", choices=peers.SCHEMES, help="weights of that dtype, for inputs of that dtype")
    parser.add_argument("--peers", action="store_true", help="other engines beside --quantize; makes .venv-peers")
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
    options.form = options.quantize or _tensors.FORMATS[options.dtype]
    if options.peers and (options.isa or options.form not in remote.RIVALS):
        parser.error("--peers stand beside --quantize, and know nothing of --isa")
    options.states = tuple(options.states.split(","))
    if not set(options.states) <= set(STATES):
        parser.error(f"--states are {' and '.join(STATES)}, not {','.join(options.states)}")
    if not (options.quick or options.shapes or options.ms):
        limit = options.isa or os.environ.get("FASTLINEAR_MAX_ISA")
        widened = _tensors.FORMATS[options.dtype] if options.quantize and options.dtype is not torch.float32 else None
        name = "-".join(filter(None, (slug(fastlinear.cpu_info()["model"]), options.form, widened, limit)))
        default = RESULTS / f"{name}.json"
        options.json = options.json or default
        options.plot = options.plot or options.json.with_suffix(".png")
    grid = shapes.QUICK if options.quick else shapes.GRIDS.get(options.form, shapes.GRID)
    options.shapes, options.ms = options.shapes or grid.shapes, options.ms or grid.ms
    return options


def slug(cpu: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", cpu.lower()).strip("-") or "cpu"


def line(record: dict[str, Any], rivals: tuple[str, ...]) -> str:
    shape, us = f"{record['m']}x{record['k']}x{record['n']}", record["us"]
    times = " ".join(f"{name} {time:9.1f}" for name, time in us.items())
    own = f" (native {record['native_fraction']:4.0%})" if "native_fraction" in record else ""
    return (
        f"t{record['threads']} {record['state']:<4} {shape:<14} {times} us  roofline {record['fraction']:4.0%}{own}  "
        f"over best {summary.over_best(record, rivals):5.2f}x  {record['plan']}"
    )


def about(python: Path | None) -> dict[str, Any]:
    """Where and with what these figures were measured; python: of the rivals in other processes."""
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
            **(remote.versions(python) if python else {}),
        },
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "commit": commit,
    }


def run(options: argparse.Namespace) -> dict[str, Any]:
    """The whole benchmark, printing as it goes; what it returns is what the JSON holds."""
    form, dtype = options.form, str(options.dtype).removeprefix("torch.")
    peaks = peaks_of(form, in_groups=form in peers.SCHEMES and peers.SCHEMES[form].integers)
    makers, refused = peers.willing(form, options.dtype)
    python = remote.environment() if options.peers else None
    elsewhere = remote.willing(python, form)
    refused |= {name: why for name, why in elsewhere.items() if why is not None}
    records = []
    for record in run_grid(options, peaks, makers, python, [name for name in elsewhere if name not in refused]):
        records.append(record)
        print(line(record, shapes.TARGETS[form].rivals), flush=True)
    torch.set_num_threads(1)
    document = {
        "format": 1,
        "about": about(python),
        "dtype": form,
        "x": _tensors.FORMATS[options.dtype],
        "isa": peaks.isa,
        "native_isa": peaks.native_isa,
        "refused": refused,
        "records": records,
        "tiny_calls": once.tiny_calls(shapes.SMALL, options.dtype, form),
        "tuning": once.tuning(records),
        "once": once.once(1 if options.quick else 5, dtype, form),
        "summary": summary.summarize(records, peaks.isa, form),
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
