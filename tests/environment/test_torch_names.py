"""What the package needs of torch that torch does not promise to keep."""

import re
from pathlib import Path

import pytest
import torch

import fastlinear._torch as _torch

PACKAGE = Path(__file__).resolve().parent.parent.parent / "fastlinear"
PRIVATE = re.compile(
    r"\btorch\.(?!ops\b)(?:\w+\.)*_(?!check\b|_)[A-Za-z]\w*|from torch[\w.]*(?:\._\w+ import| import _\w+)"
)


@pytest.mark.parametrize("name", [place for places, _ in _torch.PLACES.values() for place in places[:1]])
def test_names(name: str) -> None:
    """This torch has what the package looks up in the first place; what fails here needs a new place in the list."""
    assert _torch.find(name) is not None, f"torch {torch.__version__} has no torch.{name}"


@pytest.mark.parametrize("name", _torch.OPERATORS)
def test_operators(name: str) -> None:
    """This torch has the operators that the tuner races against, where it was built with their library."""
    library = {"mkl": torch.backends.mkl, "mkldnn": torch.backends.mkldnn}[name.split(".")[1]]
    if not library.is_available():
        pytest.skip(f"torch was built without {library.__name__}")
    assert _torch.find(name) is not None, f"torch {torch.__version__} has no torch.{name}"


def test_one_place() -> None:
    """No other file of the package has a private name of torch, but operators, which the list has, too."""
    for path in sorted(PACKAGE.rglob("*.py*")):
        if path.suffix not in (".py", ".pyx", ".pxd") or path.name == "_torch.py":
            continue
        text = path.read_text()
        assert not PRIVATE.findall(re.sub(r"#.*", "", text)), path
        for name in re.findall(r"torch\.(ops\.(?:mkl|mkldnn)\._\w+)", text):
            assert name in _torch.OPERATORS, path


def test_a_name_that_is_gone(monkeypatch: pytest.MonkeyPatch) -> None:
    """A stand-in takes its place, which works; where none can, one sentence names it and this torch."""
    monkeypatch.setattr(_torch, "find", lambda _: None)
    assert _torch.look_up("is_tracing")() is False
    assert _torch.look_up("any_autocast")() is False
    assert not isinstance(0, _torch.look_up("DeviceContext"))
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(torch.ones(2), torch.ones(2))
        assert _torch.look_up("unpack_dual")(dual, level=0)[1] is not None
    with pytest.raises(ImportError, match=rf"needs torch\._C\.DispatchKey, which torch {re.escape(torch.__version__)}"):
        _torch.look_up("DispatchKey")


def test_depths() -> None:
    """Stand-ins of the depths of stacks of modes count what the names themselves count."""
    with torch.device("cpu"):
        for name in ("function_modes", "dispatch_modes"):
            assert _torch.PLACES[name][1]() == _torch.look_up(name)(), name


def test_constants_are_marked_as_torch_marks_them() -> None:
    """Dynamo knows a function whose result it may keep by what torch.compiler.assume_constant_result sets."""
    ours, torchs = _torch.is_constant(lambda: 0), torch.compiler.assume_constant_result(lambda: 0)
    assert vars(ours) == vars(torchs) != {}
