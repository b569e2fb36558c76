"""docs/kernels.md says how to add a kernel, an ISA, an activation and a format: its blocks, applied to a copy, do."""

import importlib.util
import os
import re
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType, SimpleNamespace

import library
import native
import pytest
import torch

import fastlinear._kernels as _kernels

ROOT = library.ROOT
PAGE = ROOT / "docs/kernels.md"


def follow(tree: Path) -> None:
    """Does in a copy of the tree what the page says: ```cpp PATH is a new file, ```diff PATH a change of one."""
    blocks = re.findall(r"^```(cpp|diff) (\S+)\n(.*?)^```$", PAGE.read_text(), re.MULTILINE | re.DOTALL)
    assert {kind for kind, _, _ in blocks} == {"cpp", "diff"}
    for kind, name, text in blocks:
        path = tree / name
        if kind == "cpp":
            assert not path.exists(), f"{name} is there already"
            path.parent.mkdir(exist_ok=True)
            path.write_text(text)
            continue
        lines = text.splitlines(keepends=True)
        before = "".join(line[1:] for line in lines if line[0] != "+")
        after = "".join(line[1:] for line in lines if line[0] != "-")
        assert path.read_text().count(before) == 1, f"{name} has not once what {PAGE.name} changes in it: {before}"
        path.write_text(path.read_text().replace(before, after))


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the sources, with all that the page adds."""
    folder = tmp_path_factory.mktemp("recipes")
    unwanted = shutil.ignore_patterns("__pycache__", "*.so", *(path.with_suffix(".cpp").name for path in PYX))
    for name in ("include", "csrc", "fastlinear"):
        shutil.copytree(ROOT / name, folder / name, ignore=unwanted)
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder)
    follow(folder)
    return folder


FORMAT = "include/fastlinear/contract/format.hpp"
PYX = sorted(ROOT.glob("fastlinear/*.pyx"))


@pytest.fixture(scope="module")
def multiply(tree: Path) -> library.Product:
    """The products of the copy, built without the wide ISAs, which would take a minute more."""
    small = tree / "small"
    small.mkdir()
    table = (tree / "csrc/registry.cpp").read_text()
    (start, listed), *others = re.findall(r"(kIsas\[\] = \{)([^}]*)\}", table)
    assert not others
    kept = [name for name in re.findall(r"&\w+::kIsa", listed) if name in ("&toy::kIsa", "&scalar::kIsa")]
    assert len(kept) == 2
    (small / "registry.cpp").write_text(table.replace(start + listed, start + ", ".join(kept)))
    isas = [library.of_products(tree / f"csrc/{name}.cpp", small) for name in ("scalar", "toy")]
    units = [small / "registry.cpp", *isas, library.PRODUCT]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        objects = list(pool.map(lambda unit: library.compile(unit, tree, small / f"{unit.stem}.o"), units))
    return library.product_of(library.link(small / "recipes.so", objects))


@pytest.fixture(autouse=True)
def grown_tables(tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """tests/library.py gives formats and functions by their numbers, of which the copy has one more each."""
    last = library.FUNCTIONS.index("quick_gelu") + 1
    monkeypatch.setattr(library, "FUNCTIONS", [*library.FUNCTIONS[:last], "softsign", *library.FUNCTIONS[last:]])
    enum = re.search(r"enum class Format : std::uint8_t {(.*)}", (tree / FORMAT).read_text())
    assert enum is not None
    monkeypatch.setattr(library, "FORMATS", enum[1].replace(" ", "").split(","))


def scalar() -> native.Kernel:
    (kernel,) = (kernel for kernel in native.ALL if kernel["id"] == "fp32/scalar/4x16")
    return kernel


@pytest.mark.parametrize("name", ["fp32/scalar/8x16", "fp32/toy/3x16"])
def test_a_kernel_and_an_isa(multiply: library.Product, name: str) -> None:
    """The kernel of each multiplies exactly, at every number of rows that its tiles leave over, cut along K as well."""
    for m in range(1, 10):
        x, w, b = native.exact_case(scalar(), m, 37, 11, scalar()["dtypes"][0])
        packed, y = native.pack(w, "fp32/16x1"), torch.empty(m, 37)
        for k_slices in (1, 3):
            native.check(
                scalar(), multiply(scalar() | {"name": name}, packed, x, b, [], 1, k_slices, y), x, w, b, exact=True
            )


def test_every_epilogue_of_an_isa(multiply: library.Product) -> None:
    """The new ISA has the vectors of the one that it is based on, and every activation that they know."""
    for name, params in _kernels.activations().items():
        x, w, b = native.random_case(7, 37, 11, scalar()["dtypes"][0])
        packed, y, expected = native.pack(w, "fp32/16x1"), torch.empty(7, 37), torch.empty(7, 37)
        multiply(scalar() | {"name": "fp32/toy/3x16"}, packed, x, b, [(name, params)], 2, 3, y)
        native.run(scalar(), x, w, b, [(name, params)], threads=2, k_slices=3, out=expected)
        assert native.same_bits(y, expected), name


def meaning(tree: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location("activations_of_the_copy", tree / "fastlinear/spec/activations.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_an_activation(multiply: library.Product, tree: Path) -> None:
    """It is what its line in Python says, and it is found by the names that this gives it."""
    activations = meaning(tree)
    x, w, b = native.random_case(7, 37, 11, scalar()["dtypes"][0])
    packed, sums, y = native.pack(w, "fp32/16x1"), torch.empty(7, 37), torch.empty(7, 37)
    multiply(scalar(), packed, x, b, [], 1, 1, sums)
    multiply(scalar(), packed, x, b, [("softsign", ())], 1, 1, y)
    assert (sums > 0).any() and (sums < 0).any()
    torch.testing.assert_close(y, activations.apply(activations.resolve("softsign"), sums), rtol=1e-6, atol=0)
    assert [*activations.names()][-1] == "softsign"


def test_a_format(multiply: library.Product) -> None:
    """Small integers, which it holds, multiply exactly; its panels are those that every layout of 16x1 has."""
    w = torch.randint(-4, 5, (37, 11)).to(torch.float8_e5m2)
    x, y = torch.randint(-4, 5, (7, 11)).float(), torch.empty(7, 37)
    panels = torch.nn.functional.pad(w.view(torch.uint8), (0, 0, 0, -37 % 16)).view(-1, 16, 11).transpose(1, 2)
    packed = SimpleNamespace(layout="e5m2/16x1", data=panels.contiguous(), n=37, k=11, zero=None)
    kernel = scalar() | {"name": "e5m2/scalar/4x16", "reads": ("e5m2/16x1",)}
    assert torch.equal(multiply(kernel, packed, x, None, [], 1, 1, y), x @ w.float().T)


CHECK = """
import torch, transformers, fastlinear
from torch import nn
from fastlinear import _kernels, _plans, _products, _weights

names = [row["name"] for row in fastlinear.kernels()]
assert {"fp32/scalar/8x16", "fp32/toy/3x16", "e5m2/scalar/4x16"} <= set(names)
assert "toy" in fastlinear.cpu_info()["isas"]
assert "softsign" in _kernels.activations()

w, x, y = torch.randint(-4, 5, (37, 11)), torch.randint(-4, 5, (7, 11)).float(), torch.empty(7, 37)
packed = _weights.Packed(w.to(torch.float8_e5m2), "e5m2/16x1")
assert torch.equal(packed.unpack().float(), w.float())
_products.run(packed, _plans.Plan("e5m2/scalar/4x16"), _plans.Epilogue(), x, None, y)
assert torch.equal(y, x @ w.float().T)

model = nn.Sequential(nn.Linear(11, 37), nn.Softsign()).eval()
fast = fastlinear.convert(model)
with torch.inference_mode():
    torch.testing.assert_close(fast(x), model(x))
(layer,) = fastlinear.report(fast)
assert layer.activation.name == "softsign" and layer.buckets[0].name in RUNS, layer
"""


@pytest.mark.exhaustive
def test_the_whole_package(tree: Path) -> None:
    """The copy builds as users build it, all four are found from Python, and the ISA runs a converted model."""
    environment = os.environ | {"PYTHONPATH": str(tree), "FASTLINEAR_AUTOTUNE": "0"}
    subprocess.run([sys.executable, "setup.py", "-q", "build_ext", "--inplace"], cwd=tree, env=environment, check=True)
    for kernel in ("fp32/toy/3x16", "fp32/scalar/8x16"):
        forced = environment | {"FASTLINEAR_KERNEL": kernel, "FASTLINEAR_MAX_ISA": "toy"}
        subprocess.run([sys.executable, "-c", CHECK.replace("RUNS", repr([kernel]))], cwd=tree, env=forced, check=True)
