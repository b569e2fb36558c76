"""The rooms of the tree: what each is for, which may use which, and the picture of that in docs/architecture.svg.

    python tests/house.py        draws the picture anew, from the includes and imports of the sources

A room is a folder. `tests/test_layering.py` holds every include and import against this table.
"""

from __future__ import annotations

import ast
import functools
import re
from collections.abc import Iterator
from html import escape
from itertools import combinations, pairwise, permutations
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
PICTURE = ROOT / "docs/architecture.svg"


class Room(NamedTuple):
    """files: globs from the root; uses: the rooms its files may include or import."""

    purpose: str
    files: tuple[str, ...]
    uses: tuple[str, ...]


def _cpp(name: str, purpose: str, *uses: str) -> Room:
    return Room(purpose, (f"include/fastlinear/{name}/**/*.hpp",), uses)


def _python(name: str, purpose: str, *uses: str) -> Room:
    return Room(purpose, (f"fastlinear/{name}/**/*.py",), uses)


ROOMS = {
    "contract": _cpp("contract", "what the parts promise one another", "host"),
    "host": _cpp("host", "what the machine and torch give"),
    "formats": _cpp("formats", "what an element is", "contract"),
    "weight": _cpp("weight", "a weight [N, K] to panels, and back", "contract", "formats", "host"),
    "generic": _cpp("generic", "written once over a vector", "contract", "formats"),
    "epilogues": _cpp("epilogues", "a file for a function, or those of one kind", "contract", "generic"),
    "isa": _cpp("isa", "one folder an instruction set", "contract", "formats", "generic"),
    "driver": _cpp("driver", "from a problem to y", "contract", "formats", "host", "weight"),
    "csrc": Room(
        "one unit an instruction set, and the table",
        ("csrc/*.cpp",),
        ("contract", "host", "generic", "epilogues", "isa"),
    ),
    "native": Room(
        "the door to C++: hot path, packs, the CPU",
        ("fastlinear/_*.py", "fastlinear/_*.pyx", "fastlinear/_*.px[di]"),
        ("contract", "host", "formats", "weight", "driver"),
    ),
    "spec": _python("spec", "what the numbers mean, in plain torch", "native"),
    "plan": _python("plan", "the question and the answer", "native", "spec"),
    "layer": _python("layer", "one layer", "native", "spec", "plan"),
    "model": _python("model", "a whole model", "native", "spec", "plan", "layer"),
    "graph": _python("graph", "the compile backend", "native", "spec", "plan", "layer", "model"),
    "file": _python("file", "saving and loading", "native", "spec", "plan", "layer", "model"),
    "hf": _python(
        "hf", "transformers' from_pretrained and generate", "native", "spec", "plan", "layer", "model", "graph", "file"
    ),
    "cli": _python("cli", "one file a command", "native", "spec", "plan", "layer", "model", "graph", "file"),
}
FRONT = ("fastlinear/__init__.py", "fastlinear/__main__.py")  # may import every room, and is imported by none


def sources(room: str) -> Iterator[tuple[str, str]]:
    """(path from the root, text) of each file of a room, without what the build generates."""
    for pattern in ROOMS[room].files:
        for path in sorted(ROOT.glob(pattern)):
            name = path.relative_to(ROOT).as_posix()
            if name not in FRONT:
                yield name, path.read_text()


def used_rooms(path: str, text: str) -> Iterator[tuple[str, str]]:
    """(room, what the file names) of each include or import of the package in a file."""
    for name in (*cpp_includes(text), *python_imports(path, text)):
        yield room_of(name), name


def cpp_includes(text: str) -> list[str]:
    return re.findall(r'(?:#include|extern from) "fastlinear/([^"]+)"', text)


def python_imports(path: str, text: str) -> list[str]:
    """The dotted names below fastlinear that a source imports, also inside functions; "" for the front door."""
    if path.endswith((".hpp", ".cpp")):
        return []
    if not path.endswith(".py"):
        return re.findall(r"^\s*(?:from|c?import) fastlinear\.?([\w.]*)", text, re.MULTILINE)
    found = []
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "fastlinear":
            found.append((node.module or "").removeprefix("fastlinear").lstrip("."))
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names if alias.name.split(".")[0] == "fastlinear"]
            found += [name.removeprefix("fastlinear").lstrip(".") for name in names]
    return found


def room_of(name: str) -> str:
    """The room of an included or imported name: its folder."""
    head = re.split(r"[./]", name)[0]
    return "native" if head.startswith("_") else head


@functools.cache
def arrows() -> set[tuple[str, str]]:
    """(user, used) of all rooms, as the sources have it."""
    return {
        (room, used)
        for room in ROOMS
        for path, text in sources(room)
        for used, _ in used_rooms(path, text)
        if used in ROOMS and used != room
    }


# ---- the picture ----

_WIDTH, _HEIGHT, _GAP_X, _GAP_Y, _MARGIN = 290, 58, 36, 44, 20


CPP = "C++"  # the ground that the package stands on, drawn beside it as a house of its own


def houses() -> dict[str, tuple[list[str], set[tuple[str, str]]]]:
    """Name -> (rooms, arrows) of the two houses: the package, by what it imports, and C++, by what it includes."""
    pairs, cpp = arrows(), [room for room in ROOMS if _is_cpp(room)]
    package = [room for room in ROOMS if room not in cpp]
    imports = {(user, CPP if used in cpp else used) for user, used in pairs if user in package}
    includes = {(user, used) for user, used in pairs if user in cpp}
    return {"package": ([*package, CPP], imports), CPP: (cpp, includes)}


def _is_cpp(room: str) -> bool:
    return ROOMS[room].files[0].startswith(("include", "csrc"))


def floors(rooms: list[str], pairs: set[tuple[str, str]]) -> dict[str, int]:
    """Each room one floor above the highest that it uses."""
    level: dict[str, int] = {}

    def floor(room: str) -> int:
        if room not in level:
            level[room] = 1 + max((floor(used) for user, used in pairs if user == room), default=-1)
        return level[room]

    for room in rooms:
        floor(room)
    return level


def _direct(pairs: set[tuple[str, str]]) -> set[tuple[str, str]]:
    """Without the arrows that a longer way implies: the picture needs those that remain."""

    def reaches(a: str, b: str) -> bool:
        return any(used == b or reaches(used, b) for user, used in pairs if user == a)

    return {(a, b) for a, b in pairs if not any(reaches(c, b) for user, c in pairs if user == a and c != b)}


def _floors_with_bends(pairs: set[tuple[str, str]], level: dict[str, int]) -> tuple[list[list[str]], list[list[str]]]:
    """(what stands on each floor from left to right, the way of each arrow): an arrow that passes a floor has a bend
    there, which takes a place like a room's, so that it goes between the rooms and not behind them."""
    rows = [[room for room in level if level[room] == floor] for floor in range(max(level.values()) + 1)]
    ways = []
    for user, used in sorted(pairs):
        bends = [f"{user} > {used} {floor}" for floor in range(level[user] - 1, level[used], -1)]
        for floor, bend in zip(range(level[user] - 1, level[used], -1), bends, strict=True):
            rows[floor].append(bend)
        ways.append([user, *bends, used])
    return rows, ways


def _crossings(rows: list[list[str]], ways: list[list[str]]) -> int:
    """How many pairs of lines between neighboring floors cross."""
    at = {name: i for row in rows for i, name in enumerate(row)}
    floor_of = {name: floor for floor, row in enumerate(rows) for name in row}
    lines = [line for way in ways for line in pairwise(way)]
    together = [(a, b) for a, b in combinations(lines, 2) if floor_of[a[0]] == floor_of[b[0]]]
    return sum((at[a[0]] - at[b[0]]) * (at[a[1]] - at[b[1]]) < 0 for a, b in together)


def _arrange(rows: list[list[str]], ways: list[list[str]]) -> None:
    """Orders each floor so that lines cross as little as they may, trying all orders of one floor after another."""
    for _ in range(4):
        for floor, row in enumerate(rows):
            orders = (list(order) for order in permutations(row))
            rows[floor] = min(orders, key=lambda order: _crossings([*rows[:floor], order, *rows[floor + 1 :]], ways))


class _Drawing(NamedTuple):
    lines: list[str]
    width: float
    height: float


def _draw_house(rooms: list[str], pairs: set[tuple[str, str]], left: float, ground: float) -> _Drawing:
    """A house whose lowest floor stands on the line `ground`: a box a room, users above what they use."""
    rows, ways = _floors_with_bends(_direct(pairs), floors(rooms, pairs))
    _arrange(rows, ways)
    widths = {name: _WIDTH if name in rooms else 0 for row in rows for name in row}
    breadth = {floor: sum(widths[name] + _GAP_X for name in row) - _GAP_X for floor, row in enumerate(rows)}
    at = {}
    for floor, row in enumerate(rows):
        x = left + (max(breadth.values()) - breadth[floor]) / 2
        for name in row:
            at[name] = (x, ground - (floor + 1) * _HEIGHT - floor * _GAP_Y)
            x += widths[name] + _GAP_X
    lines = []
    for way in ways:
        points = [(at[name][0] + widths[name] / 2, at[name][1]) for name in way]
        (x, y), *bends, (u, v) = points
        passed = [point for bx, by in bends for point in ((bx, by), (bx, by + _HEIGHT))]
        path = " L".join(f"{a:.0f},{b:.0f}" for a, b in ((x, y + _HEIGHT), *passed, (u, v)))
        lines.append(f'<path d="M{path}" stroke="#667" fill="none" marker-end="url(#head)"/>')
    for room in rooms:
        lines += _box(room, *at[room])
    return _Drawing(lines, max(breadth.values()), len(rows) * (_HEIGHT + _GAP_Y) - _GAP_Y)


def _box(room: str, x: float, y: float) -> list[str]:
    purpose = "the house beside" if room == CPP else ROOMS[room].purpose
    color = "#e8eef7" if room == CPP or _is_cpp(room) else "#f3ecdd"
    return [
        f'<rect x="{x:.0f}" y="{y:.0f}" width="{_WIDTH}" height="{_HEIGHT}" rx="6" fill="{color}" stroke="#667"/>',
        *(
            f'<text x="{x + _WIDTH / 2:.0f}" y="{y + dy:.0f}" text-anchor="middle" font-weight="{weight}">'
            f"{escape(text)}</text>"
            for dy, weight, text in ((22, "bold", room), (42, "normal", purpose))
        ),
    ]


def draw() -> str:
    """The picture as SVG: the two houses side by side, on one ground."""
    height = max(_draw_house(*house, 0, 0).height for house in houses().values()) + 2 * _MARGIN
    left, lines = float(_MARGIN), []
    for house in houses().values():
        drawn = _draw_house(*house, left, height - _MARGIN)
        lines += drawn.lines
        left += drawn.width + 3 * _MARGIN
    width = left - 2 * _MARGIN
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:.0f} {height:.0f}" '
            'font-family="sans-serif" font-size="11">',
            '<defs><marker id="head" markerWidth="8" markerHeight="8" refX="7" refY="4" orient="auto">'
            '<path d="M0,0 L8,4 L0,8 z" fill="#667"/></marker></defs>',
            f'<rect width="{width:.0f}" height="{height:.0f}" fill="#fff"/>',
            *lines,
            "</svg>",
            "",
        ]
    )


if __name__ == "__main__":
    PICTURE.write_text(draw())
