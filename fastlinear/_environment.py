"""The one reading of FASTLINEAR_... variables: what counts as true, and what is said of words that mean neither.

The two that name something (FASTLINEAR_MAX_ISA, FASTLINEAR_KERNEL) are checked by those who know the names.
"""

from __future__ import annotations

import logging
import os

_log = logging.getLogger("fastlinear")

_TRUTH = {"on": True, "true": True, "yes": True, "1": True, "off": False, "false": False, "no": False, "0": False}
_DEFAULTS = {"FASTLINEAR_DISABLE": False, "FASTLINEAR_AUTOTUNE": True, "FASTLINEAR_VERBOSE": False}

_complained: set[tuple[str, str]] = set()


def _switch(name: str) -> bool:
    """What the variable says now, in any case; its default where it is unset, empty, or, with one warning in the log,
    another word: a call of a model is no place to raise for it."""
    given = os.environ.get(name, "").strip()
    if not given:
        return _DEFAULTS[name]
    known = _TRUTH.get(given.lower())
    if known is None and (name, given) not in _complained:
        _complained.add((name, given))
        words = ", ".join(_TRUTH)
        _log.warning("%s is %r, which is none of %s: it counts as %s", name, given, words, int(_DEFAULTS[name]))
    return _DEFAULTS[name] if known is None else known


def disabled() -> bool:
    """FASTLINEAR_DISABLE: every layer runs torch's code."""
    return _switch("FASTLINEAR_DISABLE")


def measures() -> bool:
    """FASTLINEAR_AUTOTUNE: plans may be measured."""
    return _switch("FASTLINEAR_AUTOTUNE")


def verbose() -> bool:
    """FASTLINEAR_VERBOSE: the table of every tuning goes to stderr."""
    return _switch("FASTLINEAR_VERBOSE")


def kernel() -> str | None:
    """FASTLINEAR_KERNEL: what is to run wherever it can; None where it is unset or empty."""
    return os.environ.get("FASTLINEAR_KERNEL") or None


def cache_folder() -> str | None:
    """FASTLINEAR_CACHE_DIR: where the tuning cache lies; None where it is unset or empty."""
    return os.environ.get("FASTLINEAR_CACHE_DIR") or None
