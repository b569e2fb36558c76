"""Two runs of the benchmark side by side: python benchmarks/compare.py before.json after.json

Times of FastLinear, and how many times faster it became. The ratio to nn.Linear of the same run is given too: it does
not move when only the machine does.
"""

from __future__ import annotations

import itertools
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from summary import LINEAR, OURS, geometric_mean, shape_of, speedup

Cell = tuple[int, str, int, int, int]


def cells(document: dict[str, Any]) -> dict[Cell, dict[str, Any]]:
    return {tuple(r[key] for key in ("threads", "state", "k", "n", "m")): r for r in document["records"]}


def table(before: dict[str, Any], after: dict[str, Any]) -> Iterator[str]:
    """Lines: one for each cell that both have, then geometric means by threads and state."""
    old, new = cells(before), cells(after)
    both = sorted(old.keys() & new.keys())
    yield f"{'':<8} {'MxKxN':<14} {'before':>10} {'after':>10} {'faster':>8} {'over nn.Linear':>16} {'roofline':>12}"
    for key in both:
        a, b = old[key], new[key]
        yield (
            f"t{key[0]} {key[1]:<5} {shape_of(a):<14} {a['us'][OURS]:7.1f} us {b['us'][OURS]:7.1f} us "
            f"{a['us'][OURS] / b['us'][OURS]:7.2f}x {speedup(a, LINEAR):7.2f}x {speedup(b, LINEAR):6.2f}x "
            f"{a['fraction']:6.0%} {b['fraction']:5.0%}  {b['plan'] if a['plan'] != b['plan'] else ''}".rstrip()
        )
    for where, group in itertools.groupby(both, lambda key: key[:2]):
        keys = list(group)
        faster = geometric_mean(old[key]["us"][OURS] / new[key]["us"][OURS] for key in keys)
        gain = geometric_mean(speedup(new[key], LINEAR) / speedup(old[key], LINEAR) for key in keys)
        yield f"t{where[0]} {where[1]}: {faster:.3f}x faster by geometric mean, {gain:.3f}x against nn.Linear"
    if len(both) < len(old.keys() | new.keys()):
        yield f"left out: {len(old.keys() ^ new.keys())} cells that only one of the two has"


def origin(document: dict[str, Any]) -> str:
    """Where these figures come from, in a line; runs older than 16-bit weights are all of fp32."""
    about = document["about"]
    return f"{document.get('dtype', 'fp32')}, {document['isa']}, {about['date']}, {about['commit']}"


def main() -> None:
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    before, after = (json.loads(Path(path).read_text()) for path in sys.argv[1:])
    print(f"before: {origin(before)}\nafter:  {origin(after)}", *table(before, after), sep="\n")


if __name__ == "__main__":
    main()
