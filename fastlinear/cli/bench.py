"""`fastlinear bench`: FastLinear against nn.Linear and the activation, and both against what the machine can do."""

from __future__ import annotations

import argparse
import functools
import json
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

import fastlinear._kernels as _kernels
from fastlinear.cli.options import DTYPES, SCHEMES, UsageError, check_override
from fastlinear.cli.roofline import Ceiling, Roofline
from fastlinear.layer import linear
from fastlinear.plan import measuring
from fastlinear.plan.table import runnable
from fastlinear.spec import activations
from fastlinear.spec.activations import Activation
from fastlinear.spec.schemes import Scheme

_SECONDS = 0.3  # a shape
_SAMPLE = 200e-6  # of calls between two looks at the clock


class Result(NamedTuple):
    """One shape on so many threads: microseconds of a whole call of nn.Linear and of FastLinear, what ran, and the
    ceilings of the same seconds."""

    m: int
    k: int
    n: int
    threads: int
    torch_us: float
    us: float
    runs_on: str
    ceiling: Ceiling

    def record(self) -> dict[str, Any]:
        """For --json."""
        seconds = self.us / 1e6
        return {
            **{name: getattr(self, name) for name in ("m", "k", "n", "threads", "torch_us", "us", "runs_on")},
            "speedup": self.torch_us / self.us,
            "gflops": 2e-9 * self.m * self.n * self.k / seconds,
            "read_gbs": 1e-9 * self.ceiling.nbytes / seconds,
            **self.ceiling.record(seconds),
        }


def bench(options: argparse.Namespace) -> int:
    """Prints the times of FastLinear and of nn.Linear followed by the activation, and the share of the roofline."""
    check_override()
    activation = None if options.activation == "none" else activations.resolve(options.activation)
    scheme, results = SCHEMES.get(options.quantize), []
    form = f"{options.dtype} as {options.quantize}" if scheme else options.dtype
    roofline = Roofline(scheme.packed if scheme else _kernels.FORMATS[DTYPES[options.dtype]], options.isa)
    counts = options.threads or [_kernels.num_threads()]
    threads = ", ".join(map(str, counts))
    print(f"{_kernels.cpu_info()['model']}, {threads} thread(s), {form}, activation {options.activation}")
    print(f"Microseconds of a whole call, weights warm. Roofline: {roofline.says()}\n")
    calculated = "calculated" if roofline.tiles else ""
    print(
        f"{'M x K x N':<18}{'threads':>7}{'nn.Linear':>11}{'FastLinear':>12}{'speed-up':>10}{'GFLOP/s':>10}{'GB/s':>8}"
        f"{'roofline':>10}{calculated:>12}  runs on"
    )
    for count in counts:
        torch.set_num_threads(count)
        for m, k, n in options.shapes:
            result = _measure(m, k, n, DTYPES[options.dtype], scheme, activation, roofline)
            results.append(result.record())
            print(_line(result), flush=True)
    if options.json:
        _write(options, results)
    return 0


def _measure(
    m: int, k: int, n: int, dtype: torch.dtype, scheme: Scheme | None, activation: Activation | None, roofline: Roofline
) -> Result:
    stock, x = nn.Linear(k, n, dtype=dtype, device="cpu").eval(), torch.randn(m, k, dtype=dtype, device="cpu")
    calls: list[Callable[[Tensor], object]] = [functools.partial(_stock, stock, activation)]
    names = ["nn.Linear"]
    with torch.inference_mode():
        for kernel in [""] if roofline.isa is None else roofline.kernels():
            fast = linear.FastLinear.from_linear(stock, activation, quantize=scheme).eval()
            with _only(kernel), measuring.process.thorough():
                fast(x)
            calls.append(fast)
            names.append(" ".join(plan.name for plan in fast.plans) or "torch/linear")
        ceiling = roofline.measure(m, k, n, x.itemsize)
        times = _alternate(calls, x)
    best = min(range(1, len(calls)), key=times.__getitem__)
    return Result(m, k, n, torch.get_num_threads(), times[0], times[best], names[best], ceiling)


@contextmanager
def _only(kernel: str) -> Iterator[None]:
    """Plans are of this kernel, unless the name is empty."""
    before = os.environ.get("FASTLINEAR_KERNEL")
    if kernel:
        os.environ["FASTLINEAR_KERNEL"] = kernel
    try:
        yield
    finally:
        if kernel:
            del os.environ["FASTLINEAR_KERNEL"]
        if before is not None:
            os.environ["FASTLINEAR_KERNEL"] = before


def _line(result: Result) -> str:
    record = result.record()
    calculated = f"{record['calculated']:>12.0%}" if "calculated" in record else ""
    return (
        f"{f'{result.m}x{result.k}x{result.n}':<18}{result.threads:>7}{result.torch_us:>11.1f}{result.us:>12.1f}"
        f"{record['speedup']:>9.2f}x{record['gflops']:>10.1f}{record['read_gbs']:>8.1f}{record['roofline']:>10.0%}"
        f"{calculated}  {result.runs_on}"
    )


def _write(options: argparse.Namespace, results: list[dict[str, Any]]) -> None:
    about = {"cpu": _kernels.cpu_info(), "torch": torch.__version__, "dtype": options.dtype}
    about |= {"quantize": options.quantize, "isa": options.isa, "activation": options.activation}
    try:
        with open(options.json, "w") as file:
            json.dump({"format": 1, "about": about, "results": results}, file, indent=1)
            file.write("\n")
    except OSError as error:
        raise UsageError(f"--json: {error}") from None


def isa_of(text: str) -> str:
    """An ISA that runs here and has kernels."""
    allowed = list(dict.fromkeys(str(row["isa"]) for row in runnable()))
    if text not in allowed:
        refused = _kernels.cpu_info()["refused"].get(text)
        why = f" ({refused})" if refused else ""
        raise argparse.ArgumentTypeError(f"{text!r} does not run here{why}; what does: {', '.join(allowed)}")
    return text


def _stock(layer: nn.Linear, activation: Activation | None, x: Tensor) -> Tensor:
    return activations.apply(activation, layer(x))


def _alternate(calls: Sequence[Callable[[Any], object]], x: Tensor) -> list[float]:
    """Microseconds of each call: lower quartile of rounds in which all take turns."""
    counts = [max(1, int(_SAMPLE / min(_seconds(call, x, 1) for _ in range(3)))) for call in calls]
    times: list[list[float]] = [[] for _ in calls]
    stop = time.perf_counter() + _SECONDS
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
