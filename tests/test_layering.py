"""The house keeps its plan: who may include or import whom, and what may stand nowhere."""

import ast
import graphlib
import re
from collections.abc import Iterator
from pathlib import Path

import house
import pytest

ROOT = Path(__file__).resolve().parent.parent
ISAS = {path.stem for path in (ROOT / "csrc").glob("*.cpp")} - {"registry"}

SOURCES = ["setup.py", *(f"{folder}/**/*" for folder in ("fastlinear", "include", "csrc", "examples", "benchmarks"))]
SUFFIXES = {".py", ".pyi", ".pyx", ".pxd", ".pxi", ".hpp", ".cpp"}

FACTORIES = "empty|zeros|ones|full|rand|randn|randint|randperm|arange|linspace|eye|tensor|as_tensor|scalar_tensor"
FLOATS = "empty|zeros|ones|full|rand|randn|linspace|eye|tensor|as_tensor|scalar_tensor"  # torch's default dtype
NESTED = r"(?:[^()]|\((?:[^()]|\((?:[^()]|\([^()]*\))*\))*\))*"  # the rest of a call's arguments

# (what, in which paths, why not)
FORBIDDEN = [
    (rf"torch\.({FACTORIES}|empty_strided)\((?!{NESTED}device=)", "fastlinear/", "a default device may be set"),
    (
        rf"torch\.({FLOATS})\((?!{NESTED}dtype=)",
        r"fastlinear/(?!cli/(bench|check))",
        "a default dtype may be set",
    ),
    (r"torch\.Generator\(\)", "fastlinear/", "a default device may be set, and generators follow it"),
    (r"-march=", "", "one library serves every CPU"),
    (r"custom_op\(", "", "it costs 5 to 11 us a call; torch.library.Library costs 3"),
    (r"(import|from) (pickle|marshal|shelve|dill)\b|torch\.load\(", "fastlinear/", "reading a file must not run code"),
    (r"^\s*(import|from) torch\b", "setup.py", "the build needs no torch"),
    (r"#\s*include\s*[<\"](torch|ATen|c10|omp)\b", "", "no libtorch, no second OpenMP"),
    (
        r'extern from "fastlinear/(host/parallel|driver/(gemm|cut|ceiling))\.hpp"|\bnormalize\(const',
        r"fastlinear/_(?!products\.pyx)",
        "the pool of threads and their scratch memory are those of one shared library",
    ),
    (r"^\s*include \"", "fastlinear/_", "a module, not text that others paste"),
    (r"^\s*#\s*define\b", r"(?!include/fastlinear/host/target\.hpp)", "macros stand in target.hpp only"),
]


def sources() -> Iterator[tuple[str, str]]:
    """(path from the root, text) of every source file, without what the build generates."""
    for pattern in SOURCES:
        for path in sorted(ROOT.glob(pattern)):
            if path.suffix in SUFFIXES and not path.match("fastlinear/_*.cpp"):
                yield path.relative_to(ROOT).as_posix(), path.read_text()


def isa_of(path: str) -> set[str]:
    return ISAS & set(re.split(r"[/.]", path))


def trespasses(room: str, path: str, text: str) -> list[str]:
    """What a file of a room includes or imports that the table does not let it."""
    allowed = {*house.ROOMS[room].uses, room}
    return [
        f"{path} uses {name or 'the front door'}"
        for used, name in house.used_rooms(path, text)
        if used not in allowed
        or (isa_of(name) and isa_of(path) and isa_of(name) != isa_of(path) and not borrows(path, name))
    ]


def borrows(path: str, name: str) -> bool:
    """Whether an ISA that only adds arithmetic uses the vectors of another one."""
    own = [house.ROOT / "include/fastlinear/isa" / isa / "vec.hpp" for isa in isa_of(path)]
    return name.endswith("/vec.hpp") and not any(file.exists() for file in own)


def hold_no_circle(uses: dict[str, set[str]]) -> None:
    """Fails where what a file uses comes back to it."""
    try:
        graphlib.TopologicalSorter(uses).prepare()
    except graphlib.CycleError as error:
        raise AssertionError(" -> ".join(error.args[1])) from None


@pytest.mark.parametrize("room", house.ROOMS)
def test_arrows(room: str) -> None:
    """Every include and import of a room goes where the table allows, and no ISA reaches into another's folder, but one
    without vectors of its own for those."""
    files = list(house.sources(room))
    assert files
    assert [line for path, text in files for line in trespasses(room, path, text)] == []


def test_every_file_has_a_room() -> None:
    """No source of the package stands outside the rooms, but for the front door."""
    placed = {path for room in house.ROOMS for path, _ in house.sources(room)} | {*house.FRONT}
    package = [path for path, _ in sources() if path.startswith(("fastlinear/", "include/", "csrc/"))]
    assert len(package) > 100
    assert [path for path in package if path not in placed and not path.endswith(".pyi")] == []


def test_arrows_go_down() -> None:
    """The rooms have no circle, neither as the table has them nor as the sources do."""
    for uses in ({room: {*house.ROOMS[room].uses} for room in house.ROOMS}, _by_user(house.arrows())):
        hold_no_circle(uses)


def _by_user(pairs: set[tuple[str, str]]) -> dict[str, set[str]]:
    return {user: {used for other, used in pairs if other == user} for user, _ in pairs}


@pytest.mark.parametrize("name", ["package", house.CPP])
def test_a_house_is_seen_at_once(name: str) -> None:
    """At most 20 rooms on 8 floors, and no arrow that runs up."""
    rooms, pairs = house.houses()[name]
    level = house.floors(rooms, pairs)
    assert pairs and all(level[used] < level[user] for user, used in pairs)
    assert len(rooms) <= 20 and max(level.values()) < 8


@pytest.mark.parametrize("room", [room for room in house.ROOMS if house.ROOMS[room].files[0].startswith("include/")])
def test_headers_have_no_circle(room: str) -> None:
    """Within a room, too, includes go one way."""
    prefix = "include/fastlinear/"
    uses = {path: {prefix + name for name in house.cpp_includes(text)} for path, text in house.sources(room)}
    hold_no_circle(uses)


def test_modules_have_no_circle() -> None:
    """Nor do the modules of the package import one another in a circle, not even inside functions."""
    texts = {path: text for room in house.ROOMS for path, text in house.sources(room) if path.endswith(".py")}
    uses = {path: {*modules_of(path, text)} & texts.keys() for path, text in texts.items()}
    assert sum(map(len, uses.values())) > 100
    hold_no_circle(uses)


def modules_of(path: str, text: str) -> Iterator[str]:
    """The files that the imports of a module may mean."""
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("fastlinear."):
            folder = (node.module or "").replace(".", "/")
            yield f"{folder}.py"
            yield from (f"{folder}/{alias.name}.py" for alias in node.names)


@pytest.mark.parametrize(
    ("path", "line"),
    [
        ("include/fastlinear/contract/kernel.hpp", '#include "fastlinear/driver/grid.hpp"'),
        ("include/fastlinear/isa/avx2/fp32.hpp", '#include "fastlinear/driver/gemm.hpp"'),
        ("include/fastlinear/isa/avx2/fp32.hpp", '#include "fastlinear/epilogues/relu.hpp"'),
        ("include/fastlinear/isa/avx512_bf16/bf16.hpp", '#include "fastlinear/isa/avx512/bf16.hpp"'),
        ("include/fastlinear/generic/tile.hpp", '#include "fastlinear/isa/avx512/fp32.hpp"'),
        ("include/fastlinear/weight/pack.hpp", '#include "fastlinear/driver/gemm.hpp"'),
        ("include/fastlinear/epilogues/relu.hpp", '#include "fastlinear/formats/bf16.hpp"'),
        ("include/fastlinear/driver/gemm.hpp", '#include "fastlinear/generic/tile.hpp"'),
        ("include/fastlinear/host/cpu.hpp", '#include "fastlinear/contract/kernel.hpp"'),
        ("csrc/avx2.cpp", '#include "fastlinear/isa/avx512/fp32.hpp"'),
        ("include/fastlinear/isa/avx2/fp32.hpp", '#include "fastlinear/isa/avx512/vec.hpp"'),
        ("fastlinear/_engine.pyx", "from fastlinear.layer import linear"),
        ("fastlinear/spec/int8.py", "from fastlinear.plan.decide import decide"),
        ("fastlinear/plan/decide.py", "def f():\n    from fastlinear.layer.linear import FastLinear"),
        ("fastlinear/model/convert.py", "from fastlinear import FastLinear"),
        ("fastlinear/model/convert.py", "import fastlinear"),
        ("fastlinear/file/saving.py", "import fastlinear.cli.check"),
    ],
)
def test_a_forbidden_arrow_is_seen(path: str, line: str) -> None:
    """The check can fail: each of the table's nevers is reported."""
    (room,) = (room for room in house.ROOMS if path in dict(house.sources(room)))
    assert trespasses(room, path, f"{line}\n")


def test_a_circle_is_seen() -> None:
    """The search for circles can fail."""
    with pytest.raises(AssertionError, match=r"a -> b -> a|b -> a -> b"):
        hold_no_circle({"c": {"a"}, "a": {"b"}, "b": {"a"}})


def test_the_picture_is_of_this_tree() -> None:
    """docs/architecture.svg is what `python tests/house.py` draws."""
    assert house.PICTURE.read_text() == house.draw()


LONGEST = 50  # lines of a function, its docstring aside: what can be read without scrolling


def too_long(path: str, text: str) -> Iterator[str]:
    """The functions of a module whose bodies are longer than LONGEST."""
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            body = node.body[1:] if ast.get_docstring(node) is not None else node.body
            lines = body[-1].end_lineno - body[0].lineno + 1 if body else 0
            if lines > LONGEST:
                yield f"{path}: {node.name} has {lines} lines"


def test_functions_are_short() -> None:
    """Files are as long as one idea; it is functions that must be seen at once."""
    python = [(path, text) for path, text in sources() if path.endswith(".py")]
    assert len(python) > 200
    assert [line for path, text in python for line in too_long(path, text)] == []


def test_a_long_function_is_seen() -> None:
    """The check can fail, and a docstring does not count."""
    assert [*too_long("a.py", "def f():\n" + "    x = 1\n" * (LONGEST + 1))] == [f"a.py: f has {LONGEST + 1} lines"]
    assert not [*too_long("a.py", 'def f():\n    """' + "x\n" * 99 + '"""\n' + "    x = 1\n" * LONGEST)]


@pytest.mark.parametrize(("pattern", "where", "reason"), FORBIDDEN, ids=[reason for *_, reason in FORBIDDEN])
def test_forbidden_things_are_absent(pattern: str, where: str, reason: str) -> None:
    """What must not stand in the sources does not."""
    searched = [(path, text) for path, text in sources() if re.match(where, path)]
    assert searched
    assert [path for path, text in searched if re.search(pattern, text, re.MULTILINE)] == [], reason


def test_few_macros() -> None:
    """target.hpp, the only header with macros, defines at most four."""
    text = (ROOT / "include/fastlinear/host/target.hpp").read_text()
    assert 1 <= len(set(re.findall(r"#\s*define\s+(\w+)", text))) <= 4


def test_the_build_needs_setuptools_and_cython_only() -> None:
    """pip's isolated build environment holds nothing else, least of all torch."""
    project = (ROOT / "pyproject.toml").read_text()  # Python 3.10 has no tomllib
    (requires,) = re.findall(r"^requires = \[(.*)\]$", project, re.MULTILINE)
    assert set(re.findall(r'"(\w+)', requires)) == {"setuptools", "cython"}
