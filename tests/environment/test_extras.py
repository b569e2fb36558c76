"""fastlinear._extras: packages of an extra that are missing or too old are named in one line, with what is wanted."""

import re
from importlib import metadata
from pathlib import Path

import pytest

import fastlinear._extras as _extras

ROOT = Path(__file__).resolve().parent.parent.parent


@pytest.mark.parametrize("package", _extras._OLDEST)
@pytest.mark.parametrize("there", [None, "0.1", "0.19.9", "2.59.3rc1", "4.57"])
def test_missing_or_too_old(package: str, there: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """The extra and the versions are named, and nothing is said where the version will do."""
    extra, oldest = _extras._OLDEST[package]

    def version(name: str) -> str:
        assert name == package
        if there is None:
            raise metadata.PackageNotFoundError(name)
        return there

    monkeypatch.setattr(metadata, "version", version)
    wanted = f"{package} {oldest} or newer"
    remedy = re.escape(f"pip install 'fastlinear[{extra}]'")
    numbers = [[int(digits) for digits in re.findall(r"\d+", text)[:2]] for text in (there or "", oldest)]
    if numbers[0] >= numbers[1]:
        assert _extras.why_not(package) is None
        return
    reason = "which is not installed" if there is None else f"but {re.escape(there)} is installed"
    with pytest.raises(ImportError, match=f"^a name needs {wanted}, {reason}: {remedy}$"):
        _extras.need(package, "a name")


def test_the_extras_of_the_installation() -> None:
    """pyproject.toml asks for the same versions."""
    text = (ROOT / "pyproject.toml").read_text()
    for package, (extra, oldest) in _extras._OLDEST.items():
        assert re.search(rf'^{extra} = .*"{package}(\[\w+\])?>={re.escape(oldest)}"', text, re.MULTILINE)
