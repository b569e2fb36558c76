"""explain: all that is known of one layer, its whole tuning tables included."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any

from torch import nn

from fastlinear.model.arguments import check_module
from fastlinear.model.reporting import describe_others, describe_running
from fastlinear.model.rows import SOURCES, LayerReport
from fastlinear.model.running import Running, graphs_of, original, running
from fastlinear.model.selection import linear_layers
from fastlinear.plan.candidates import Chosen
from fastlinear.plan.roofline import Spot


@dataclass(frozen=True)
class Explanation:
    """What `explain` found of one layer; str() is text."""

    layer: LayerReport

    def __str__(self) -> str:
        return "\n".join(self._lines())

    def to_dict(self) -> dict[str, Any]:
        """The layer's row as in `Report.to_dict`, each plan with its table: [[candidate, milliseconds], ...]."""
        said = self.layer.to_dict()
        for plan, of_plan in zip(self.layer.buckets, said["plans"], strict=True):
            of_plan["table"] = [list(row) for row in plan.table]
        return said

    def _lines(self) -> Iterator[str]:
        layer = self.layer
        activation = "no activation" if layer.activation is None else layer.activation.name
        size = f"{layer.in_features} x {layer.out_features}"
        size = f"{layer.experts} experts of {size}" if layer.experts else size
        yield f"{layer.name or '(the model)'}: {size}, {layer.dtype}, {activation}"
        yield f"  {layer.decision}" + (f": {layer.reason}" if layer.reason else "")
        yield f"  memory: {layer.weight_mib:.2f} MiB before, {layer.memory_mib:.2f} MiB now"
        for what, db in zip(("weight", "output"), layer.quality, strict=True):
            if db is not None:
                yield f"  signal to noise of the {what}: {db:.1f} dB"
        for why, count in layer.elsewhere.items():
            yield f"  {count} calls elsewhere: {why}"
        spots = layer.roofline or (None,) * len(layer.buckets)
        for plan, spot in zip(layer.buckets, spots, strict=True):
            yield from self._of_plan(plan, spot)

    def _of_plan(self, plan: Chosen, spot: Spot | None) -> Iterator[str]:
        yield f"\n  {plan.bucket} rows of {plan.x}, {plan.threads} threads: {plan.name}, {SOURCES[plan.source]}"
        if plan.speedup is not None:
            spread = f", within {plan.spread:.0%}" if plan.spread else ""
            yield f"    {plan.speedup:.2f}x over nn.Linear{spread}"
        elif why := self.layer.why_no_speedup(plan):
            yield f"    no speed-up is known: {why}"
        if spot is not None:
            rate = f"{spot.operations / 1e9:.0f} of {spot.operations / spot.share / 1e9:.0f} GFLOP/s"
            yield f"    {spot.share:.0%} of the roofline: {rate}, at {spot.intensity:.1f} operations a byte"
        if plan.table:
            rows, columns = plan.measured
            yield f"    measured on {rows} rows and {columns} of the {self.layer.out_features} columns:"
            best = plan.table[0][1]
            yield from (f"    {name:<28} {ms:9.4f} ms {best / ms:6.1%}" for name, ms in plan.table)


def explain(model: nn.Module, name: str) -> Explanation:
    """All that is known of the linear layer called `name`: decision and reason, memory, and for each batch size what
    runs, its part of the roofline, and the whole table of its tuning. What is one product with others in a compiled
    graph or a group is explained as that; experts and packed embeddings have the names of their rows in `report`.

    Raises TypeError for anything but an nn.Module, ValueError for a name of no linear layer, with the nearest names.
    """
    check_module("explain", model)
    whole = original(model)
    first = {names[0]: names for names in linear_layers(whole).values()}
    known = {each: Running(layer, each, ()) for layer, names in linear_layers(whole).items() for each in names}
    compiled = graphs_of(whole)
    for each in running(whole, compiled):
        known[each.name] = each
        known.update({name: each for part in each.parts for name in first.get(part, [part])})
    others = {row.name: row for row in describe_others(whole, compiled)}
    if name not in known and name in others:
        return Explanation(others[name])
    if name not in known:
        near = get_close_matches(str(name), [*known, *others], 3, 0.0)
        raise ValueError(f"{type(whole).__name__} has no linear layer {name!r}; the nearest are {near or 'none'}")
    found = known[name]
    return Explanation(describe_running(found if found.joined else found._replace(name=name)))
