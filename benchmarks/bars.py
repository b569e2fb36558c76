"""What several runs of whole.py agree on, as a table and a picture: python benchmarks/bars.py plot.png run.json ...

A bar is the median of the runs, the line on it reaches from the least to the most; a panel holds the runs of one
model, form and number of threads.
"""

from __future__ import annotations

import json
import statistics
import sys
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

OURS = ("convert", "backend")


class Bar(NamedTuple):
    """Times eager's speed: the median of the runs, the least and the most of them."""

    median: float
    least: float
    most: float

    def __str__(self) -> str:
        return f"{self.median:.2f}x ({self.least:.2f} to {self.most:.2f})"


Panels = dict[tuple[str, str, int], dict[str, dict[int, Bar]]]  # by model, form, threads; then by way, then by batch


def collect(documents: Iterable[dict[str, Any]]) -> Panels:
    ratios: dict[Any, list[float]] = defaultdict(list)
    for document in documents:
        about = document["about"]
        for result in document["results"]:
            base = result["ways"]["eager"]["ms"]
            for way, each in result["ways"].items():
                key = (about["model"], about["form"], about["threads"])
                ratios[key, way, result["batch"]].append(base / each["ms"])
    panels: Panels = {}
    for (key, way, batch), found in ratios.items():
        bar = Bar(statistics.median(found), min(found), max(found))
        panels.setdefault(key, {}).setdefault(way, {})[batch] = bar
    return panels


def table(panels: Panels) -> str:
    """In Markdown, a row a way."""
    lines = []
    for (model, form, threads), ways in panels.items():
        batches = sorted({batch for of_way in ways.values() for batch in of_way})
        lines += [f"{model}, {form}, {threads} thread(s):", ""]
        lines += ["| | " + " | ".join(f"batch {batch}" for batch in batches) + " |", "|---" * (len(batches) + 1) + "|"]
        for way, bars in ways.items():
            if way == "eager":
                continue
            lines.append(f"| {way} | " + " | ".join(str(bars.get(batch, "")) for batch in batches) + " |")
        lines.append("")
    return "\n".join(lines)


def draw(panels: Panels, about: dict[str, Any], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(
        1, len(panels), figsize=(5.5 * len(panels), 3.8), squeeze=False, layout="constrained"
    )
    for panel, ((model, form, threads), ways) in zip(axes[0], panels.items(), strict=True):
        batches = sorted({batch for of_way in ways.values() for batch in of_way})
        others = [way for way in ways if way.split()[0] not in OURS and way != "eager"]
        shown = [*others, *(way for way in ways if way.split()[0] in OURS)]
        width = 0.85 / len(shown)
        for i, way in enumerate(shown):
            bars = [ways[way][batch] for batch in batches]
            rank = shown.index(way) - len(others)
            color = f"C{rank}" if rank >= 0 else str(0.55 + 0.3 * i / max(1, len(others)))
            name = f"fastlinear, {way.split()[0]}" if rank >= 0 else way.removesuffix(f" {form}")
            spread = [[b.median - b.least for b in bars], [b.most - b.median for b in bars]]
            places = [place + (i - (len(shown) - 1) / 2) * width for place in range(len(batches))]
            panel.bar(places, [b.median for b in bars], width, yerr=spread, color=color, label=name, ecolor="0.3")
        panel.axhline(1, color="black", linewidth=0.8)
        panel.set_xticks(range(len(batches)), [f"batch {batch}" for batch in batches])
        panel.set_title(f"{model}, {form}, {threads} thread{'s' * (threads > 1)}")
        panel.legend(fontsize="small", loc="upper center", bbox_to_anchor=(0.5, -0.1), ncols=3, frameon=False)
    axes[0][0].set_ylabel("times the speed of nn.Linear, eager")
    figure.suptitle(f"{about['cpu']['model']}, torch {about['torch']}, {about['date']}", fontsize="small")
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def main(path: str, *files: str) -> None:
    documents = [json.loads(Path(file).read_text()) for file in files]
    panels = collect(documents)
    print(table(panels))
    draw(panels, documents[0]["about"], Path(path))


if __name__ == "__main__":
    if len(sys.argv) < 3:
        sys.exit(__doc__)
    main(*sys.argv[1:])
