"""The command line: `python -m fastlinear info | bench | tune | check`, also installed as `fastlinear`."""

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

from fastlinear import _kernels, activations, linear, planner
from fastlinear.activations import Activation
from fastlinear.convert import convert, tune
from fastlinear.report import report

_SHAPES = "64x16x32,1x768x3072,16x768x3072,128x768x3072,1x1024x1024,16x1024x1024"
_BENCH_SECONDS = 0.3  # a shape
_SAMPLE = 200e-6  # seconds of calls between two looks at the clock
# Of a self-test: around tiles, panels and the unrolling of K, and one that is all tails.
_CHECKED = ((1, 64, 64), (5, 33, 7), (16, 96, 130), (67, 70, 301))
_ULPS, _RELATIVE = 4, 1e-6  # an activation may be off by the larger of the two


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
    allowed = ("none", *activations.names())
    command.add_argument("--activation", choices=allowed, default="relu", metavar="NAME", help=", ".join(allowed))
    command.set_defaults(run=bench)

    command = commands.add_parser("tune", help="choose the kernels of a model, so that later processes find them")
    command.add_argument("model", metavar="module:function", help="function() returns (model, example_inputs)")
    command.add_argument("--threads", type=_positive, help="threads of torch's pool (default: torch's own choice)")
    command.set_defaults(run=tune_model)

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
    cache = planner.cache()
    return f"{cache.path}, {len(cache)} entries" if cache.path else "in memory only: there is no home folder"


def bench(options: argparse.Namespace) -> int:
    """Prints the times of FastLinear and of nn.Linear followed by the activation."""
    _check_override()
    activation = None if options.activation == "none" else activations.resolve(options.activation)
    print(f"{_kernels.cpu_info()['model']}, {_kernels.num_threads()} thread(s), fp32, activation {options.activation}")
    print("Microseconds of a whole call, weights warm.\n")
    print(f"{'M x K x N':<18}{'nn.Linear':>11}{'FastLinear':>12}{'speed-up':>10}  runs on")
    for m, k, n in options.shapes:
        fast = linear.FastLinear(k, n, activation=activation).eval()
        stock, x = nn.Linear(k, n).eval(), torch.randn(m, k)
        with torch.inference_mode():
            fast(x)
            before, after = _alternate([functools.partial(_stock, stock, activation), fast], x)
        runs_on = " ".join(chosen.name for chosen in fast.plans.values()) or "torch/linear"
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
    fast = convert(model)
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


def check(_: argparse.Namespace) -> int:
    """Prints the worst error of each kernel and each ISA's activations as a share of what is allowed."""
    torch.manual_seed(0)
    rows = [row for row in _kernels.kernels() if row["runnable"]]
    first_of_isa = {row["isa"]: row for row in reversed(rows)}
    results = [(row["name"], "sums", _worst_sum(row)) for row in rows]
    functions = [name for name in _kernels.activations() if name != "identity"]
    results += [(isa, name, _worst_activation(row, name)) for isa, row in first_of_isa.items() for name in functions]
    print(f"{'checked':<24}{'what':<14}{'error':>9}  of what is allowed")
    for checked, what, worst in results:
        print(f"{checked:<24}{what:<14}{worst:>9.1%}  {'ok' if worst <= 1 else 'FAILED'}")
    failures = sum(not worst <= 1 for *_, worst in results)
    print(f"\n{len(results) - failures} of {len(results)} checks passed")
    return 1 if failures else 0


def _worst_sum(row: dict[str, Any]) -> float:
    """Largest error of x W^T + b over Higham's bound for sums of K + 1 fp32 terms, gamma_{K+2} (|x| |W|^T + |b|)."""
    worst = 0.0
    for m, k, n in _CHECKED:
        x, weight, bias = torch.randn(m, k), torch.randn(n, k), torch.randn(n)
        got = _run(row, x, weight, bias)
        want = x.double() @ weight.double().T + bias
        gamma = (k + 2) * 2.0**-24 / (1 - (k + 2) * 2.0**-24)
        bound = gamma * (x.abs().double() @ weight.abs().double().T + bias.abs())
        worst = max(worst, _largest((got - want).abs() / bound))
    return worst


def _worst_activation(row: dict[str, Any], name: str) -> float:
    """Largest error of an activation over what is allowed. K = 1 and a weight of ones: the sum itself is exact.

    Further to the left torch's own formula of gelu_tanh cancels, even in fp64.
    """
    activation = Activation(name, _kernels.activations()[name])
    x = torch.linspace(-4, 8, 4001)[:, None]
    got = _run(row, x, torch.ones(32, 1), torch.zeros(32), activation)
    want = activations.apply(activation, x.double())
    ulp = torch.exp2(torch.frexp(want.abs().clamp_min(2.0**-126)).exponent - 24.0)
    return _largest((got - want).abs() / torch.maximum(_ULPS * ulp, _RELATIVE * want.abs()))


def _run(row: dict[str, Any], x: Tensor, weight: Tensor, bias: Tensor, *steps: Activation) -> Tensor:
    out = torch.full((len(x), len(weight)), torch.nan)
    packed = _kernels.Packed(weight, row["layout"])
    _kernels.run(packed, _kernels.Plan(row["name"], 1), _kernels.Epilogue(steps), x, bias, out)
    return out


def _largest(ratios: Tensor) -> float:
    return float("inf") if ratios.isnan().any() else float(ratios.max())


def _check_override() -> None:
    try:
        planner.override()
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
