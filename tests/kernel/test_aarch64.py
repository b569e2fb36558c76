"""The library compiles for aarch64; `make aarch64` runs it there."""

import shutil
import subprocess

import pytest
from library import ROOT

COMPILER = "aarch64-linux-gnu-g++"
UNITS = ["csrc/registry.cpp", "csrc/scalar.cpp", "tests/kernel/product.cpp"]


@pytest.mark.skipif(shutil.which(COMPILER) is None, reason=f"{COMPILER} is not installed")
@pytest.mark.parametrize("unit", UNITS)
def test_portable_units(unit: str) -> None:
    """The table, the scalar ISA and the driver hold nothing of one architecture that the others do not leave out."""
    options = ["-std=c++20", "-Wall", "-Wextra", "-Werror", "-fsyntax-only", f"-I{ROOT / 'include'}"]
    done = subprocess.run([COMPILER, *options, ROOT / unit], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
