"""The site of these pages: `make docs`. Docstrings are plain text in this tree's form; `to_rst` makes markup of it."""

import re
from typing import Any

import fastlinear

project, author, copyright = "fastlinear", "the authors of fastlinear", "the authors of fastlinear"
release = version = fastlinear.__version__
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.viewcode"]
source_suffix = {".md": "markdown"}
html_theme, html_title = "furo", "fastlinear"
html_copy_source = False
myst_heading_anchors = 3  # as GitHub makes them, by which the pages link to one another
autodoc_member_order, autodoc_typehints_format = "bysource", "short"

_MARKUP = re.compile(r"([*|\\]|(?<=\w)_(?!\w))")  # of reStructuredText, where it is meant as it stands
_PARAMETER = re.compile(r"([a-z_]\w*(?:, [a-z_]\w*)*): (.*)")  # at the margin: what follows, indented, belongs to it


def to_rst(text: str) -> str:
    """Names and code in backticks become literals, "name: what it is" with its hanging lines an item of a list, and
    what is indented otherwise code."""
    lines: list[str] = []
    inside = ""
    for line in text.splitlines():
        found, before = _PARAMETER.fullmatch(line), inside
        hangs = line.startswith("    ")
        inside = "item" if found or (hangs and before == "item") else "code" * hangs
        if inside != before and lines and lines[-1]:
            lines.append("")
        if inside == "code" != before:
            lines += ["::", ""]
        if found:
            names = ", ".join(f"``{name}``" for name in found[1].split(", "))
            line = f"* {names}: {_inline(found[2])}"
        elif inside != "code":
            line = "  " * (inside == "item") + _inline(line.strip())
        lines.append(line)
    return "\n".join(lines)


def _inline(line: str) -> str:
    parts = re.split(r"(`[^`]+`)", line)
    return "".join(f"`{part}`" if i % 2 else _MARKUP.sub(r"\\\1", part) for i, part in enumerate(parts))


def _docstring(app: Any, what: str, name: str, thing: object, options: object, lines: list[str]) -> None:
    lines[:] = [*to_rst("\n".join(lines)).splitlines(), ""]


def setup(app: Any) -> None:
    app.connect("autodoc-process-docstring", _docstring)
