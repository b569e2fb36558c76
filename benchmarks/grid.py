"""The cells of the grid, each measured: every contestant in turn, with the roofline beside them."""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import peers
import torch
from attainable import Ceiling, Peaks
from remote import Remote, remotes
from shapes import FP32, OURS
from timing import race

import fastlinear

# Seconds, fewest and most rounds for one cell of the grid.
FULL, QUICK = (1.2, 5, 40), (0.05, 3, 5)
COLD_CACHES = 2  # copies of the weights fill the last-level cache so many times: none survives one turn of the rotation
COLD_BYTES = 64 << 20  # at least


def run_grid(
    options: argparse.Namespace, peaks: Peaks, makers: peers.Makers, python: Path | None, others: Sequence[str]
) -> Iterator[dict[str, Any]]:
    """Records of all cells (summary.py tells what is in one). python: runs `others`, the rivals in other processes."""
    for threads in options.threads:
        torch.set_num_threads(threads)
        with remotes(python, others, options.form, threads) as rivals:
            for k, n in options.shapes:
                layer = peers.rounded(torch.nn.Linear(k, n, dtype=options.dtype), options.form)
                layers = copies(options, layer, options.form)
                fast = {OURS: peers.Fast(layers, options.form)}
                if options.form != FP32:
                    fast[FP32] = peers.Fast(copies(options, layer.float(), FP32), FP32)
                for rival in rivals:
                    rival.layers(layers[0], len(layers))
                for m in options.ms:
                    with torch.inference_mode():
                        yield from run_cell(options, peaks, makers, rivals, threads, m, layers, fast)


def copies(options: argparse.Namespace, layer: torch.nn.Linear, form: str) -> list[torch.nn.Linear]:
    """As many as no cache holds once packed in this format, where cold weights are to be measured."""
    wanted = max(COLD_BYTES, COLD_CACHES * int(fastlinear.cpu_info()["l3"]))
    enough = max(2, math.ceil(wanted / (peers.weight_bytes(form) * layer.weight.numel())))
    return peers.copies(layer, enough if "cold" in options.states else 1)


def run_cell(
    options: argparse.Namespace,
    peaks: Peaks,
    makers: peers.Makers,
    rivals: list[Remote],
    threads: int,
    m: int,
    layers: list[torch.nn.Linear],
    fast: dict[str, peers.Fast],
) -> Iterator[dict[str, Any]]:
    n, k = layers[0].weight.shape
    x = torch.randn(m, k).to(options.dtype)
    tuned = {name: of_name.tune(x) for name, of_name in fast.items()}
    _, chosen, tune_ms = tuned[OURS]
    contestants: dict[str, peers.Contestant] = {
        **{name: peers.Candidate(make(layers, m), x) for name, make in makers.items()},
        **{rival.name: rival.bind(x, n) for rival in rivals},
        **{name: candidate for name, (candidate, *_) in tuned.items()},
    }
    if options.inductor and "hot" in options.states:
        contestants["inductor"] = peers.Candidate(peers.inductor(layers, m), x)
    peers.check(contestants, options.form, layers[0], x)
    of_weight = peers.weight_bytes(options.form)
    for state in options.states:
        hot = state == "hot"
        rotations = {
            name: contestant.rotation(hot) for name, contestant in contestants.items() if hot or name != "inductor"
        }
        used = 1 if hot else len(layers)
        ceiling = Ceiling(peaks, threads, int(used * of_weight * n * k) + x.itemsize * (m * k + m * n + n), hot)
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
            "beyond_l2": not hot or of_weight * n * k > threads * int(fastlinear.cpu_info()["l2"]),
            **ceiling.figures(m, k, n, (x.itemsize, of_weight), timings[OURS].quartile),
        }


def effort(options: argparse.Namespace) -> tuple[float, int, int]:
    return QUICK if options.quick else FULL
