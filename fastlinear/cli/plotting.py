"""A picture of a benchmark: what share of the roofline each shape reaches."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fastlinear.cli.options import UsageError


def check(path: str) -> None:
    """UsageError where there is nothing to draw with, or no such picture, before anything is measured."""
    if importlib.util.find_spec("matplotlib") is None:
        raise UsageError("--plot needs matplotlib, which is not installed: pip install fastlinear[plot]")
    from matplotlib.backend_bases import FigureCanvasBase

    allowed = FigureCanvasBase.get_supported_filetypes()
    if (suffix := Path(path).suffix[1:]) and suffix.lower() not in allowed:
        raise UsageError(
            f"--plot: {path} would be a picture of kind {suffix!r}; there are {', '.join(sorted(allowed))}"
        )


def draw(path: str, results: Sequence[dict[str, Any]]) -> None:
    """Two bars a shape, of nn.Linear and of FastLinear, in shares of the roofline."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    names = [f"{each['m']}x{each['k']}x{each['n']}, {each['threads']}" for each in results]
    figure, axes = pyplot.subplots(figsize=(max(6, len(results)), 4.5), layout="constrained")
    places = range(len(results))
    stock = [each["roofline"] * each["us"] / each["torch_us"] for each in results]
    for label, shares, shift in (("nn.Linear", stock, -0.2), ("FastLinear", [r["roofline"] for r in results], 0.2)):
        axes.bar([place + shift for place in places], shares, 0.4, label=label)
    axes.axhline(1, color="gray", linewidth=1)
    axes.set_xticks([*places], names, rotation=30, ha="right")
    axes.set_ylabel("share of the roofline")
    axes.legend()
    try:
        figure.savefig(path)
    except (OSError, ValueError) as error:
        raise UsageError(f"--plot: {error}") from None
    finally:
        pyplot.close(figure)
