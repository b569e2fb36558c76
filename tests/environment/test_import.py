"""What `import fastlinear` brings: the operators and what they stand on; all else comes when it is asked for."""

import ast
from pathlib import Path

import zygote

import fastlinear

LOADED = 'import sys, fastlinear; print(*(name for name in sys.modules if name.startswith("fastlinear")))'
DEFINED = """
import torch, fastlinear
print(*(name for name in ("linear", "unpack", "experts") if hasattr(torch.ops.fastlinear, name)))
"""


def test_what_an_import_imports() -> None:
    """No whole room beyond `layer`, no scheme, and fewer than 50 modules; yet the operators of exported programs."""
    found = zygote.checked(LOADED, imported="torch").split()
    assert "fastlinear.layer.operator" in found and len(found) < 50
    rooms = {name.split(".")[1] for name in found if name.count(".") > 1}
    assert rooms == {"spec", "plan", "layer"} and "fastlinear.spec.schemes" not in found
    assert zygote.checked(DEFINED, imported="torch").split() == ["linear", "unpack", "experts"]


CONVERTED = """
import sys, torch, fastlinear
fast = fastlinear.convert(torch.nn.Sequential(torch.nn.Linear(8, 8)).eval(), freeze=True)
fast(torch.ones(1, 8))
print(*(name for name in ("torch._dynamo", "torch._inductor", "sympy") if name in sys.modules))
"""


def test_those_who_compile_nothing_import_no_compiler() -> None:
    """Dynamo takes longer to import than a model to convert."""
    assert zygote.checked(CONVERTED, imported="torch").split() == []


def test_those_who_do_not_run_see_the_same_names() -> None:
    """What type checkers and editors read is what is given, from the same modules."""
    tree = ast.parse(Path(str(fastlinear.__file__)).read_text())
    (seen,) = (node for node in tree.body if isinstance(node, ast.If))
    read = [(alias.name, node.module) for node in seen.body if isinstance(node, ast.ImportFrom) for alias in node.names]
    assert dict(read) == fastlinear._PLACES and len(read) == len(fastlinear.__all__) > 20
    for name in fastlinear.__all__:
        assert getattr(fastlinear, name) is vars(fastlinear)[name]
