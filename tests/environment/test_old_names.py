"""What was written or pickled for the flat package of version 0.1 keeps working."""

import importlib
import importlib.metadata
import pickle

import pytest

import fastlinear
from fastlinear._moved import _MOVED


@pytest.mark.parametrize("old", _MOVED)
def test_old_modules_are_the_new_ones(old: str) -> None:
    """An old import path gives the very module that has the place now, so that classes are the same objects."""
    new = importlib.import_module(f"fastlinear.{_MOVED[old]}")
    assert importlib.import_module(f"fastlinear.{old}") is new


@pytest.mark.parametrize(
    ("module", "name"),
    [
        ("linear", "FastLinear"),
        ("activations", "Activation"),
        ("precision", "Precision"),
        ("quantize", "Rows"),
        ("quantize", "Requantize"),
        ("schemes", "Calibration"),
        ("schemes", "Observed"),
        ("frozen", "Frozen"),
        ("frozen", "_packed_again"),
        ("fusion", "Absorbed"),
        ("header", "FormatError"),
        ("candidates", "Chosen"),
    ],
)
def test_old_pickles_find_their_classes(module: str, name: str) -> None:
    """A pickle names module and class; those of version 0.1 are found."""
    found = pickle.loads(f"cfastlinear.{module}\n{name}\n.".encode())
    assert found.__name__ == name
    assert found.__module__ == f"fastlinear.{_MOVED[module]}"


def test_the_front_door_shows_public_names_only() -> None:
    """`dir(fastlinear)` is what is documented, and the version is the installed one."""
    assert {*dir(fastlinear)} == {*fastlinear.__all__, "__version__"}
    assert fastlinear.__version__ == importlib.metadata.version("fastlinear")
