"""`fastlinear bench`: FastLinear against nn.Linear and the activation, on a few shapes."""

from __future__ import annotations

import argparse
import functools
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

import fastlinear._kernels as _kernels
from fastlinear.cli.options import DTYPES, SCHEMES, check_override
from fastlinear.layer import linear
from fastlinear.plan import measuring
from fastlinear.spec import activations
from fastlinear.spec.activations import Activation

_BENCH_SECONDS = 0.3  # a shape
_SAMPLE = 200e-6  # seconds of calls between two looks at the clock


def bench(options: argparse.Namespace) -> int:
    """Prints the times of FastLinear and of nn.Linear followed by the activation."""
    check_override()
    activation = None if options.activation == "none" else activations.resolve(options.activation)
    dtype, cpu, scheme = DTYPES[options.dtype], _kernels.cpu_info()["model"], SCHEMES.get(options.quantize)
    form = f"{options.dtype} as {options.quantize}" if scheme else options.dtype
    print(f"{cpu}, {_kernels.num_threads()} thread(s), {form}, activation {options.activation}")
    print("Microseconds of a whole call, weights warm.\n")
    print(f"{'M x K x N':<18}{'nn.Linear':>11}{'FastLinear':>12}{'speed-up':>10}  runs on")
    for m, k, n in options.shapes:
        fast = linear.FastLinear.from_linear(
            nn.Linear(k, n, dtype=dtype, device="cpu"), activation, quantize=scheme
        ).eval()
        stock, x = nn.Linear(k, n, dtype=dtype, device="cpu").eval(), torch.randn(m, k, dtype=dtype, device="cpu")
        with torch.inference_mode():
            with measuring.process.thorough():
                fast(x)
            before, after = _alternate([functools.partial(_stock, stock, activation), fast], x)
        runs_on = " ".join(plan.name for plan in fast.plans) or "torch/linear"
        print(f"{f'{m}x{k}x{n}':<18}{before:>11.1f}{after:>12.1f}{before / after:>9.2f}x  {runs_on}", flush=True)
    return 0


def _stock(layer: nn.Linear, activation: Activation | None, x: Tensor) -> Tensor:
    return activations.apply(activation, layer(x))


def _alternate(calls: Sequence[Callable[[Any], object]], x: Tensor) -> list[float]:
    """Microseconds of each call: lower quartile of rounds in which all take turns."""
    counts = [max(1, int(_SAMPLE / min(_seconds(call, x, 1) for _ in range(3)))) for call in calls]
    times: list[list[float]] = [[] for _ in calls]
    stop = time.perf_counter() + _BENCH_SECONDS
    while time.perf_counter() < stop or len(times[0]) < 5:
        for call, count, of_call in zip(calls, counts, times, strict=True):
            _seconds(call, x, 1)  # what the other one left in the caches is not what a warm call starts from
            of_call.append(_seconds(call, x, count))
    return [1e6 * sorted(of_call)[len(of_call) // 4] for of_call in times]


def _seconds(call: Callable[[Any], object], x: Tensor, count: int) -> float:
    start = time.perf_counter()
    for _ in range(count):
        call(x)
    return (time.perf_counter() - start) / count
