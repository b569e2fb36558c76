"""profile: where a forward pass spends its time, layer by layer and around the layers, before and after `convert`."""

from __future__ import annotations

import math
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

import fastlinear._products as _products
import fastlinear._timing as _timing
from fastlinear.layer import linear
from fastlinear.model.arguments import call, check_example, check_module
from fastlinear.model.convert import stock_copy
from fastlinear.model.fusion import Absorbed
from fastlinear.model.running import Running, graphs_of, original, running
from fastlinear.model.selection import linear_layers
from fastlinear.model.table import pattern_of
from fastlinear.plan import measuring, roofline
from fastlinear.spec.formats import name_of

_LEAST_ROUNDS = 3
_OPERATIONS = 6  # of those around the layers are named

Times = dict[str, float]  # seconds by the name of the layer


@dataclass(frozen=True)
class LayerTime:
    """Seconds that one layer takes in a pass, its activation included. name: also of several that are one product in a
    group or a compiled graph. rows: of all its calls in the pass, 0 for unknown. stock: None where torch multiplies
    without calling a layer, as its attention does. limit: what the roofline leaves at least; None for unknown."""

    name: str
    in_features: int
    out_features: int
    rows: int
    stock: float | None
    fast: float
    limit: float | None


@dataclass(frozen=True)
class Profile:
    """Seconds of a pass, lower quartiles of several. stock, fast: of all of it; layers: one by one, slowest first; for
    what is left, `around_stock` and `around_fast`; operations: the largest of torch's own around the fast layers, with
    seconds."""

    stock: float
    fast: float
    layers: tuple[LayerTime, ...]
    operations: tuple[tuple[str, float], ...]
    rounds: int

    @property
    def around_stock(self) -> float | None:
        """None where the stock seconds of a layer are unknown."""
        known = [layer.stock for layer in self.layers if layer.stock is not None]
        return max(0.0, self.stock - sum(known)) if len(known) == len(self.layers) else None

    @property
    def around_fast(self) -> float:
        return max(0.0, self.fast - sum(layer.fast for layer in self.layers))

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "around_stock": self.around_stock, "around_fast": self.around_fast}

    def __str__(self) -> str:
        alike: dict[Any, list[LayerTime]] = {}
        for each in self.layers:
            shape = f"{each.in_features}x{each.out_features}"
            alike.setdefault((pattern_of(each.name), shape, each.rows, each.stock is None), []).append(each)
        names = {key: key[0] if len(several) > 1 else several[0].name for key, several in alike.items()}
        width = max(map(len, ["around the layers", *names.values()]))
        head = f"{'':<{width}} {'n':>3} {'in x out':>13} {'rows':>6}{_HEAD}"
        lines = [head, "-" * len(head)]
        for key, several in sorted(alike.items(), key=lambda each: -_sum([layer.fast for layer in each[1]])):
            sums = [_sum([getattr(each, field) for each in several]) for field in ("stock", "fast", "limit")]
            rows = key[2] or ""
            lines.append(f"{names[key]:<{width}} {len(several):>3} {key[1]:>13} {rows:>6}{_times(*sums)}")
        blank = " " * 25
        lines.append(f"{'around the layers':<{width}}{blank}{_times(self.around_stock, self.around_fast, None)}")
        lines.append(f"{'the whole pass':<{width}}{blank}{_times(self.stock, self.fast, None)}")
        wide = max((len(name) for name, _ in self.operations), default=0)
        lines += ["", "around the fast layers:"] if self.operations else []
        lines += [f"  {name:<{wide}} {1e6 * seconds:10.1f} us" for name, seconds in self.operations]
        told = "n layers alike are summed; fast ones include what is fused into them"
        return "\n".join([*lines, "", f"lower quartiles of {self.rounds} rounds; {told}"])


_HEAD = f" {'stock us':>10} {'fast us':>10} {'faster':>7} {'limit us':>9}"


def _sum(values: Sequence[float | None]) -> float:
    """NaN where one is None."""
    return math.fsum(math.nan if value is None else value for value in values)


def _times(stock: float | None, fast: float, limit: float | None) -> str:
    """Below _HEAD, in microseconds; what is unknown, None or NaN, is left out."""
    seconds = [math.nan if each is None else each for each in (stock, fast, limit)]
    before, after, least = ("" if math.isnan(each) else f"{1e6 * each:.1f}" for each in seconds)
    ratio = f"{seconds[0] / fast:.2f}x" if before and fast else ""
    return f" {before:>10} {after:>10} {ratio:>7} {least:>9}".rstrip()


def profile(model: nn.Module, inputs: Any, *, seconds: float = 2.0) -> Profile:
    """Run a converted or compiled model and a stock copy of it in turns, and tell where both spend their time.

    inputs: what to call the model with: a tensor, a tuple of arguments, or a mapping of keyword arguments.
    seconds: to spend, at least; three rounds are run in any case, after one that tunes.

    The copy shares all tensors, but the weights of frozen layers, which are unpacked meanwhile. Raises TypeError for
    arguments of a wrong kind and for a model that cannot be copied. Time it on an otherwise idle machine.
    """
    check_module("profile", model)
    check_example(inputs)
    whole = original(model)
    stock = stock_copy(whole)
    totals: dict[str, list[float]] = {"stock": [], "fast": []}
    of_layers: dict[str, list[Times]] = {"stock": [], "fast": []}
    rows: dict[str, int] = {}
    with torch.inference_mode():
        with measuring.process.thorough():
            call(model, inputs)
        runs = running(whole, graphs_of(whole))
        names, inner = {each.layer: each.name for each in runs}, [part for each in runs for part in each.parts]
        call(stock, inputs)
        began = time.perf_counter()
        while len(totals["fast"]) < _LEAST_ROUNDS or time.perf_counter() - began < seconds:
            for which, each, watch in (
                ("stock", stock, _hooked(stock, whole, inner, rows)),
                ("fast", model, _timed(names)),
            ):
                totals[which].append(_seconds(each, inputs))
                with watch as times:
                    call(each, inputs)
                of_layers[which].append(dict(times))
        operations = _operations(model, inputs)
    fast, before = (_quartiles(of_layers[which]) for which in ("fast", "stock"))
    working_set = sum(each.layer.pack_nbytes for each in runs if linear.is_fast(each.layer))  # read in every pass
    layers = [layer for each in runs if (layer := _layer(each, rows, before, fast, working_set)) is not None]
    layers.sort(key=lambda each: -each.fast)
    whole_pass = {which: _quartile(found) for which, found in totals.items()}
    return Profile(whole_pass["stock"], whole_pass["fast"], tuple(layers), operations, len(totals["fast"]))


def _seconds(model: nn.Module, inputs: Any) -> float:
    began = time.perf_counter()
    call(model, inputs)
    return time.perf_counter() - began


@contextmanager
def _timed(names: dict[nn.Module, str]) -> Iterator[Times]:
    """The seconds of each fast layer."""
    times: Times = defaultdict(float)

    def done(layer: Any, seconds: float) -> None:
        if layer in names:
            times[names[layer]] += seconds

    with ExitStack() as stack:
        for layer, name in names.items():
            if linear.is_fast(layer) and not type(layer)._is_quick:  # type: ignore[attr-defined]
                for hook in _hooks(name, times, {}):
                    stack.callback(hook(layer).remove)
        stack.callback(_timing.tell_times, None)
        _timing.tell_times(done)
        yield times


@contextmanager
def _hooked(stock: nn.Module, model: nn.Module, names: Iterable[str], rows: dict[str, int]) -> Iterator[Times]:
    """The seconds of each stock layer, with those of the activation that the fast one applies for it."""
    times: Times = defaultdict(float)
    modules = dict(stock.named_modules(remove_duplicate=False))
    watched = {name: [modules[name]] for name in names if name in modules}
    own = {layer: found[0] for layer, found in linear_layers(model).items()}
    for name, marker in model.named_modules():
        layer = own.get(marker.linear) if isinstance(marker, Absorbed) and marker.linear is not None else None
        if layer is not None and layer in watched and isinstance(modules.get(name), nn.Module):
            watched[layer].append(modules[name])
    with ExitStack() as stack:
        for name, several in watched.items():
            rows[name] = 0
            for i, module in enumerate(several):
                for hook in _hooks(name, times, rows if i == 0 else {}):
                    stack.callback(hook(module).remove)
        yield times
    for name in [name for name in rows if not rows[name]]:
        del rows[name]  # nobody called it


def _hooks(name: str, times: Times, rows: dict[str, int]) -> tuple[Callable[[nn.Module], Any], ...]:
    began: list[float] = []

    def before(_: nn.Module, arguments: tuple[Any, ...]) -> None:
        if name in rows and arguments and isinstance(arguments[0], Tensor):
            rows[name] += arguments[0].numel() // max(1, arguments[0].shape[-1])
        began.append(time.perf_counter())

    def after(*_: object) -> None:
        times[name] += time.perf_counter() - began.pop()

    return (lambda module: module.register_forward_pre_hook(before)), (
        lambda module: module.register_forward_hook(after)
    )


def _operations(model: nn.Module, inputs: Any) -> tuple[tuple[str, float], ...]:
    """The largest of torch's own operations in a pass, with the seconds that the profiler saw in each."""
    for _ in range(2):  # the first has what is made once
        with torch.autograd.profiler.profile(use_kineto=False) as profiler:
            call(model, inputs)
    own = [each for each in profiler.key_averages() if not each.key.startswith("fastlinear::")]
    largest = sorted(own, key=lambda each: -each.self_cpu_time_total)[:_OPERATIONS]
    return tuple((each.key, 1e-6 * each.self_cpu_time_total) for each in largest)


def _layer(run: Running, rows: dict[str, int], before: Times, after: Times, working_set: int) -> LayerTime | None:
    """None where nobody called it."""
    layer, called = run.layer, [part for part in run.parts if part in rows]
    stock = sum(before.get(part, 0.0) for part in called) if called and len(called) == len(run.parts) else None
    fast = after.get(run.name, stock)
    if fast is None:
        return None
    fields = ("in_features", "out_features") if hasattr(layer, "in_features") else ("nx", "nf")
    (k, n), m = (getattr(layer, field) for field in fields), rows[called[0]] if called else 0
    limit = None
    if linear.is_fast(layer) and layer._engine.packed is not None and m:
        packed = layer._engine.packed
        x = layer.plans[0].x if layer.plans else name_of(torch.float32)
        roof = roofline.measure(x, packed.format, _products.num_threads())
        limit = None if roof is None else roof.seconds(m, n, k, packed.nbytes, working_set)
    return LayerTime(run.name, k, n, m, stock, fast, limit)


def _quartile(values: list[float]) -> float:
    return sorted(values)[len(values) // 4]


def _quartiles(several: list[Times]) -> Times:
    return {name: _quartile([times.get(name, 0.0) for times in several]) for name in several[0]}
