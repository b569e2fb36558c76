"""`fastlinear tune`: the kernels of a user's model are chosen now, so that later processes find them."""

from __future__ import annotations

import argparse
import importlib
import os
import sys
from typing import Any

from torch import nn

from fastlinear.cli.options import SCHEMES, UsageError, check_override
from fastlinear.model import tuning
from fastlinear.model.convert import convert
from fastlinear.model.reporting import report


def tune(options: argparse.Namespace) -> int:
    """Converts and tunes the model that module:function returns with its example inputs, and prints the report."""
    check_override()
    model, example = _load(options.model)
    fast = convert(model, quantize=SCHEMES.get(options.quantize))
    tuning.tune(fast, example)
    print(report(fast))
    return 0


def _load(spec: str) -> tuple[nn.Module, Any]:
    module_name, _, function_name = spec.partition(":")
    if not module_name or not function_name:
        raise UsageError(f"the model is given as module:function, not {spec!r}")
    if os.getcwd() not in sys.path:  # as `python -m` has it
        sys.path.insert(0, os.getcwd())
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        raise UsageError(f"module {module_name!r} cannot be imported from {os.getcwd()}: {error}") from error
    function = getattr(module, function_name, None)
    if not callable(function):
        raise UsageError(f"module {module_name!r} has no function {function_name!r}")
    made = function()
    if not (isinstance(made, tuple) and len(made) == 2 and isinstance(made[0], nn.Module)):
        raise UsageError(f"{spec} must return (model, example_inputs), an nn.Module first, not {type(made).__name__}")
    return made
