"""profile: where a forward pass spends its time, layer by layer and around the layers, before and after `convert`."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

import fastlinear._engine as _engine
import fastlinear._products as _products
from fastlinear.layer import linear
from fastlinear.model.convert import stock_copy
from fastlinear.model.fusion import Absorbed
from fastlinear.model.selection import linear_layers
from fastlinear.model.tuning import call, check_example, check_module, fast_layers
from fastlinear.plan import measuring, roofline
from fastlinear.spec.formats import name_of

_LEAST_ROUNDS = 3
_OPERATIONS = 6  # of those around the layers are named

Times = dict[str, float]  # seconds by the name of the layer


@dataclass(frozen=True)
class LayerTime:
    """Seconds that one layer takes in a pass, its activation included. limit: what the roofline leaves at least; None
    where it is not known. rows: of all its calls in the pass."""

    name: str
    in_features: int
    out_features: int
    rows: int
    stock: float
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
    def around_stock(self) -> float:
        return max(0.0, self.stock - sum(layer.stock for layer in self.layers))

    @property
    def around_fast(self) -> float:
        return max(0.0, self.fast - sum(layer.fast for layer in self.layers))

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "around_stock": self.around_stock, "around_fast": self.around_fast}

    def __str__(self) -> str:
        width = max([len("around the layers"), *(len(layer.name) for layer in self.layers)])
        head = (
            f"{'':<{width}} {'in x out':>13} {'rows':>6} {'stock us':>10} {'fast us':>10} {'faster':>7} {'limit us':>9}"
        )
        lines = [head, "-" * len(head)]
        for each in self.layers:
            limit = "" if each.limit is None else f"{1e6 * each.limit:.1f}"
            shape = f"{each.in_features}x{each.out_features}"
            lines.append(f"{each.name:<{width}} {shape:>13} {each.rows:>6}{_pair(each.stock, each.fast)} {limit:>9}")
        blank = f"{'':>13} {'':>6}"
        lines.append(f"{'around the layers':<{width}} {blank}{_pair(self.around_stock, self.around_fast)}")
        lines.append(f"{'the whole pass':<{width}} {blank}{_pair(self.stock, self.fast)}")
        lines += ["", "around the fast layers:"] if self.operations else []
        lines += [f"  {name:<40} {1e6 * seconds:10.1f} us" for name, seconds in self.operations]
        return "\n".join([*lines, "", f"lower quartiles of {self.rounds} rounds; fast layers include their activation"])


def _pair(stock: float, fast: float) -> str:
    return f" {1e6 * stock:>10.1f} {1e6 * fast:>10.1f} {(f'{stock / fast:.2f}x' if fast else ''):>7}"


def profile(model: nn.Module, inputs: Any, *, seconds: float = 2.0) -> Profile:
    """Run a converted model and a stock copy in turns, and tell where both spend their time.

    inputs: what to call the model with: a tensor, a tuple of arguments, or a mapping of keyword arguments.
    seconds: to spend, at least; three rounds are run in any case, after one that tunes.

    The copy shares all tensors, but the weights of frozen layers, which are unpacked meanwhile. Raises TypeError for
    arguments of a wrong kind and for a model that cannot be copied. Time it on an otherwise idle machine.
    """
    check_module("profile", model)
    check_example(inputs)
    stock = stock_copy(model)
    names = {layer: found[0] for layer, found in linear_layers(model).items()}
    totals: dict[str, list[float]] = {"stock": [], "fast": []}
    of_layers: dict[str, list[Times]] = {"stock": [], "fast": []}
    rows: dict[str, int] = {}
    with torch.inference_mode():
        with measuring.process.thorough():
            call(model, inputs)
        call(stock, inputs)
        began = time.perf_counter()
        while len(totals["fast"]) < _LEAST_ROUNDS or time.perf_counter() - began < seconds:
            for which, each, watch in (
                ("stock", stock, _hooked(stock, model, names, rows)),
                ("fast", model, _timed(names)),
            ):
                totals[which].append(_seconds(each, inputs))
                with watch as times:
                    call(each, inputs)
                of_layers[which].append(dict(times))
        operations = _operations(model, inputs)
    fast, before = (_quartiles(of_layers[which]) for which in ("fast", "stock"))
    working_set = sum(layer.pack_nbytes for layer in fast_layers(model))  # read in every pass
    layers = [
        _layer(layer, name, rows[name], before.get(name, 0.0), fast.get(name, before.get(name, 0.0)), working_set)
        for layer, name in names.items()
        if name in rows
    ]
    layers.sort(key=lambda each: -each.fast)
    whole = {which: _quartile(found) for which, found in totals.items()}
    return Profile(whole["stock"], whole["fast"], tuple(layers), operations, len(totals["fast"]))


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
        stack.callback(_engine.tell_times, None)
        _engine.tell_times(done)
        yield times


@contextmanager
def _hooked(stock: nn.Module, model: nn.Module, names: dict[nn.Module, str], rows: dict[str, int]) -> Iterator[Times]:
    """The seconds of each stock layer, with those of the activation that the fast one applies for it."""
    times: Times = defaultdict(float)
    modules = dict(stock.named_modules(remove_duplicate=False))
    watched = {name: [modules[name]] for name in names.values() if name in modules}
    for name, marker in model.named_modules():
        layer = marker.linear if isinstance(marker, Absorbed) else None
        if layer in names and isinstance(modules.get(name), nn.Module):
            watched[names[layer]].append(modules[name])
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


def _layer(layer: Any, name: str, rows: int, stock: float, fast: float, working_set: int) -> LayerTime:
    k, n = (
        getattr(layer, f) for f in (("in_features", "out_features") if hasattr(layer, "in_features") else ("nx", "nf"))
    )
    limit = None
    if linear.is_fast(layer) and layer._engine.packed is not None:
        packed = layer._engine.packed
        x = layer.plans[0].x if layer.plans else name_of(torch.float32)
        roof = roofline.measure(x, packed.format, _products.num_threads())
        limit = None if roof is None else roof.seconds(rows, n, k, packed.nbytes, working_set)
    return LayerTime(name, k, n, rows, stock, fast, limit)


def _quartile(values: list[float]) -> float:
    return sorted(values)[len(values) // 4]


def _quartiles(several: list[Times]) -> Times:
    return {name: _quartile([times.get(name, 0.0) for times in several]) for name in several[0]}
