"""Packages that are no dependency, but an extra of the installation: how old they may be, and one line where they are
missing or older."""

import re
from importlib import metadata

_OLDEST = {"transformers": ("hf", "5.0"), "ray": ("ray", "2.60"), "peft": ("peft", "0.20")}  # extra, version


def need(package: str, who: str) -> None:
    """Raises ImportError in the name of `who` where a package is missing, or too old."""
    if (reason := why_not(package)) is not None:
        raise ImportError(f"{who} needs {reason}")


def why_not(package: str) -> str | None:
    """What is wanted instead of what is there, in one line; None where that will do."""
    extra, oldest = _OLDEST[package]
    try:
        there = metadata.version(package)
    except metadata.PackageNotFoundError:
        reason = "which is not installed"
    else:
        if _numbers(there) >= _numbers(oldest):
            return None
        reason = f"but {there} is installed"
    return f"{package} {oldest} or newer, {reason}: pip install 'fastlinear[{extra}]'"


def _numbers(version: str) -> tuple[int, ...]:
    """Of a version its major and minor number; what else it may say does not matter here."""
    return tuple(int(digits) for digits in re.findall(r"\d+", version)[:2])
