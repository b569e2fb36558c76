"""What convert and the tuner decided, layer by layer, as data and as a plain table."""

from __future__ import annotations

import platform
import re
import textwrap
import weakref
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Protocol

from torch import nn

import fastlinear._kernels as _kernels
from fastlinear.layer import linear
from fastlinear.layer.frozen import record_of
from fastlinear.layer.quality import UNKNOWN, Quality, quality_of
from fastlinear.model.selection import linear_layers, why_skipped
from fastlinear.plan import measuring
from fastlinear.spec.activations import Activation

if TYPE_CHECKING:
    from fastlinear.plan.candidates import Plan

_HEADER = ("layer", "n", "in x out", "weight", "dB", "activation", "M", "x", "runs on", "speed-up", "MiB")
_SIDES = "<>><><><<>>"
_NOISE = _HEADER.index("dB")
_TAIL = _HEADER.index("runs on")  # over the columns from here on the reason for a skip may spread
_WIDTH, _TAIL_WIDTH = 120, 40
_SOURCES = {
    "tuned": "measured in this process",
    "cache": "from the tuning cache",
    "neighbor": "as for a batch size nearby",
    "heuristic": "by rule, not measured",
    "override": "fixed by FASTLINEAR_KERNEL",
}

_REASONS = {
    measuring.BUSY: "since others had the CPUs: a later call measures again, a few times, and tune() at once",
    measuring.ELSEWHERE: "since another thread was measuring: a later call asks again",
}

_FORMATS = {str(dtype).removeprefix("torch."): name for dtype, name in _kernels.FORMATS.items()}


@dataclass(frozen=True)
class LayerReport:
    """One linear layer, by its first name in the model."""

    name: str
    in_features: int
    out_features: int
    dtype: str  # of the parameter and, where it is another one, of its pack: "float32 as bfloat16"
    activation: Activation | None
    # "fast": a native kernel runs; "torch": torch's own was faster for every M so far; "elsewhere": all calls so far
    # went round the kernels; "untuned": there were none; "skipped"
    decision: str
    buckets: tuple[Plan, ...]  # what runs for each format of x and bucket of M so far, smallest first
    pack_mib: float  # what the packed weight takes: beyond the weight itself, or instead of it where `frozen`
    reason: str | None = None  # why it was skipped
    frozen: bool = False
    origin: str = ""  # where the pack of a frozen layer comes from, unless it was packed here
    quality: Quality = UNKNOWN  # of a quantized layer: signal to noise in dB
    elsewhere: Mapping[str, int] = field(default_factory=dict)  # calls that the kernels did not answer, by reason


@dataclass
class NodeReport:
    """One node of a graph that torch.compile made of the model.

    outcome: "fast": a product on packed weights; "fused": done by the node that `why` names; "dropped"; "torch":
    torch's own op. why: into what, or why not, in a few words; "" where nothing spoke for another outcome.
    """

    name: str
    op: str
    outcome: str = "torch"
    why: str = ""


class Graph(Protocol):
    """What the Dynamo backend has compiled. reason: why all of it is torch's own, None where it is not; layers: those
    it runs, each with the modules' weights that it is packed from."""

    nodes: tuple[NodeReport, ...]
    reason: str | None

    @property
    def layers(self) -> tuple[tuple[Any, tuple[Any, ...]], ...]: ...

    def is_of(self, model: nn.Module) -> bool: ...


graphs: weakref.WeakSet[Graph] = weakref.WeakSet()  # all that there are


class Report(tuple[LayerReport, ...]):
    """The linear layers of a model, in its order; str() is a table that gives layers alike but in number one row.

    graphs: what torch.compile(model, backend="fastlinear") made of it so far: `nodes` has a NodeReport of every node.
    """

    graphs: tuple[Graph, ...] = ()

    @property
    def pack_mib(self) -> float:
        """MiB of all packed weights together."""
        return sum(layer.pack_mib for layer in self)

    def __str__(self) -> str:
        alike: dict[Any, list[LayerReport]] = {}
        for layer in self:
            alike.setdefault(_likeness(layer), []).append(layer)
        rows = _aligned([_HEADER, *(row for layers in alike.values() for row in _rows(layers))])
        summary = (part for line in self._summary() for part in textwrap.wrap(line, _WIDTH))
        told = (line for graph in self.graphs for line in ("", *_of_graph(graph)))
        return "\n".join((rows[0], "-" * max(map(len, rows)), *rows[1:], "", *summary, *told))

    def _summary(self) -> Iterator[str]:
        decisions = Counter(layer.decision for layer in self)
        sources = Counter(plan.source for layer in self for plan in layer.buckets)
        info = _kernels.cpu_info()
        yield f"layers: {', '.join(f'{n} {decision}' for decision, n in decisions.items()) or 'no linear ones'}"
        yield f"plans: {', '.join(f'{n} {_SOURCES[source]}' for source, n in sources.items()) or 'none yet'}"
        waiting = Counter(plan.provisional for layer in self for plan in layer.buckets if plan.provisional)
        for reason, n in waiting.items():
            yield f"provisional, marked ?: {n} of these, {_REASONS[reason]}"
        instead = sum(layer.pack_mib for layer in self if layer.frozen)
        yield f"extra memory: {self.pack_mib - instead:.1f} MiB of packed weights"
        if any(layer.quality != UNKNOWN for layer in self):
            yield "dB: signal to noise of the quantized weight / of the output on inputs of the calibration"
        if frozen := [layer for layer in self if layer.frozen]:
            origins = Counter(layer.origin for layer in frozen if layer.origin)
            notes = "".join(f"; {n} {origin}" for origin, n in origins.items())
            yield f"frozen: {len(frozen)} layers, {instead:.1f} MiB of packed weights instead of parameters{notes}"
        yield f"CPU: {info['model'] or platform.machine()}, {' '.join(info['isas'])}, {_kernels.num_threads()} threads"


def report(model: nn.Module) -> Report:
    """What became of each linear layer of `model`: kernel and speed-up for each batch size met so far, memory, or why
    it was skipped; and, where it was compiled with backend="fastlinear", of each node of its graphs. Raises TypeError
    for anything but an nn.Module."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"report() takes an nn.Module, but was given {type(model).__name__}")
    compiled = getattr(model, "_orig_mod", None)  # in what torch.compile returns
    model = model if compiled is None else compiled
    otherwise = "convert was not called on it" if compiled is None else "no compiled graph runs it fast"
    own = [graph for graph in graphs if graph.is_of(model)]
    placed = {id(weight): each for graph in own for each in graph.layers for weight in each[1]}
    rows: dict[Any, LayerReport] = {}
    for layer, names in linear_layers(model).items():
        running, weights = placed.get(id(_held(layer)), (layer, ()))
        if running not in rows:
            name = names[0] if len(weights) < 2 else running._name
            described = _describe(name, running, otherwise)
            rows[running] = replace(described, frozen=False) if len(weights) > 1 else described
    found = Report(rows.values())
    found.graphs = tuple(own)
    return found


def _held(layer: Any) -> Any:
    """What a graph knows a layer by: its weight, or its panels."""
    frozen = record_of(layer)
    return layer._parameters.get("weight") if frozen is None else frozen.panels


def _of_graph(graph: Graph) -> Iterator[str]:
    outcomes = Counter(node.outcome for node in graph.nodes)
    yield f"graph of {len(graph.nodes)} nodes: {', '.join(f'{n} {outcome}' for outcome, n in outcomes.items())}"
    if graph.reason is not None:
        yield f"  as it was: {graph.reason}"
        return
    plain = Counter(node.op for node in graph.nodes if not node.why)
    told = Counter((node.op, node.outcome, re.sub(r"\d+", "*", node.why)) for node in graph.nodes if node.why)
    for (op, outcome, why), n in told.items():
        yield from textwrap.wrap(f"  {n} {op}: {outcome}, {why}", _WIDTH, subsequent_indent="      ")
    listed = ", ".join(f"{n} {op}" for op, n in plain.items())
    yield from textwrap.wrap(f"  torch's own: {listed or 'nothing'}", _WIDTH, subsequent_indent="      ")


def _describe(name: str, layer: Any, otherwise: str) -> LayerReport:
    """otherwise: why it is not fast, if nothing else is."""
    fast = linear.is_fast(layer)
    buckets, frozen = layer.plans if fast else (), record_of(layer)
    elsewhere = dict(vars(layer)["_elsewhere"]) if fast else {}
    features = ("in_features", "out_features") if hasattr(layer, "in_features") else ("nx", "nf")  # Conv1D
    return LayerReport(
        name=name,
        in_features=getattr(layer, features[0]),
        out_features=getattr(layer, features[1]),
        dtype=layer.dtypes if fast else str(layer.weight.dtype).removeprefix("torch."),
        activation=layer.activation if fast else None,
        decision=_decision(buckets, elsewhere) if fast else "skipped",
        buckets=buckets,
        pack_mib=layer.pack_nbytes / 2**20 if fast else 0.0,
        reason=None if fast else why_skipped(layer) or otherwise,
        frozen=frozen is not None,
        origin="" if frozen is None else frozen.origin,
        quality=quality_of(layer) if fast else UNKNOWN,
        elsewhere=elsewhere,
    )


def _decision(buckets: tuple[Plan, ...], elsewhere: Mapping[str, int]) -> str:
    if not buckets:
        return "elsewhere" if elsewhere else "untuned"
    return "torch" if all(plan.name.startswith("torch/") for plan in buckets) else "fast"


def _likeness(layer: LayerReport) -> tuple[Any, ...]:
    """Equal for layers that share a row: those of repeated blocks."""
    runs = tuple((c.x, c.bucket, c.name, c.speedup, c.refused, c.provisional) for c in layer.buckets)
    shape = (layer.in_features, layer.out_features, layer.dtype, layer.frozen)
    known = layer.quality == UNKNOWN
    return _pattern(layer), shape, layer.activation, layer.decision, runs, layer.reason, known, (*layer.elsewhere,)


def _pattern(layer: LayerReport) -> str:
    return re.sub(r"(?<![^.])\d+(?![^.])", "*", layer.name)


def _rows(layers: list[LayerReport]) -> Iterator[tuple[str, ...]]:
    """The rows of layers alike: one for each x and M, or why they were skipped, on several rows if need be."""
    first = layers[0]
    name = (first.name if len(layers) == 1 else _pattern(first)) or "(the model)"
    dtype = " ".join(_FORMATS.get(word, word) for word in (*first.dtype.split(), *["frozen"] * first.frozen))
    shape, noise = f"{first.in_features}x{first.out_features}", _worst(layers)
    head: tuple[str, ...] = (name, str(len(layers)), shape, dtype, noise, _text(first.activation))
    mib = f"{sum(layer.pack_mib for layer in layers):.2f}"
    for plan in first.buckets:
        speedup = "" if plan.speedup is None else f"{plan.speedup:.2f}x"
        name = f"{plan.name}?" if plan.provisional else plan.name
        yield (*head, str(plan.bucket), plan.x, name, speedup, mib)
        head, mib = ("",) * len(head), ""
        if plan.refused:
            yield (*head, "", "", f"({plan.refused} refused)", "", "")
    for outcome in _outcomes(layers):
        for line in textwrap.wrap(outcome, _TAIL_WIDTH):
            yield (*head, "", "", line)
            head = ("",) * len(head)


def _outcomes(layers: list[LayerReport]) -> Iterator[str]:
    """What is to be said of layers alike beside their plans."""
    first, counts = layers[0], sum((Counter(layer.elsewhere) for layer in layers), Counter())
    if first.reason:
        yield f"skipped: {first.reason}"
    elif first.decision == "untuned":
        yield first.decision
    for reason, count in counts.items():
        yield f"{count} call{'s' * (count != 1)} elsewhere: {reason}"


def _worst(layers: list[LayerReport]) -> str:
    """Least signal to noise of weights and of outputs among layers."""
    every = zip(*(layer.quality for layer in layers), strict=True)
    return "/".join(f"{min(known):.0f}" for values in every if (known := [v for v in values if v is not None]))


def _aligned(rows: list[tuple[str, ...]]) -> list[str]:
    """Columns as wide as their contents, but that of the names, which has what is left."""
    hidden = set() if any(row[_NOISE] for row in rows[1:]) else {_NOISE}
    rows, sides = [_without(row, hidden) for row in rows], _without(_SIDES, hidden)
    columns, first = len(sides), _TAIL - len(hidden)  # of the tail
    whole = [row for row in rows if len(row) == columns]
    widths = [max(len(row[i]) for row in (rows if i < first else whole)) for i in range(columns)]
    tail = max(_TAIL_WIDTH, len(" ".join("-" * width for width in widths[first:])))
    widths[0] = min(widths[0], _WIDTH - sum(widths[1:first]) - first - tail)
    names = [row[0] if len(row[0]) <= widths[0] else "..." + row[0][3 - widths[0] :] for row in rows]
    lines = [zip((name, *row[1:]), sides, widths, strict=False) for name, row in zip(names, rows, strict=True)]
    return [" ".join(f"{cell:{side}{width}}" for cell, side, width in line).rstrip() for line in lines]


def _without(cells: Sequence[str], hidden: set[int]) -> tuple[str, ...]:
    return tuple(cell for i, cell in enumerate(cells) if i not in hidden)


def _text(activation: Activation | None) -> str:
    if activation is None:
        return ""
    params = ", ".join(f"{param:g}" for param in activation.params)
    return f"{activation.name}({params})"[:16] if params else activation.name
