"""The command line: `python -m fastlinear info | bench | tune | inspect | check`, also installed as `fastlinear`."""

from __future__ import annotations

import argparse
import functools
import importlib
import os
import platform
import sys
import time
from collections.abc import Callable, Sequence
from importlib.metadata import version
from typing import Any

import torch
from torch import Tensor, nn

import fastlinear._kernels as _kernels
from fastlinear.cli import check as selfcheck
from fastlinear.file import inspection
from fastlinear.file.safetensors import FormatError
from fastlinear.layer import linear
from fastlinear.model.convert import convert
from fastlinear.model.reporting import report
from fastlinear.model.tuning import tune
from fastlinear.plan import decide, measuring, table
from fastlinear.spec import activations
from fastlinear.spec.activations import Activation
from fastlinear.spec.schemes import Int8Dynamic, Int8WeightOnly

_SHAPES = "64x16x32,1x768x3072,16x768x3072,128x768x3072,1x1024x1024,16x1024x1024"
_BENCH_SECONDS = 0.3  # a shape
_SAMPLE = 200e-6  # seconds of calls between two looks at the clock
_SCHEMES = {scheme.packed: scheme for scheme in (Int8Dynamic(), Int8WeightOnly())}
_DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in _kernels.FORMATS}


class UsageError(Exception):
    """What the user asked for cannot be done; the message says why in one sentence."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command; 0, 1 if `check` found an error, 2 if the command cannot be done."""
    parser = argparse.ArgumentParser(prog="fastlinear", description="Fast linear layers for PyTorch on CPUs.")
    commands = parser.add_subparsers(required=True, metavar="command")
    command = commands.add_parser("info", help="what runs here: to be pasted into an issue")
    command.set_defaults(run=info)

    command = commands.add_parser("bench", help="FastLinear against nn.Linear and the activation, on a few shapes")
    command.add_argument("--shapes", type=_shapes, default=_SHAPES, help="MxKxN,...: rows x in_features x out_features")
    command.add_argument("--threads", type=_positive, help="threads of torch's pool (default: torch's own choice)")
    command.add_argument("--dtype", choices=_DTYPES, default="float32", help="of weights and inputs: %(choices)s")
    _add_quantize(command)
    allowed = ("none", *activations.names())
    command.add_argument("--activation", choices=allowed, default="relu", metavar="NAME", help=", ".join(allowed))
    command.set_defaults(run=bench)

    command = commands.add_parser("tune", help="choose the kernels of a model, so that later processes find them")
    command.add_argument("model", metavar="module:function", help="function() returns (model, example_inputs)")
    command.add_argument("--threads", type=_positive, help="threads of torch's pool (default: torch's own choice)")
    _add_quantize(command)
    command.set_defaults(run=tune_model)

    command = commands.add_parser("inspect", help="what a frozen file holds, and whether this CPU runs it as it is")
    command.add_argument("file", help="a file that fastlinear.save wrote")
    command.set_defaults(run=inspect)

    command = commands.add_parser("check", help="test every kernel that runs here against fp64")
    command.set_defaults(run=check)

    options = parser.parse_args(arguments)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(getattr(options, "threads", None) or before)
        return int(options.run(options))
    except UsageError as error:
        print(f"fastlinear: {error}", file=sys.stderr)
        return 2
    finally:
        torch.set_num_threads(before)


def _add_quantize(command: argparse.ArgumentParser) -> None:
    command.add_argument("--quantize", choices=_SCHEMES, help="pack the weights in 8 bits: %(choices)s")


def info(_: argparse.Namespace) -> int:
    """Prints what an issue needs to tell: versions, CPU, threads, kernels, cache and overrides."""
    cpu = _kernels.cpu_info()
    caches = ", ".join(f"{name} {cpu[name] >> 10} KiB" for name in ("l1d", "l2", "l3"))
    attached = "torch's own pool" if _kernels.pool_attached else "torch's pool was not found: one thread"
    rows = [
        ("fastlinear", version("fastlinear")),
        ("torch", torch.__version__),
        ("python", platform.python_version()),
        ("system", platform.platform()),
        ("CPU", f"{cpu['model'] or platform.machine()} ({cpu['vendor']}), {caches}"),
        ("ISAs in use", " ".join(cpu["isas"])),
        *(("without", f"{isa}: {why}") for isa, why in cpu["refused"].items()),
        ("threads", f"{_kernels.num_threads()} of {os.cpu_count()}, {attached}"),
        ("tuning cache", _cache()),
    ]
    overrides = sorted((name, value) for name, value in os.environ.items() if name.startswith("FASTLINEAR_"))
    rows += [("override", f"{name}={value}") for name, value in overrides] or [("overrides", "none")]
    print(*(f"{name + ':':<14}{value}" for name, value in rows), "", sep="\n")
    print(f"{'kernel':<24}{'rows x columns':>15}  {'packed as':<12}{'runs here'}")
    for row in _kernels.kernels():
        tile = f"{row['mr']} x {row['columns']}"
        print(f"{row['name']:<24}{tile:>15}  {row['layout']:<12}{'yes' if row['runnable'] else 'no'}")
    return 0


def _cache() -> str:
    cache = decide.cache()
    return f"{cache.path}, {len(cache)} entries" if cache.path else "in memory only: there is no home folder"


def bench(options: argparse.Namespace) -> int:
    """Prints the times of FastLinear and of nn.Linear followed by the activation."""
    _check_override()
    activation = None if options.activation == "none" else activations.resolve(options.activation)
    dtype, cpu, scheme = _DTYPES[options.dtype], _kernels.cpu_info()["model"], _SCHEMES.get(options.quantize)
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


def tune_model(options: argparse.Namespace) -> int:
    """Converts and tunes the model that module:function returns with its example inputs, and prints the report."""
    _check_override()
    model, example = _load(options.model)
    fast = convert(model, quantize=_SCHEMES.get(options.quantize))
    tune(fast, example)
    print(report(fast))
    return 0


def _load(spec: str) -> tuple[nn.Module, Any]:
    module_name, _, function_name = spec.partition(":")
    if not module_name or not function_name:
        raise UsageError(f"the model is given as module:function, not {spec!r}")
    if os.getcwd() not in sys.path:  # as `python -m` has it
        sys.path.insert(0, os.getcwd())
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        raise UsageError(f"module {module_name!r} cannot be imported from {os.getcwd()}: {error}") from error
    function = getattr(module, function_name, None)
    if not callable(function):
        raise UsageError(f"module {module_name!r} has no function {function_name!r}")
    made = function()
    if not (isinstance(made, tuple) and len(made) == 2 and isinstance(made[0], nn.Module)):
        raise UsageError(f"{spec} must return (model, example_inputs), an nn.Module first, not {type(made).__name__}")
    return made


def inspect(options: argparse.Namespace) -> int:
    """Prints what a frozen file holds; no more than its header is read."""
    _check_override()
    try:
        print(inspection.describe(options.file))
    except (FormatError, OSError) as error:
        raise UsageError(str(error)) from None
    return 0


def check(_: argparse.Namespace) -> int:
    """Prints the worst error of each kernel and each ISA's activations as a share of what is allowed."""
    print(f"{'checked':<24}{'what':<14}{'error':>9}  of what is allowed")
    shares = []
    for checked, what, worst in selfcheck.results():
        print(f"{checked:<24}{what:<14}{worst:>9.1%}  {'ok' if worst <= 1 else 'FAILED'}")
        shares.append(worst)
    failures = sum(not worst <= 1 for worst in shares)
    print(f"\n{len(shares) - failures} of {len(shares)} checks passed")
    return 1 if failures else 0


def _check_override() -> None:
    try:
        table.override()
    except ValueError as error:
        raise UsageError(str(error)) from None


def _shapes(text: str) -> list[tuple[int, ...]]:
    shapes = [tuple(map(_positive, shape.split("x"))) for shape in text.split(",")]
    if any(len(shape) != 3 for shape in shapes):
        raise argparse.ArgumentTypeError(f"{text!r} is not of the form MxKxN,MxKxN,...")
    return shapes


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number of at least 1")
    return int(text)


if __name__ == "__main__":
    sys.exit(main())
