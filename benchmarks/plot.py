"""Fraction of the roofline against M, from the JSON of a benchmark: python benchmarks/plot.py figures.json plot.png"""

from __future__ import annotations

import json
import statistics
import sys
from pathlib import Path
from typing import Any


def draw(document: dict[str, Any], path: Path) -> None:
    """One panel for each number of threads (rows) and state (columns), one line for each (K, N).

    1 is the roofline of the document's ISA; a dotted line marks the peak of the dtype's own instruction, where the CPU
    has another.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    records = document["records"]
    threads, states = sorted({r["threads"] for r in records}), sorted({r["state"] for r in records}, reverse=True)
    layers = sorted({(r["k"], r["n"]) for r in records}, key=lambda layer: (layer[0] * layer[1], layer))
    ms = sorted({r["m"] for r in records})
    # Documents of version 0.1 have the peak of the FMA itself.
    peaks = [r["native_gflops"] / r.get("peak_gflops", r.get("fma_gflops")) for r in records if "native_gflops" in r]
    native = statistics.median(peaks) if peaks else 0.0
    top = max(native, *(r["fraction"] for r in records))
    colors = pyplot.colormaps["viridis"]
    size = (6.5 * len(states), 4.2 * len(threads) + 0.8)
    figure, axes = pyplot.subplots(len(threads), len(states), sharex=True, sharey=True, squeeze=False, figsize=size)
    for row, count in zip(axes, threads, strict=True):
        for panel, state in zip(row, states, strict=True):
            for i, (k, n) in enumerate(layers):
                here = (r for r in records if (r["threads"], r["state"], r["k"], r["n"]) == (count, state, k, n))
                points = sorted((r["m"], r["fraction"]) for r in here)
                color = colors(0.95 * i / max(1, len(layers) - 1))
                panel.plot(*zip(*points, strict=True), marker="o", markersize=4, color=color, label=f"{k} x {n}")
            panel.axhline(1, color="black", linewidth=0.8)
            if native:
                panel.axhline(native, color="black", linewidth=0.8, linestyle=":", label=document["native_isa"])
            panel.set_title(f"{count} thread{'s' * (count > 1)}, {state} weights")
            panel.set_xscale("log", base=2)
            panel.set_xticks(ms, [str(m) for m in ms])
            panel.grid(alpha=0.3)
            panel.set_ylim(0, max(1.1, 1.05 * top))
    for panel in axes[-1]:
        panel.set_xlabel("M (rows)")
    for panel in axes[:, 0]:
        panel.set_ylabel("fraction of the roofline")
    axes[-1][-1].legend(title="K x N", fontsize="small", ncols=2, loc="lower right")
    about = document["about"]
    versions = ", ".join(f"{name} {of}" for name, of in about["versions"].items())
    of = f"{document.get('dtype', 'fp32')} with relu, {document['isa']}"  # runs before 16-bit weights name no dtype
    figure.suptitle(f"FastLinear {of}: {about['cpu']['model']}\n{versions}")
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    draw(json.loads(Path(sys.argv[1]).read_text()), Path(sys.argv[2]))
