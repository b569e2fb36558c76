"""Whole models in torch, in fastlinear and in other engines, in turn, each in a process of its own.

    python benchmarks/whole.py [--model minilm] [--form fp32] [--threads 1] [--batches 1,8,32] [--json FILE]

Models: minilm, with its real weights; bert, vit and whisper (its encoder), of random ones. Forms: fp32; int8, with
weights in 8 bits, rows quantized in each call; bf16, an fp32 model that is multiplied in 16 bits. A time is the lower
quartile of rounds in which all take turns in shuffled order; ratios are what counts on a machine that is not idle.
`first` is the first call with a batch, with nothing kept of earlier processes: tracing, packing, tuning, compiling.
`cosine` is the smallest between a vector of the answer and eager's. --ways picks some; the other engines need
.venv-peers, which this makes once (600 MB).
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import subprocess
import sys
import tempfile
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import remote
import torch
import whole_models
from apart import Apart
from timing import race, settle
from tqdm import tqdm

import fastlinear

HERE = Path(__file__).parent
FORMS = {
    "fp32": ("eager", "convert", "backend", "inductor", "onnxruntime", "openvino"),
    "int8": ("eager", "convert int8", "backend int8", "quantize_dynamic", "torchao", "onnxruntime int8"),
    "bf16": ("eager", "eager bf16", "convert bf16", "backend bf16"),
}
ENGINES = ("onnxruntime", "onnxruntime int8", "openvino")


class Contestant(Apart):
    """One way to run the model, as timing.race takes it."""

    def __init__(self, name: str, model: str, threads: int, python: Path, packages: Path) -> None:
        ours = [sys.executable, HERE / "way.py", name, model, str(threads), packages]
        super().__init__([python, HERE / "engine.py", name, str(threads)] if name in ENGINES else ours, name)
        self.cost = 0.0

    def prepare(self, folder: Path) -> tuple[float, Any]:
        """Seconds of the first call with the inputs of `folder`, and the answer."""
        answer = folder / f"{self.name}.npy"
        first = self.ask("prepare", str(folder), str(answer))
        self.cost = float(self.ask("rotate"))
        return first, np.load(answer)

    def sample(self) -> float:
        settle()
        return float(self.ask("sample"))


def compare(contestants: list[Contestant], folder: Path, seconds: float) -> dict[str, dict[str, float]]:
    """Milliseconds, seconds of the first call and smallest cosine of each, for the inputs of `folder`."""
    prepared = {
        each.name: each.prepare(folder) for each in tqdm(contestants, desc="preparing", leave=False, disable=None)
    }
    with tqdm(desc="rounds", leave=False, disable=None) as progress:
        timings = race({each.name: each for each in contestants}, lambda: progress.update() and None, seconds, 8, 200)
    wanted = next(answer for _, answer in prepared.values())
    return {
        name: {"ms": 1e3 * timings[name].quartile, "first_s": first, "cosine": cosine(answer, wanted)}
        for name, (first, answer) in prepared.items()
    }


def cosine(got: Any, wanted: Any) -> float:
    """The smallest between two vectors along the last dimension."""
    a, b = (array.astype(np.float64) for array in (got, wanted))
    lengths = np.linalg.norm(a, axis=-1) * np.linalg.norm(b, axis=-1)
    return float(((a * b).sum(-1) / lengths).min())


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=whole_models.MODELS, default="minilm")
    parser.add_argument("--form", choices=FORMS, default="fp32", help="(default fp32)")
    parser.add_argument("--ways", help="comma-separated, of those of the form (default: all)")
    parser.add_argument("--threads", type=int, default=1, help="of each process (default 1)")
    parser.add_argument("--batches", default="1,8,32", help="comma-separated (default 1,8,32)")
    parser.add_argument("--seconds", type=float, default=10.0, help="of measuring a batch (default 10)")
    parser.add_argument("--json", type=Path, help="write the figures here, too")
    options = parser.parse_args()
    options.ways = options.ways.split(",") if options.ways else list(FORMS[options.form])
    for way in options.ways:
        if way not in FORMS[options.form]:
            parser.error(f"{way!r} is no way of {options.form}: {', '.join(FORMS[options.form])}")
    return options


def main() -> None:
    options = arguments()
    model, ways = whole_models.MODELS[options.model], options.ways
    python = remote.environment() if set(ways) & {*ENGINES, "torchao"} else Path(sys.executable)
    packages = python.parent.parent / "lib" / f"python3.{sys.version_info.minor}" / "site-packages"
    print(f"{fastlinear.cpu_info()['model']}, {options.model}, {options.form}, {options.threads} thread(s)")
    results = []
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        # What earlier processes compiled or measured would be no first call: 6 s of Inductor's 22 for BERT.
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(folder / "inductor")
        os.environ.pop("FASTLINEAR_CACHE_DIR", None)
        contestants = [Contestant(way, options.model, options.threads, python, packages) for way in ways]
        for each in contestants:
            stack.callback(each.close)
        for batch in map(int, options.batches.split(",")):
            inputs = model.inputs(batch, model.tokens)
            np.savez(folder / "inputs.npz", *(x.numpy() for x in inputs))
            if set(ways) & set(ENGINES):
                script = [sys.executable, HERE / "way.py", "export", options.model, "1", packages, folder]
                exported = subprocess.run(script, capture_output=True, text=True)
                if exported.returncode:
                    sys.exit(exported.stderr)
            found = compare(contestants, folder, options.seconds)
            results.append({"batch": batch, "ways": found})
            show(batch, found)
    if options.json:
        about = {"cpu": fastlinear.cpu_info(), "torch": torch.__version__, "date": date.today().isoformat()}
        about |= {"model": options.model, "form": options.form, "threads": options.threads}
        options.json.write_text(json.dumps({"about": about, "results": results}, indent=1) + "\n")


def show(batch: int, found: dict[str, dict[str, float]]) -> None:
    base = next(iter(found.values()))["ms"]
    print(f"\nbatch {batch:<14}{'ms':>9}{'over eager':>12}{'first, s':>10}{'cosine':>10}")
    for name, each in found.items():
        print(f"{name:<20}{each['ms']:>9.2f}{base / each['ms']:>11.2f}x{each['first_s']:>10.2f}{each['cosine']:>10.5f}")


if __name__ == "__main__":
    main()
