"""The house keeps its plan: who may include or import whom, and what may stand nowhere."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
ISAS = {path.stem for path in (ROOT / "csrc").glob("*.cpp")} - {"registry"}

# Each C++ room, a folder of include/fastlinear or csrc/ beside it, and the rooms whose files its own may include.
CPP_ROOMS = {
    "contract": {"host"},  # what the parts promise one another
    "host": set(),  # what the machine and torch give
    "formats": {"contract"},  # what an element is
    "weight": {"contract", "host"},  # [N, K] <-> panels
    "generic": {"contract", "formats"},  # written once over a vector
    "epilogues": {"contract", "generic"},  # one file a function
    "isa": {"contract", "formats", "generic"},  # one folder an ISA
    "driver": {"contract", "formats", "host", "weight"},  # from a problem to y
    "csrc": {"contract", "host", "generic", "epilogues", "isa"},  # one unit an ISA, and the table
    "benchmarks": set(),
}

# Each Python room, and the rooms it may import; the public face and the command line may import them all.
PYTHON_ROOMS = {
    "_cpu": set(),
    "_kernels": {"_cpu"},
    "_engine": {"_kernels", "environment"},
    "activations": set(),
    "environment": set(),
    "measuring": set(),
    "waits": set(),
    "tuning_cache": {"environment"},
    "autotune": set(),
    "torch_plans": {"activations"},
    "quantize": set(),
    "schemes": {"quantize"},
    "foreign": {"quantize"},
    "precision": {"_kernels", "activations", "quantize", "schemes"},
    "reference": {"_kernels", "activations", "precision", "quantize"},
    "gradient": {"_kernels", "activations", "quantize", "reference"},
    "op_form": {"activations", "precision", "quantize", "reference"},
    "ops": {"_kernels", "activations", "gradient", "op_form", "precision", "quantize"},
    "candidates": {"_kernels", "activations", "environment", "precision", "torch_plans"},
    "planner": {"_kernels", "activations", "autotune", "candidates", "precision", "quantize", "torch_plans"},
    "packs": {"_kernels", "_engine", "planner", "precision", "quantize"},
    "quality": {"_kernels", "packs", "quantize"},
    "lent": set(),
    "frozen": {"_kernels", "_engine", "candidates", "lent", "op_form", "packs", "planner", "precision", "quality"},
    "fitness": {"foreign", "frozen", "packs", "precision", "quantize"},
    "planned": {"_kernels", "_engine", "activations", "candidates", "frozen", "ops", "packs", "planner", "precision"},
    "elsewhere": {"_kernels", "environment", "packs"},
    "fast_module": {
        "_kernels",
        "_engine",
        "activations",
        "elsewhere",
        "environment",
        "ops",
        "packs",
        "planned",
        "planner",
    },
    "linear": {"activations", "fast_module", "fitness", "foreign", "frozen", "ops", "packs", "precision", "schemes"},
    "freeze": {"frozen", "op_form", "packs"},
    "fusion": {"activations", "linear"},
    "chains": {"activations", "fusion", "linear", "quantize"},
    "selection": {"frozen", "linear", "packs", "precision"},
    "bypass": {"linear"},
    "calibration": {"quantize", "schemes", "selection", "tuning"},
    "tuning": {"linear", "measuring"},
    "convert": {"bypass", "chains", "fitness", "freeze", "fusion", "linear", "precision", "schemes", "selection"},
    "report": {"_kernels", "activations", "candidates", "linear", "measuring", "packs", "quality", "selection"},
    "selfcheck": {"_kernels", "activations", "precision", "quantize"},
    "header": set(),
    "safefile": {"header"},
    "stored_scheme": {"_kernels", "header", "precision", "quantize"},
    "manifest": {"_kernels", "activations", "header", "linear", "precision", "stored_scheme"},
    "matching": {"activations", "fitness", "frozen", "fusion", "header", "linear", "manifest", "packs"},
    "inspection": {"_kernels", "header", "manifest", "planner", "quantize", "safefile", "stored_scheme"},
}
PYTHON_ROOMS["planner"] |= {"_engine", "environment", "measuring", "tuning_cache", "waits"}
PYTHON_ROOMS["frozen"] |= {"torch_plans"}
PYTHON_ROOMS["planned"] |= {"environment", "gradient", "quantize", "reference", "torch_plans"}
PYTHON_ROOMS["convert"] |= {"tuning"}
PYTHON_ROOMS["serialize"] = {"_engine", "_kernels", "bypass", "candidates", "frozen", "fusion", "header", "linear"}
PYTHON_ROOMS["serialize"] |= {"manifest", "matching", "packs", "planner", "precision", "safefile", "stored_scheme"}
PYTHON_ROOMS["serialize"] |= {"torch_plans", "tuning_cache"}
PYTHON_ROOMS["stack"] = {"_engine", "_kernels", "frozen", "linear", "packs"}
# The backend lies over all that makes a model fast; nothing but what reads the entry point knows of it.
PYTHON_ROOMS |= {
    "graph.capture": {"activations"},
    "graph.expansions": {"graph.capture"},
    "graph.patterns": {"activations", "graph.capture", "op_form"},
    "graph.options": {"precision", "schemes", "selection"},
    "graph.operators": {"_kernels", "activations", "fast_module", "fitness", "frozen", "op_form", "precision", "stack"},
    "graph.story": {"graph.capture", "report"},
    "graph.rewrite": {"precision", "stack"},
    "graph.backend": {"report"},
    "graph": set(),
}
_GRAPH = [room for room in PYTHON_ROOMS if room.startswith("graph.")]
PYTHON_ROOMS["graph.rewrite"] |= {*_GRAPH} - {"graph.backend", "graph.rewrite"}
PYTHON_ROOMS["graph.backend"] |= {"packs", *_GRAPH} - {"graph.backend"}
PYTHON_ROOMS["graph"] |= {"graph.backend"}
PYTHON_ROOMS |= {room: {*PYTHON_ROOMS, "__init__"} for room in ("__init__", "__main__")}

SOURCES = ["setup.py", *(f"{folder}/**/*" for folder in ("fastlinear", "include", "csrc", "examples", "benchmarks"))]
SUFFIXES = {".py", ".pyi", ".pyx", ".pxi", ".hpp", ".cpp"}

FACTORIES = "empty|zeros|ones|full|rand|randn|randint|randperm|arange|linspace|eye|tensor|as_tensor|scalar_tensor"
NESTED = r"(?:[^()]|\((?:[^()]|\((?:[^()]|\([^()]*\))*\))*\))*"  # the rest of a call's arguments

# (what, in which paths, why not)
FORBIDDEN = [
    (rf"torch\.({FACTORIES}|empty_strided)\((?!{NESTED}device=)", "fastlinear/", "a default device may be set"),
    (r"torch\.Generator\(\)", "fastlinear/", "a default device may be set, and generators follow it"),
    (r"-march=", "", "one library serves every CPU"),
    (r"custom_op\(", "", "it costs 5 to 11 us a call; torch.library.Library costs 3"),
    (r"(import|from) (pickle|marshal|shelve|dill)\b|torch\.load\(", "fastlinear/", "reading a file must not run code"),
    (r"^\s*(import|from) torch\b", "setup.py", "the build needs no torch"),
    (r"#\s*include\s*[<\"](torch|ATen|c10|omp)\b", "", "no libtorch, no second OpenMP"),
    (r"^\s*#\s*define\b", r"(?!include/fastlinear/host/target\.hpp)", "macros stand in target.hpp only"),
]


def sources() -> Iterator[tuple[str, str]]:
    """(path from the root, text) of every source file, without what the build generates."""
    for pattern in SOURCES:
        for path in sorted(ROOT.glob(pattern)):
            if path.suffix in SUFFIXES and not path.match("fastlinear/_*.cpp"):
                yield path.relative_to(ROOT).as_posix(), path.read_text()


def cpp_includes(text: str) -> list[str]:
    return re.findall(r'#include "fastlinear/([^"]+)"', text)


def python_imports(text: str) -> set[str]:
    """The rooms of the package that a Python source imports, at its top or inside a function."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.ImportFrom) and (node.level == 1 or (node.module or "").split(".")[0] == "fastlinear"):
            module = (node.module or "").removeprefix("fastlinear").lstrip(".")
            found |= {module} if module else {alias.name for alias in node.names if alias.name in PYTHON_ROOMS}
        if isinstance(node, ast.Import):
            found |= {alias.name[11:] for alias in node.names if alias.name.startswith("fastlinear.")}
    return found


def _module(path: str) -> str:
    """fastlinear/graph/rewrite.py -> graph.rewrite, fastlinear/graph/__init__.py -> graph"""
    name = path.removeprefix("fastlinear/").removesuffix(".py").replace("/", ".")
    return name.removesuffix(".__init__")


def cython_imports(text: str) -> set[str]:
    return set(re.findall(r"^\s*from fastlinear\.(\w+) c?import", text, re.MULTILINE))


def room_of(path: str) -> str:
    """The folder of a header or unit."""
    return path.removeprefix("include/fastlinear/").split("/")[0]


def isa_of(path: str) -> set[str]:
    return ISAS & set(re.split(r"[/.]", path))


def cpp_trespasses(path: str, text: str) -> list[str]:
    here = room_of(path)
    allowed = CPP_ROOMS.get(here, set()) | {here}
    return [
        f"{path} includes {included}"
        for included in cpp_includes(text)
        if room_of(included) not in allowed or (isa_of(included) and isa_of(included) != isa_of(path))
    ]


def includes_of(path: str, texts: dict[str, str], above: tuple[str, ...] = ()) -> None:
    """Follows the includes of a header; fails where they come back to it."""
    assert path not in above, " -> ".join((*above, path))
    for included in cpp_includes(texts[path]):
        includes_of(f"include/fastlinear/{included}", texts, (*above, path))


def test_cpp_arrows() -> None:
    """Every C++ include follows the plan, and no ISA reaches into another's folder."""
    cpp = [(path, text) for path, text in sources() if path.endswith((".hpp", ".cpp"))]
    assert len(cpp) > 20 and len(ISAS) > 2
    assert [line for path, text in cpp for line in cpp_trespasses(path, text)] == []
    assert {room_of(path) for path, _ in cpp} <= CPP_ROOMS.keys(), "a folder has no room in the plan"
    for path, _ in cpp:
        includes_of(path, dict(cpp))


@pytest.mark.parametrize(
    ("path", "included"),
    [
        ("include/fastlinear/contract/kernel.hpp", "driver/grid.hpp"),
        ("include/fastlinear/isa/avx2/fp32.hpp", "driver/gemm.hpp"),
        ("include/fastlinear/isa/avx2/fp32.hpp", "epilogues/relu.hpp"),
        ("include/fastlinear/isa/avx512_bf16/bf16.hpp", "isa/avx512/bf16.hpp"),
        ("include/fastlinear/generic/tile.hpp", "isa/avx512/fp32.hpp"),
        ("include/fastlinear/generic/convert.hpp", "isa/avx512/vec.hpp"),
        ("include/fastlinear/generic/quantize.hpp", "driver/finish.hpp"),
        ("include/fastlinear/weight/pack.hpp", "driver/gemm.hpp"),
        ("include/fastlinear/epilogues/relu.hpp", "formats/bf16.hpp"),
        ("include/fastlinear/driver/gemm.hpp", "isa/avx2/fp32.hpp"),
        ("include/fastlinear/driver/gemm.hpp", "generic/tile.hpp"),
        ("csrc/avx2.cpp", "isa/avx512/fp32.hpp"),
        ("csrc/avx512_fp16.cpp", "isa/avx512/vec.hpp"),
        ("include/fastlinear/host/cpu.hpp", "contract/kernel.hpp"),
    ],
)
def test_a_forbidden_arrow_is_seen(path: str, included: str) -> None:
    """The check can fail: each of the plan's nevers is reported."""
    assert cpp_trespasses(path, f'#include "fastlinear/{included}"\n')


def test_a_circle_is_seen() -> None:
    """The search for circles can fail."""
    here, there = (f"include/fastlinear/driver/{name}.hpp" for name in "ab")
    texts = {here: '#include "fastlinear/driver/b.hpp"\n', there: '#include "fastlinear/driver/a.hpp"\n'}
    with pytest.raises(AssertionError, match=r"a\.hpp -> .*b\.hpp -> .*a\.hpp"):
        includes_of(here, texts)


def test_python_arrows() -> None:
    """Every import inside the package follows the plan."""
    modules = {_module(path): text for path, text in sources() if re.fullmatch(r"fastlinear/(\w+/)?\w+\.py", path)}
    assert modules.keys() <= PYTHON_ROOMS.keys(), "a module has no room in the plan"
    trespasses = {name: python_imports(text) - PYTHON_ROOMS[name] for name, text in modules.items()}
    cython = {Path(path).stem: text for path, text in sources() if re.fullmatch(r"fastlinear/\w+\.pyx", path)}
    trespasses |= {name: cython_imports(text) - PYTHON_ROOMS[name] for name, text in cython.items()}
    assert {name: rooms for name, rooms in trespasses.items() if rooms} == {}
    assert len(cython) > 1 and cython_imports("from fastlinear._cpu cimport x\n") == {"_cpu"}
    assert "linear" in python_imports("def f():\n    from .linear import FastLinear\n")
    assert python_imports("from . import _kernels, x\nimport fastlinear.ops\nimport torch") == {"_kernels", "ops"}


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
