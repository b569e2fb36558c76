"""The user's model, which a command is given as module:function, and the shapes of its linear layers."""

from __future__ import annotations

import importlib
import os
import sys
import traceback
from collections.abc import Callable
from contextlib import ExitStack
from difflib import get_close_matches
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from fastlinear.cli.options import UsageError
from fastlinear.model.arguments import call, check_example
from fastlinear.model.selection import linear_layers

Result = TypeVar("Result")
# Whose frames tell users nothing: torch, this package, importlib.
_LIBRARIES = (os.path.dirname(torch.__file__), str(Path(__file__).parent.parent), "<frozen")


def load_model(spec: str) -> tuple[nn.Module, Any]:
    """(model, example_inputs), as the function returns them."""
    module_name, _, function_name = spec.partition(":")
    if not module_name or not function_name:
        raise UsageError(f"the model is given as module:function, not {spec!r}")
    if os.getcwd() not in sys.path:  # as `python -m` has it
        sys.path.insert(0, os.getcwd())
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        raise UsageError(f"module {module_name!r} cannot be imported from {os.getcwd()}: {error}") from error
    except Exception as error:  # whatever its code raises
        raise UsageError(f"module {module_name!r} raises {type(error).__name__} when imported: {error}") from error
    function = getattr(module, function_name, None)
    if not callable(function):
        public = {name: value for name, value in vars(module).items() if not name.startswith("_")}
        named = [name for name, value in public.items() if callable(value) and not isinstance(value, type)]
        near = get_close_matches(function_name, named, 3, 0.0)
        raise UsageError(f"module {module_name!r} has no function {function_name!r}; the nearest are {near or 'none'}")
    made = attempt(spec, function)
    if not (isinstance(made, tuple) and len(made) == 2 and isinstance(made[0], nn.Module)):
        raise UsageError(f"{spec} must return (model, example_inputs), an nn.Module first, not {type(made).__name__}")
    return made


def run(spec: str, function: Callable[..., Any], model: nn.Module, example: Any) -> None:
    """function(model, example), which calls the model; UsageError where that, or the example, will not do."""
    try:
        check_example(example)
    except TypeError as error:
        raise UsageError(str(error)) from None
    attempt(spec, function, model, example)


def attempt(spec: str, function: Callable[..., Result], *arguments: Any) -> Result:
    """function(*arguments), which runs the user's code; UsageError with what that raises, and where."""
    try:
        return function(*arguments)
    except Exception as error:  # whatever its code raises
        own = [
            frame for frame in traceback.extract_tb(error.__traceback__) if not frame.filename.startswith(_LIBRARIES)
        ]
        where = f" at {own[-1].filename}:{own[-1].lineno}" if own else ""
        raise UsageError(f"{spec} raised {type(error).__name__}{where}: {' '.join(str(error).split())}") from error


def shapes_of(spec: str) -> list[tuple[int, ...]]:
    """(M, K, N) of every call of a linear layer in a run of the model, each once, in order."""
    model, example = load_model(spec)
    found: dict[tuple[int, ...], None] = {}

    def note(layer: Any, arguments: tuple[Any, ...], y: Any) -> None:
        if arguments and isinstance(arguments[0], Tensor) and isinstance(y, Tensor) and y.numel():
            k, n = arguments[0].shape[-1], y.shape[-1]
            found[arguments[0].numel() // k, k, n] = None

    with ExitStack() as stack:
        for layer in linear_layers(model):
            stack.callback(layer.register_forward_hook(note).remove)
        stack.enter_context(torch.no_grad())
        run(spec, call, model, example)
    if not found:
        raise UsageError(f"no linear layer is called in a run of what {spec} returns")
    return [*found]
