"""`fastlinear bench`: FastLinear against nn.Linear and the activation, and both against what the machine can do."""

from __future__ import annotations

import argparse
import functools
import json
import logging
import os
import platform
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from importlib import metadata
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

import fastlinear._kernels as _kernels
import fastlinear._products as _products
import fastlinear._tensors as _tensors
from fastlinear.cli import limits, plotting, tables
from fastlinear.cli.ceiling import Ceiling, Ceilings
from fastlinear.cli.loading import shapes_of
from fastlinear.cli.options import DTYPES, SCHEMES, UsageError, check_files, check_override
from fastlinear.layer import linear
from fastlinear.plan import measuring, rivals
from fastlinear.plan.table import runnable
from fastlinear.plan.waits import Waits
from fastlinear.spec import activations
from fastlinear.spec.activations import Activation
from fastlinear.spec.schemes import Scheme

_SECONDS, _PATIENCE = 0.3, 0.9  # a shape, and more of them while others disturb
_ROUNDS = 5  # at least
_TRIES = 3  # of the ceilings, while others disturb
_SAMPLE = 200e-6  # of calls between two looks at the clock
_MOST_OTHER = 512 << 20  # bytes that are read to make weights cold
_STOLEN = 0.05  # of a round, in which threads waited for CPUs that others had: its times do not count
_RIVALS = {"torch": rivals.BASELINE, "mkl": "torch/mkl", "onednn": "torch/mkldnn", "inductor": ""}

_HEAD = ("M x K x N", "threads", "nn.Linear", "FastLinear", "speed-up", "GFLOP/s", "GB/s", "roofline")
_NOTES = {
    "!": f"others had the CPUs for more than {_STOLEN:.0%} of the time: measure again when they have gone",
    "?": "the tuner could not tell which kernel is fastest, for the same reason: a rule chose it",
}

_log = logging.getLogger("fastlinear")


class Result(NamedTuple):
    """One shape on so many threads: microseconds of a whole call of nn.Linear and of FastLinear, what ran, the ceilings
    of the same seconds, and the share of them, or of what measuring the ceilings took, in which threads waited."""

    m: int
    k: int
    n: int
    threads: int
    torch_us: float
    us: float
    runs_on: str
    ceiling: Ceiling
    against: dict[str, float | None]  # microseconds of each rival, None where it cannot do it
    waited: float
    provisional: bool  # what runs was chosen by a rule, since the tuner could not measure

    @property
    def notes(self) -> set[str]:
        """Signs behind the row, which _NOTES explains."""
        return set("!" * (self.waited > _STOLEN) + "?" * self.provisional)

    def record(self) -> dict[str, Any]:
        """For --json."""
        seconds = self.us / 1e6
        return {
            **{name: getattr(self, name) for name in ("m", "k", "n", "threads", "torch_us", "us", "runs_on")},
            "against_us": self.against,
            "waited": self.waited,
            "provisional": self.provisional,
            "speedup": self.torch_us / self.us,
            "gflops": 2e-9 * self.m * self.n * self.k / seconds,
            "read_gbs": 1e-9 * self.ceiling.nbytes / seconds,
            **self.ceiling.record(seconds),
        }


def bench(options: argparse.Namespace) -> int:
    """Prints the times of FastLinear and of nn.Linear followed by the activation, and the share of the roofline."""
    check_override()
    check_files(json=options.json, plot=options.plot)
    if options.plot:
        plotting.check(options.plot)
    activation = None if options.activation == "none" else activations.resolve(options.activation)
    scheme, results = SCHEMES.get(options.quantize), []
    shapes = shapes_of(options.like) if options.like else options.shapes
    _check_memory(shapes, DTYPES[options.dtype].itemsize)
    form = f"{options.dtype} as {options.quantize}" if scheme else options.dtype
    packed = scheme.packed if scheme else _tensors.FORMATS[DTYPES[options.dtype]]
    ceilings = Ceilings(packed, options.isa, scheme, options.cold)
    counts = options.threads or [_products.num_threads()]
    threads = ", ".join(map(str, counts))
    print(f"{_kernels.cpu_info()['model']}, {threads} thread(s), {form}, activation {options.activation}")
    state = "from memory" if options.cold else "warm"
    print(f"Microseconds of a whole call, weights {state}. Roofline: {ceilings.says()}\n")
    head = [*_HEAD, *["calculated"] * ceilings.tiles, *options.against, "runs on"]
    todo = [(count, shape) for count in counts for shape in shapes]
    interrupted, notes = False, set()
    widths = [max(len("x".join(map(str, shape))) for shape in shapes), *[8] * (len(head) - 2), 24]
    with tables.growing(head, widths, f"<{'>' * (len(head) - 2)}<") as table:
        try:
            for done, (count, (m, k, n)) in enumerate(todo):
                table.progress(f"{m}x{k}x{n}, {done + 1} of {len(todo)}")
                torch.set_num_threads(count)
                result = _measure(m, k, n, DTYPES[options.dtype], scheme, activation, ceilings, options)
                results.append(result.record())
                table.progress("")
                table.add(_cells(result))
                notes |= result.notes
        except KeyboardInterrupt:
            table.progress("")
            interrupted = True
    if interrupted:
        print(f"interrupted: {len(results)} of {len(todo)} are done")
    print(*(f"{note} {_NOTES[note]}" for note in sorted(notes)), sep="\n", end="\n" * bool(notes))
    if options.json:
        _write(options, results)
    if options.plot:
        plotting.draw(options.plot, results)
    return 130 if interrupted else 0


def _check_memory(shapes: Iterable[tuple[int, ...]], itemsize: int) -> None:
    """UsageError for a shape that this process has no memory for: weight, pack, x and y."""
    machine = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    most = min(machine, limits.memory_limit() or machine)
    for m, k, n in shapes:
        if (needed := itemsize * (2 * n * k + m * (k + n))) > most:
            raise UsageError(f"{m}x{k}x{n} takes {needed / 2**30:,.0f} GiB, and there are {most / 2**30:,.0f}")


def _measure(
    m: int,
    k: int,
    n: int,
    dtype: torch.dtype,
    scheme: Scheme | None,
    activation: Activation | None,
    ceilings: Ceilings,
    options: argparse.Namespace,
) -> Result:
    stock, x = nn.Linear(k, n, dtype=dtype, device="cpu").eval(), torch.randn(m, k, dtype=dtype, device="cpu")
    calls: list[Callable[[Tensor], object]] = [functools.partial(_stock, stock, activation)]
    names, provisional = ["nn.Linear"], [False]
    with torch.inference_mode():
        for kernel in [""] if ceilings.isa is None else ceilings.kernels():
            fast = linear.FastLinear.from_linear(stock, activation, quantize=scheme).eval()
            with _only(kernel), measuring.process.thorough():
                fast(x)
            calls.append(fast)
            names.append(" ".join(plan.name for plan in fast.plans) or "torch/linear")
            provisional.append(any(plan.provisional for plan in fast.plans))
        native = len(calls)
        others = {name: _rival(name, stock, activation, x) for name in options.against}
        calls += [call for call in others.values() if call is not None]
        with Waits(_products.pool_threads()) as waiting:
            ceiling, disturbed = _undisturbed(functools.partial(ceilings.measure, m, k, n, x.itemsize), waiting)
            times, waited = _alternate(calls, x, waiting, _evict if options.cold else None)
    best = min(range(1, native), key=times.__getitem__)
    left = iter(times[native:])
    against = {name: None if call is None else next(left) for name, call in others.items()}
    return Result(
        m, k, n, torch.get_num_threads(), times[0], times[best], names[best], ceiling, against, max(waited, disturbed),
        provisional[best],
    )  # fmt: skip


def _undisturbed(measure: Callable[[], Ceiling], waiting: Callable[[], float]) -> tuple[Ceiling, float]:
    """What was measured, and the share of the time in which threads waited: of the first of some tries that nobody
    disturbed, or of the one that was least."""
    tries: list[tuple[float, Ceiling]] = []
    while len(tries) < _TRIES and not (tries and tries[-1][0] <= _STOLEN):
        began, before, ceiling = time.perf_counter(), waiting(), measure()
        tries.append((_waited(began, before, waiting), ceiling))
    waited, ceiling = min(tries, key=lambda each: each[0])
    return ceiling, waited


def _rival(name: str, stock: nn.Linear, activation: Activation | None, x: Tensor) -> Callable[[Tensor], object] | None:
    """A call of another way to compute the same; None where that refuses the dtype or the shape."""
    try:
        if name == "inductor":
            module = nn.Sequential(stock) if activation is None else _Activated(stock, activation)
            call = torch.compile(module.eval(), options={"max_autotune": True, "freezing": True})
            call(x)
            return call
        run = rivals.make(_RIVALS[name], stock.weight, False, activation, {}).run
        rival = functools.partial(_run_rival, run, stock)
        rival(x)
        return rival
    except Exception as error:  # whatever a compiler raises where there is none
        _log.debug("%s is left out: %s", name, error)
        return None


class _Activated(nn.Module):
    def __init__(self, linear: nn.Linear, activation: Activation) -> None:
        super().__init__()
        self.linear, self._activation = linear, activation

    def forward(self, x: Tensor) -> Tensor:
        return activations.apply(self._activation, self.linear(x))


def _run_rival(run: Callable[..., Tensor], stock: nn.Linear, x: Tensor) -> Tensor:
    return run(x, stock.weight, stock.bias)


def rivals_of(text: str) -> list[str]:
    """Names of ways to compare with."""
    names = text.split(",")
    for name in names:
        if name not in _RIVALS:
            raise argparse.ArgumentTypeError(f"{name!r} is none of {', '.join(_RIVALS)}")
    return names


def _evict() -> None:
    """Takes everything out of the caches, by reading more than they hold."""
    torch.sum(_other_data())


@functools.cache
def _other_data() -> Tensor:
    info = _kernels.cpu_info()
    nbytes = min(2 * max(info["l3"], info["l2"], 1 << 24), _MOST_OTHER)
    return torch.ones(nbytes // 4, device="cpu")


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


def _cells(result: Result) -> list[str]:
    record = result.record()
    shape, times = f"{result.m}x{result.k}x{result.n}", [f"{us:.1f}" for us in (result.torch_us, result.us)]
    rates = [f"{record['speedup']:.2f}x", f"{record['gflops']:.1f}", f"{record['read_gbs']:.1f}"]
    shares = [f"{record[name]:.0%}" for name in ("roofline", "calculated") if name in record]
    others = ["-" if us is None else f"{us:.1f}" for us in result.against.values()]
    runs_on = " ".join([result.runs_on, *sorted(result.notes)])
    return [shape, str(result.threads), *times, *rates, *shares, *others, runs_on]


def _write(options: argparse.Namespace, results: list[dict[str, Any]]) -> None:
    about = {"cpu": _kernels.cpu_info(), "torch": torch.__version__, "dtype": options.dtype}
    about |= {"quantize": options.quantize, "isa": options.isa, "activation": options.activation}
    versions = {"fastlinear": metadata.version("fastlinear"), "python": platform.python_version()}
    about |= {"date": time.strftime("%Y-%m-%d"), "versions": {**versions, "torch": torch.__version__}}
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


class _Round(NamedTuple):
    """Seconds of each call in one turn of all, and the share of the turn in which threads waited for a CPU."""

    times: list[float]
    waited: float


def _alternate(
    calls: Sequence[Callable[[Any], object]],
    x: Tensor,
    waiting: Callable[[], float],
    evict: Callable[[], object] | None = None,
) -> tuple[list[float], float]:
    """Microseconds of each call, the lower quartile of rounds in which all take turns, and the share of the time in
    which threads waited: of rounds that nobody disturbed, where patience finds some. evict: what makes a call cold."""
    counts = [max(1, int(_SAMPLE / min(_seconds(call, x, 1) for _ in range(3)))) for call in calls]
    rounds: list[_Round] = []
    fair: list[_Round] = []
    stop = time.perf_counter() + _SECONDS
    while (
        (now := time.perf_counter()) < stop or len(rounds) < _ROUNDS or (len(fair) < _ROUNDS and now < stop + _PATIENCE)
    ):
        rounds.append(_round(calls, counts, x, waiting, evict))
        if rounds[-1].waited <= _STOLEN:
            fair.append(rounds[-1])
    used = fair if len(fair) >= _ROUNDS else rounds
    times = [1e6 * sorted(of_call)[len(used) // 4] for of_call in zip(*(each.times for each in used), strict=True)]
    return times, statistics.mean(each.waited for each in used)


def _round(
    calls: Sequence[Callable[[Any], object]],
    counts: Sequence[int],
    x: Tensor,
    waiting: Callable[[], float],
    evict: Callable[[], object] | None,
) -> _Round:
    began, before, times = time.perf_counter(), waiting(), []
    for call, count in zip(calls, counts, strict=True):
        if evict is None:
            _seconds(call, x, 1)  # what the other one left in the caches is not what a warm call starts from
            times.append(_seconds(call, x, count))
        else:
            evict()
            times.append(_seconds(call, x, 1))
    return _Round(times, _waited(began, before, waiting))


def _waited(began: float, before: float, waiting: Callable[[], float]) -> float:
    """The share of the time since then in which threads waited for a CPU."""
    return (waiting() - before) / (time.perf_counter() - began) / torch.get_num_threads()


def _seconds(call: Callable[[Any], object], x: Tensor, count: int) -> float:
    start = time.perf_counter()
    for _ in range(count):
        call(x)
    return (time.perf_counter() - start) / count
