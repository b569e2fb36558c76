"""A report as a page: one self-contained file that draws itself, and a plain table for notebooks.

page.html is the page without its data, which goes into it as JSON: what a model's names hold is never read as markup.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from html import escape
from importlib.resources import files
from typing import Any

from fastlinear.model.rows import LayerReport

_PLACE = '"the report"'  # in page.html, where the data goes
# Of a layer in the page's data; plans follow as rows of _PLAN, so that no name is repeated 300 times.
_LAYER = ("name", "in_features", "out_features", "dtype", "activation", "decision", "reason", "frozen")
_PLAN = (
    "rows", "x", "threads", "runs_on", "source", "refused", "provisional", "speedup", "spread", "no_speedup",
    "roofline", "gflops", "intensity", "milliseconds",
)  # fmt: skip
_DIGITS = 4


def page_of(layers: Sequence[LayerReport], share: str, summary: list[str], environment: dict[str, Any]) -> str:
    """The whole page, some 100 bytes a plan and 20 KB for itself."""
    roofs = {spot.roof for layer in layers for spot in layer.roofline if spot is not None}
    data = {
        "share": share,
        "summary": summary,
        "environment": environment,
        "layerColumns": [*_LAYER, "before", "after", "weightDb", "outputDb", "elsewhere", "plans"],
        "planColumns": _PLAN,
        "layers": [_layer(layer) for layer in layers],
        "roofs": [
            [roof.packed, roof.threads, _short(roof.operations / 1e9), _short(roof.memory / 1e9)]
            for roof in sorted(roofs)
        ],
    }
    template = files("fastlinear.model").joinpath("page.html").read_text(encoding="utf-8")
    text = json.dumps(data, separators=(",", ":")).replace("<", "\\u003c")
    return template.replace(_PLACE, text, 1)


def _layer(layer: LayerReport) -> list[Any]:
    said = layer.to_dict()
    memory, quality = said["memory"], said["quality"]
    elsewhere = "; ".join(f"{n} calls elsewhere: {why}" for why, n in layer.elsewhere.items())
    activation = " ".join(map(str, said["activation"] or []))
    head = [activation if key == "activation" else said[key] for key in _LAYER]
    tail = [memory["before"], memory["after"], quality["weight"], quality["output"], elsewhere]
    return [*head, *map(_short, tail), [[_short(plan[key]) for key in _PLAN] for plan in said["plans"]]]


def _short(value: Any) -> Any:
    return float(f"{value:.{_DIGITS}g}") if isinstance(value, float) else value


def fragment_of(layers: Iterable[LayerReport], summary: Iterable[str]) -> str:
    """For a notebook: the summary, and a row for each layer and plan."""
    columns = ("layer", "in x out", "weight", "M", "x", "runs on", "speed-up", "roof", "MiB")
    head = "".join(f"<th>{name}</th>" for name in columns)
    body = "".join(_cells(row) for layer in layers for row in _rows(layer))
    paragraphs = "".join(f"<p>{escape(line)}</p>" for line in summary)
    return f"<div><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>{paragraphs}</div>"


def _cells(row: list[str]) -> str:
    return f"<tr>{''.join(f'<td>{escape(cell)}</td>' for cell in row)}</tr>"


def _rows(layer: LayerReport) -> list[list[str]]:
    said = layer.to_dict()
    head = [layer.name or "(the model)", layer.shape, layer.dtype]
    tail = [f"{layer.pack_mib:.2f}"]
    told = [layer.reason or ""] if layer.reason else [f"{n} elsewhere: {why}" for why, n in layer.elsewhere.items()]
    rows = [[str(p["rows"]), p["x"], p["runs_on"], _ratio(p), _percent(p["roofline"])] for p in said["plans"]]
    rows += [["", "", text, "", ""] for text in told] or ([] if rows else [["", "", layer.decision, "", ""]])
    return [[*(head if i == 0 else [""] * len(head)), *row, *(tail if i == 0 else [""])] for i, row in enumerate(rows)]


def _ratio(plan: dict[str, Any]) -> str:
    if plan["speedup"] is None:
        return ""
    spread = f" ±{plan['spread']:.0%}" if plan["spread"] else ""
    return f"{plan['speedup']:.2f}x{spread}" + "?" * bool(plan["provisional"])


def _percent(share: float | None) -> str:
    return "" if share is None else f"{share:.0%}"
