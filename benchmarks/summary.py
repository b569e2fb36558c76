"""What the records of a benchmark say, as data and as text. A record is one cell: threads, state and shape.

{"threads": 1, "state": "hot", "m": 16, "k": 768, "n": 3072, "us": {"fastlinear": 520.1, "nn.Linear": 990.2, ...},
 "median_us": {...}, "rounds": 40, "plan": "fp32/avx512/14x32 t1", "source": "tuned", "tune_ms": 45.2,
 "fma_gflops": 183.1, "read_gbs": 31.2, "attainable_us": 412.3, "fraction": 0.79}
"""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Iterable, Iterator
from typing import Any

import shapes

OURS, LINEAR = "fastlinear", "nn.Linear"
RIVALS = (LINEAR, "mkl", "onednn")  # "the best of them" in the targets; Inductor is shown beside

Record = dict[str, Any]


def geometric_mean(values: Iterable[float]) -> float:
    return math.exp(statistics.fmean(map(math.log, values)))


def speedup(record: Record, rival: str) -> float:
    return float(record["us"][rival] / record["us"][OURS])


def over_best(record: Record) -> float:
    """Time of the best rival over ours."""
    return min(speedup(record, rival) for rival in RIVALS if rival in record["us"])


def shape_of(record: Record) -> str:
    return f"{record['m']}x{record['k']}x{record['n']}"


def summarise(records: list[Record], isa: str) -> list[dict[str, Any]]:
    """One entry for each number of threads and state, with the figures the targets speak of."""
    entries = []
    for (threads, state), group in _groups(records):
        worst = min(group, key=over_best)
        rivals = [name for name in group[0]["us"] if name != OURS]
        entries.append(
            {
                "threads": threads,
                "state": state,
                "cells": len(group),
                "geomean_over": {rival: geometric_mean(speedup(r, rival) for r in group) for rival in rivals},
                "geomean_over_best": geometric_mean(map(over_best, group)),
                "worst_over_best": over_best(worst),
                "worst_shape": shape_of(worst),
                "slower": [[shape_of(r), over_best(r)] for r in group if over_best(r) < shapes.NEVER_UNDER],
                "bands": [entry for band in shapes.BANDS if (entry := _band(group, band, isa)) is not None],
            }
        )
    return entries


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
    target = band.targets.get(isa)
    return {
        "band": band.name,
        "target": target,
        "min": min(fractions),
        "median": statistics.median(fractions),
        "misses": [[shape_of(r), r["fraction"]] for r in inside if target is not None and r["fraction"] < target],
    }


def text(summary: list[dict[str, Any]]) -> str:
    return "\n".join(line for entry in summary for line in _lines(entry))


def _lines(entry: dict[str, Any]) -> Iterator[str]:
    yield f"\n{entry['threads']} thread(s), {entry['state']}, {entry['cells']} shapes (MxKxN), speed against"
    for rival, mean in entry["geomean_over"].items():
        yield f"  {rival:<12} {mean:5.2f}x by geometric mean{_wanted(rival)}"
    yield (
        f"  {'the best':<12} {entry['geomean_over_best']:5.2f}x by geometric mean (wanted {shapes.MEAN_OVER_BEST}), "
        f"at worst {entry['worst_over_best']:.2f}x on {entry['worst_shape']} (wanted {shapes.NEVER_UNDER})"
    )
    yield from _list("slower than the best", entry["slower"], "x")
    for band in entry["bands"]:
        wanted = "" if band["target"] is None else f" (wanted {band['target']:.0%})"
        yield f"  roofline, {band['band']:<9} min {band['min']:.0%}, median {band['median']:.0%}{wanted}"
        yield from _list("below", band["misses"], "")


def _wanted(rival: str) -> str:
    return f" (wanted {shapes.MEAN_OVER_LINEAR})" if rival == LINEAR else ""


def _list(title: str, cells: list[list[Any]], unit: str) -> Iterator[str]:
    if cells:
        yield f"    {title}: " + ", ".join(
            f"{shape} {value:.2f}{unit}" for shape, value in sorted(cells, key=lambda c: c[1])
        )


def extras(document: dict[str, Any]) -> str:
    """The figures beside the grid, with what is wanted."""
    calls, once, tuning = document["tiny_calls"], document["once"], document["tuning"]
    m, k, n = shapes.SMALL
    rows = [
        (f"{m}x{k}x{n} with relu over nn.Linear + ReLU", calls[OURS] / calls[LINEAR], "", "at most 0.35"),
        (f"{m}x{k}x{n} with relu", calls[OURS], " us", ""),
        ("call with 0 rows: all but the kernel", calls["no_op"], " us", "at most 3"),
        ("first call of a shape and M, longest", tuning["max_ms"], " ms", "at most 60"),
        ("first call of a shape and M, median", tuning["median_ms"], " ms", ""),
        ("import fastlinear beyond import torch", once["import_ms"], " ms", "at most 100"),
        ("convert MiniLM", once.get("convert_ms"), " ms", "at most 300"),
        ("packed over original weights of MiniLM", once.get("pack_ratio"), "", "at most 1"),
        ("growth of the process over these weights", once.get("rss_ratio"), "", "about 1"),
    ]
    return "\n" + "\n".join(
        f"{what:<44} {value:8.2f}{unit}" + (f" (wanted: {wanted})" if wanted else "")
        for what, value, unit, wanted in rows
        if value is not None
    )
