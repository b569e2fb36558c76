"""What a report says of layers that several processes share, and whether splitting them pays."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from fastlinear.layer.frozen import shared_as
from fastlinear.layer.shard import Shard
from fastlinear.model.agreement import costs
from fastlinear.model.rows import LayerReport
from fastlinear.plan.candidates import Chosen
from fastlinear.plan.decide import spell


def notes(rows: Iterable[tuple[Any, LayerReport]]) -> dict[Any, tuple[str, ...]]:
    """By layers in the order of the model: which part of it this process has, and where it is too small to be split.

    A layer split by its inputs ends in a sum over all processes, which has to pay for the layers split by their outputs
    that precede it, too: for each of them a process spares the time that the others' parts would take.
    """
    told: dict[Any, tuple[str, ...]] = {}
    waiting: list[tuple[Any, LayerReport]] = []
    for layer, row in rows:
        shard = shared_as(layer)
        outputs, inputs = (0, 0) if shard is None else (_parts(shard, layer, 0), _parts(shard, layer, 1))
        if shard is None or outputs * inputs == 1:
            continue
        told[layer] = (f"1 of {outputs * inputs} parts, by its {'outputs' if outputs > 1 else 'inputs'}",)
        waiting.append((layer, row))
        if inputs > 1:
            small = _too_small(waiting, shard, inputs)
            told.update((each, (*told[each], small)) for each, _ in waiting if small)
            waiting = []
    return told


def _parts(shard: Shard, layer: Any, dim: int) -> int:
    """Into how many parts a weight [n, k] is split along a dimension."""
    dim = 1 - dim if getattr(layer, "_transposed", False) else dim
    split = [i for i, placed in enumerate(shard.placements) if getattr(placed, "dim", None) in (dim, dim - 2)]
    parts = 1
    for i in split:
        parts *= shard.mesh.size(i)
    return parts


def _too_small(rows: list[tuple[Any, LayerReport]], shard: Shard, parts: int) -> str:
    """Of layers that end in one sum: at which numbers of rows that takes longer than what it spares; "" if at none."""
    if shard.mesh not in costs:
        return ""
    least, byte = costs[shard.mesh]
    last, found = rows[-1][1], {}
    for plan in last.buckets:
        plans = [each for _, row in rows for each in row.buckets if (each.x, each.bucket) == (plan.x, plan.bucket)]
        times = [_milliseconds(each) for each in plans]
        cost = 1e3 * (least + byte * 4 * plan.bucket * last.out_features)
        if None not in times and (spared := (parts - 1) * sum(filter(None, times))) < cost:
            found[plan.bucket] = f"the other ranks spare {spared:.2g} ms, the sum takes {cost:.2g}"
    most = max(found, default=0)
    return f"too small to be split at M={', '.join(map(str, found))}: {found[most]}" if found else ""


def _milliseconds(plan: Chosen) -> float | None:
    times = dict(plan.table)
    return times.get(spell(plan), times.get(plan.name))
