"""The one reading of FASTLINEAR_... variables: what counts as true, and what is said of words that mean neither.

FASTLINEAR_KERNEL is checked by those who know the names of kernels.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Collection, Iterable

_log = logging.getLogger("fastlinear")

_TRUTH = {"on": True, "true": True, "yes": True, "1": True, "off": False, "false": False, "no": False, "0": False}
_DEFAULTS = {"FASTLINEAR_DISABLE": False, "FASTLINEAR_AUTOTUNE": True, "FASTLINEAR_VERBOSE": False}

_complained: set[str] = set()


def _switch(name: str) -> bool:
    """What the variable says now, in any case; its default where it is unset, empty, or, with one warning in the log,
    another word: a call of a model is no place to raise for it."""
    given = os.environ.get(name, "").strip()
    if not given:
        return _DEFAULTS[name]
    known = _TRUTH.get(given.lower())
    if known is None:
        _complain(f"{_unknown(name, given, _TRUTH)}: it counts as {int(_DEFAULTS[name])}")
    return _DEFAULTS[name] if known is None else known


def _unknown(name: str, given: str, allowed: Iterable[str]) -> str:
    return f"{name} is {given!r}, which is none of {', '.join(allowed)}"


def _complain(sentence: str) -> None:
    """Once."""
    if sentence not in _complained:
        _complained.add(sentence)
        _log.warning("%s", sentence)


def disabled() -> bool:
    """FASTLINEAR_DISABLE: every layer runs torch's code."""
    return _switch("FASTLINEAR_DISABLE")


def measures() -> bool:
    """FASTLINEAR_AUTOTUNE: plans may be measured."""
    return _switch("FASTLINEAR_AUTOTUNE")


def verbose() -> bool:
    """FASTLINEAR_VERBOSE: the table of every tuning goes to stderr."""
    return _switch("FASTLINEAR_VERBOSE")


def max_isa(known: Collection[str]) -> str | None:
    """FASTLINEAR_MAX_ISA: beyond which of these instruction sets nothing is to run; None where it is unset, empty or
    none of them, which `check_max_isa` says."""
    given = os.environ.get("FASTLINEAR_MAX_ISA", "").strip()
    return given if given in known else None


def check_max_isa(known: Collection[str], severe: bool = False) -> None:
    """Says, once, in the log where FASTLINEAR_MAX_ISA is none of these, and so counts as unset; severe: ValueError."""
    given = os.environ.get("FASTLINEAR_MAX_ISA", "").strip()
    if given and given not in known:
        sentence = _unknown("FASTLINEAR_MAX_ISA", given, known)
        if severe:
            raise ValueError(sentence)
        _complain(f"{sentence}: every instruction set of this CPU may run")


def kernel() -> str | None:
    """FASTLINEAR_KERNEL: what is to run wherever it can; None where it is unset or empty."""
    return os.environ.get("FASTLINEAR_KERNEL") or None


def cache_folder() -> str | None:
    """FASTLINEAR_CACHE_DIR: where the tuning cache lies; None where it is unset or empty."""
    return os.environ.get("FASTLINEAR_CACHE_DIR") or None
