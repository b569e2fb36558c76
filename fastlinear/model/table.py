"""A report as a plain table, in which layers alike but in number share a row."""

from __future__ import annotations

import re
import textwrap
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import fastlinear._tensors as _tensors
from fastlinear.layer.quality import UNKNOWN
from fastlinear.model.rows import Graph, LayerReport
from fastlinear.plan.candidates import Chosen
from fastlinear.spec.activations import Activation
from fastlinear.spec.programs import steps_of

_HEADER = ("layer", "n", "in x out", "weight", "dB", "activation", "M", "x", "runs on", "speed-up", "roof", "MiB")
_SIDES = "<>><><><<<>>"
_NOISE, _ROOF = _HEADER.index("dB"), _HEADER.index("roof")  # left out where they are empty
_TAIL = _HEADER.index("runs on")  # over the columns from here on the reason for a skip may spread
WIDTH, _TAIL_WIDTH = 120, 40

_FORMATS = {str(dtype).removeprefix("torch."): name for dtype, name in _tensors.FORMATS.items()}


Parts = tuple[list[str], list[tuple[str, ...]], list[str]]


def parts_of(layers: Sequence[LayerReport], share: str, summary: Iterable[str], graphs: Iterable[Graph]) -> Parts:
    """The lines above the table, its rows, of which the first is the head, and the lines below."""
    alike: dict[Any, list[LayerReport]] = {}
    for layer in layers:
        alike.setdefault(_likeness(layer), []).append(layer)
    below = [part for line in summary for part in textwrap.wrap(line, WIDTH)]
    told = [line for graph in graphs for line in ("", *_of_graph(graph))]
    above = [*textwrap.wrap(share, WIDTH), ""] if share else []
    rows = [_HEADER, *(row for layers in alike.values() for row in _rows(layers))]
    return above, _with_contents(rows), ["", *below, *told]


def sides_of(head: Sequence[str]) -> str:
    """ "<" or ">" for each column: where its cells keep to."""
    return "".join(_SIDES[_HEADER.index(name)] for name in head)


def text_of(parts: Parts) -> str:
    above, rows, below = parts
    lines = _aligned(rows)
    return "\n".join((*above, lines[0], "-" * max(map(len, lines)), *lines[1:], *below))


def _of_graph(graph: Graph) -> Iterator[str]:
    outcomes = Counter(node.outcome for node in graph.nodes)
    yield f"graph of {len(graph.nodes)} nodes: {', '.join(f'{n} {outcome}' for outcome, n in outcomes.items())}"
    if graph.reason is not None:
        yield f"  as it was: {graph.reason}"
        return
    plain = Counter(node.op for node in graph.nodes if not node.why)
    told = Counter((node.op, node.outcome, re.sub(r"\d+", "*", node.why)) for node in graph.nodes if node.why)
    for (op, outcome, why), n in told.items():
        yield from textwrap.wrap(f"  {n} {op}: {outcome}, {why}", WIDTH, subsequent_indent="      ")
    listed = ", ".join(f"{n} {op}" for op, n in plain.items())
    yield from textwrap.wrap(f"  torch's own: {listed or 'nothing'}", WIDTH, subsequent_indent="      ")


def _likeness(layer: LayerReport) -> tuple[Any, ...]:
    """Equal for layers that share a row: those of repeated blocks."""
    runs = tuple((c.x, c.bucket, c.name, c.speedup, c.refused, c.provisional) for c in layer.buckets)
    shape = (layer.shape, layer.dtype, layer.frozen)
    known = layer.quality == UNKNOWN
    return (
        pattern_of(layer.name),
        shape,
        layer.activation,
        layer.decision,
        runs,
        layer.reason,
        known,
        (*layer.elsewhere,),
        layer.notes,
    )


def pattern_of(name: str) -> str:
    """The name with * for numbers, which tell layers alike apart."""
    return re.sub(r"(?<![^.])\d+(?![^.])", "*", name)


def _rows(layers: list[LayerReport]) -> Iterator[tuple[str, ...]]:
    """The rows of layers alike: one for each x and M, or why they were skipped, on several rows if need be."""
    first = layers[0]
    name = (first.name if len(layers) == 1 else pattern_of(first.name)) or "(the model)"
    dtype = " ".join(_FORMATS.get(word, word) for word in (*first.dtype.split(), *["frozen"] * first.frozen))
    shape, noise = first.shape, _worst(layers)
    head: tuple[str, ...] = (name, str(len(layers)), shape, dtype, noise, _text(first.activation))
    mib = f"{sum(layer.pack_mib for layer in layers):.2f}"
    for plan, spot in zip(first.buckets, first.roofline or [None] * len(first.buckets), strict=True):
        name = f"{plan.name}?" if plan.provisional else plan.name
        yield (*head, str(plan.bucket), plan.x, name, _speedup(plan), "" if spot is None else f"{spot.share:.0%}", mib)
        head, mib = ("",) * len(head), ""
        if plan.refused:
            yield (*head, "", "", f"({plan.refused} refused)", "", "", "")
    for outcome in _outcomes(layers):
        for line in textwrap.wrap(outcome, _TAIL_WIDTH):
            yield (*head, "", "", line)
            head = ("",) * len(head)


def _speedup(plan: Chosen) -> str:
    if plan.speedup is None:
        return ""
    return f"{plan.speedup:.2f}x" + (f" +-{plan.spread:.0%}" if plan.spread else "")


def _outcomes(layers: list[LayerReport]) -> Iterator[str]:
    """What is to be said of layers alike beside their plans."""
    first, counts = layers[0], sum((Counter(layer.elsewhere) for layer in layers), Counter())
    if first.reason:
        yield f"skipped: {first.reason}"
    elif first.decision == "untuned":
        yield first.decision
    yield from first.notes
    for reason, count in counts.items():
        yield f"{count} call{'s' * (count != 1)} elsewhere: {reason}"


def _worst(layers: list[LayerReport]) -> str:
    """Least signal to noise of weights and of outputs among layers."""
    every = zip(*(layer.quality for layer in layers), strict=True)
    return "/".join(f"{min(known):.0f}" for values in every if (known := [v for v in values if v is not None]))


def _aligned(rows: list[tuple[str, ...]]) -> list[str]:
    """Columns as wide as their contents, but that of the names, which has what is left."""
    sides = sides_of(rows[0])
    columns, first = len(sides), rows[0].index(_HEADER[_TAIL])
    whole = [row for row in rows if len(row) == columns]
    widths = [max(len(row[i]) for row in (rows if i < first else whole)) for i in range(columns)]
    tail = max(_TAIL_WIDTH, len(" ".join("-" * width for width in widths[first:])))
    widths[0] = min(widths[0], WIDTH - sum(widths[1:first]) - first - tail)
    names = [row[0] if len(row[0]) <= widths[0] else "..." + row[0][3 - widths[0] :] for row in rows]
    lines = [zip((name, *row[1:]), sides, widths, strict=False) for name, row in zip(names, rows, strict=True)]
    return [" ".join(f"{cell:{side}{width}}" for cell, side, width in line).rstrip() for line in lines]


def _with_contents(rows: list[tuple[str, ...]]) -> list[tuple[str, ...]]:
    """Without the columns that may be empty, and are."""
    hidden = {column for column in (_NOISE, _ROOF) if not any(len(row) > column and row[column] for row in rows[1:])}
    return [_without(row, hidden) for row in rows]


def _without(cells: Sequence[str], hidden: set[int]) -> tuple[str, ...]:
    return tuple(cell for i, cell in enumerate(cells) if i not in hidden)


def _text(activation: Activation | None) -> str:
    if activation is None:
        return ""
    steps = [
        f"{name}({', '.join(f'{p:g}' for p in params)})" if params else name for name, params, _ in steps_of(activation)
    ]
    return "+".join(steps) if len(steps) > 1 else steps[0][:16]
