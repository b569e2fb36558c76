"""What the records of a benchmark say, as data and as text. A record is one cell: threads, state and shape.

{"threads": 1, "state": "hot", "m": 16, "k": 768, "n": 3072, "us": {"fastlinear": 520.1, "nn.Linear": 990.2, ...},
 "median_us": {...}, "rounds": 40, "plan": "fp32/avx512/14x32 t1", "source": "tuned", "tune_ms": 45.2,
 "beyond_l2": True, "peak_gflops": 183.1, "read_gbs": 31.2, "attainable_us": 412.3, "fraction": 0.79}

Where the CPU multiplies the 16-bit format itself there are also "native_gflops", and "native_attainable_us" and
"native_fraction" under that peak; "fraction" is then above 1 where FastLinear beats what fp32 FMA could do.
"""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Iterable, Iterator
from typing import Any

import shapes
from shapes import LINEAR, OURS

Record = dict[str, Any]


def geometric_mean(values: Iterable[float]) -> float:
    return math.exp(statistics.fmean(map(math.log, values)))


def speedup(record: Record, rival: str) -> float:
    return float(record["us"][rival] / record["us"][OURS])


def over_best(record: Record, rivals: Iterable[str]) -> float:
    """Time of the best of the rivals over ours."""
    return min(speedup(record, rival) for rival in rivals if rival in record["us"])


def shape_of(record: Record) -> str:
    return f"{record['m']}x{record['k']}x{record['n']}"


def summarize(records: list[Record], isa: str, dtype: str = "fp32") -> list[dict[str, Any]]:
    """One entry for each number of threads and state, with the figures the targets of this ISA and dtype speak of."""
    entries = []
    targets = shapes.TARGETS[dtype]
    bound = any(isa in band.targets for band in targets.bands)  # else the roofline is none for this format
    for (threads, state), group in _groups(records):
        rivals = [name for name in group[0]["us"] if name != OURS]
        entries.append(
            {
                "threads": threads,
                "state": state,
                "cells": len(group),
                "over": {
                    **{rival: _speed(group, (rival,)) for rival in rivals},
                    "the best": _speed(group, targets.rivals),
                },
                "goals": [_goal(group, goal, bound) for goal in targets.goals],
                "bands": [entry for band in targets.bands if (entry := _band(group, band, isa)) is not None],
            }
        )
    return entries


def _speed(group: list[Record], rivals: tuple[str, ...], at_roofline: bool = False) -> dict[str, Any]:
    speeds = [
        (over_best(record, rivals) / (_of_the_machine(record) if at_roofline else 1), shape_of(record))
        for record in group
    ]
    worst, shape = min(speeds)
    return {"geomean": geometric_mean(speed for speed, _ in speeds), "worst": worst, "worst_shape": shape}


def _of_the_machine(record: Record) -> float:
    """The share of what this CPU can do, with whichever instruction multiplies fastest."""
    return float(record["native_fraction" if "native_fraction" in record else "fraction"])


def _goal(group: list[Record], goal: shapes.Goal, bound: bool) -> dict[str, Any]:
    """The figure that is to reach what is wanted, None where no cell has it, and the shapes that miss it; beside it
    what the figure would be if every cell took no longer than its roofline says, if that is a bound."""
    inside = [
        record
        for record in group
        if goal.least <= record["m"] <= goal.most
        and (record["beyond_l2"] or not goal.beyond_l2)
        and any(rival in record["us"] for rival in goal.rivals)
    ]
    kind = "worst" if goal.everywhere else "geomean"
    speed = _speed(inside, goal.rivals) if inside else {}
    most = _speed(inside, goal.rivals, at_roofline=True) if inside and bound else {}
    speeds = [[shape_of(record), over_best(record, goal.rivals)] for record in inside if goal.everywhere]
    return {
        "over": goal.name,
        "wanted": goal.wanted,
        "cells": len(inside),
        "figure": speed.get(kind),
        "at_roofline": most.get(kind),
        "misses": [[shape, value] for shape, value in speeds if value < goal.wanted],
    }


def _groups(records: list[Record]) -> Iterator[tuple[tuple[int, str], list[Record]]]:
    def key(record: Record) -> tuple[int, str]:
        return record["threads"], record["state"]

    for where, group in itertools.groupby(sorted(records, key=key), key):
        yield where, list(group)


def _band(group: list[Record], band: shapes.Band, isa: str) -> dict[str, Any] | None:
    inside = [record for record in group if band.least <= record["m"] <= band.most]
    if not inside:
        return None
    fractions = [record["fraction"] for record in inside]
    native = [record["native_fraction"] for record in inside if "native_fraction" in record]
    target = band.targets.get(isa)
    return {
        "band": band.name,
        "target": target,
        "min": min(fractions),
        "median": statistics.median(fractions),
        **({"native_min": min(native), "native_median": statistics.median(native)} if native else {}),
        "misses": [[shape_of(r), r["fraction"]] for r in inside if target is not None and r["fraction"] < target],
    }


def text(summary: list[dict[str, Any]]) -> str:
    return "\n".join(line for entry in summary for line in _lines(entry))


def _lines(entry: dict[str, Any]) -> Iterator[str]:
    yield f"\n{entry['threads']} thread(s), {entry['state']}, {entry['cells']} shapes (MxKxN), speed against"
    for rival, speed in entry["over"].items():
        yield (
            f"  {rival:<12} {speed['geomean']:6.2f}x by geometric mean, "
            f"at worst {speed['worst']:.2f}x on {speed['worst_shape']}"
        )
    yield f"  {'':<43} wanted  reached"
    for goal in entry["goals"]:
        reached = "not measured" if goal["figure"] is None else f"{goal['figure']:.2f}x"
        most = goal["at_roofline"]
        if most is not None and goal["figure"] < most < goal["wanted"]:
            reached += f" (at the roofline it would be {most:.2f}x)"
        yield f"  over {goal['over']:<38} {goal['wanted']:5.2f}x  {reached}"
        yield from _list("below", goal["misses"], "x")
    for band in entry["bands"]:
        wanted = "-" if band["target"] is None else f"{band['target']:.0%}"
        native = (
            f" (of the native peak: min {band['native_min']:.0%}, median {band['native_median']:.0%})"
            if "native_min" in band
            else ""
        )
        yield f"  roofline, {band['band']:<33} {wanted:>6}  min {band['min']:.0%}, median {band['median']:.0%}{native}"
        yield from _list("below", band["misses"], "")


def _list(title: str, cells: list[list[Any]], unit: str) -> Iterator[str]:
    if cells:
        yield f"    {title}: " + ", ".join(
            f"{shape} {value:.2f}{unit}" for shape, value in sorted(cells, key=lambda c: c[1])
        )


def extras(document: dict[str, Any]) -> str:
    """The figures beside the grid, with what is wanted."""
    calls, once, tuning = document["tiny_calls"], document["once"], document["tuning"]
    (m, k, n), packs = shapes.SMALL, shapes.TARGETS[document["dtype"]].packs
    rows = [
        (f"{m}x{k}x{n} with relu over nn.Linear + ReLU", calls[OURS] / calls[LINEAR], "", "at most 0.35"),
        (f"{m}x{k}x{n} with relu", calls[OURS], " us", ""),
        ("call with 0 rows: all but the kernel", calls["no_op"], " us", "at most 3"),
        ("first call of a shape and M, longest", tuning["max_ms"], " ms", "at most 60"),
        ("first call of a shape and M, median", tuning["median_ms"], " ms", ""),
        ("import fastlinear beyond import torch", once["import_ms"], " ms", "at most 100"),
        ("convert MiniLM", once.get("convert_ms"), " ms", "at most 300"),
        ("packed over original weights of MiniLM", once.get("pack_ratio"), "", packs),
        ("growth of the process over these weights", once.get("rss_ratio"), "", "about 1"),
    ]
    figures = [
        f"{what:<44} {value:8.2f}{unit}" + (f" (wanted: {wanted})" if wanted else "")
        for what, value, unit, wanted in rows
        if value is not None
    ]
    refused = [f"{name} is left out: {why}" for name, why in document["refused"].items()]
    return "\n".join(("", *figures, *refused))
