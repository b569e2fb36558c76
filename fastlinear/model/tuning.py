"""tune: one run of a model in which all its fast layers choose their kernels."""

from __future__ import annotations

import importlib.util
import logging
import sys
import warnings
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from fastlinear.layer import linear
from fastlinear.layer.module import watching
from fastlinear.plan import measuring

Model = TypeVar("Model", bound=nn.Module)

_log = logging.getLogger("fastlinear")


def tune(model: Model, example: Any, *, progress: bool | None = None) -> Model:
    """Run `model` once without gradients, so that every fast layer chooses its kernels now, and return it.

    What first calls could not measure, because their seconds were spent or the machine was busy, is measured now.

    example: what to call the model with: a tensor, a tuple of arguments, or a mapping of keyword arguments. Each batch
        size is tuned for itself: call this once with every one that matters.
    progress: show a bar over the layers, which needs tqdm; None shows it on a terminal where tqdm is installed.
    """
    check_module("tune", model)
    check_example(example)
    if progress and importlib.util.find_spec("tqdm") is None:
        raise ImportError("tune(progress=True) needs the package tqdm, which is not installed")
    run_to_tune(model, example, progress)
    return model


def run_to_tune(model: nn.Module, example: Any, progress: bool | None) -> None:
    pending = set(fast_layers(model))
    if not pending:
        warnings.warn(f"nothing to tune: {type(model).__name__} has no fast layer", stacklevel=3)
    if any(layer.training for layer in pending):
        warnings.warn(f"{type(model).__name__} is in training mode, where fast layers run as torch's do", stacklevel=3)
    with ExitStack() as stack:
        advance = _progress(stack, len(pending), progress)

        def done(layer: Any) -> None:
            if layer in pending:
                pending.discard(layer)
                advance()

        for layer in tuple(pending):
            linear.settle(layer)
        for layer in tuple(pending):
            layer.ask_again()
        stack.enter_context(measuring.process.thorough())
        stack.enter_context(watching(done))
        stack.enter_context(torch.no_grad())
        call(model, example)
        for layer in [layer for layer in pending if layer.plans]:
            done(layer)
    if pending:
        _log.info("the example left %d fast layers of %s without a plan", len(pending), type(model).__name__)


def _progress(stack: ExitStack, total: int, wanted: bool | None) -> Callable[[], object]:
    """What to call after each of `total` steps."""
    if not (sys.stderr.isatty() if wanted is None else wanted) or importlib.util.find_spec("tqdm") is None:
        return lambda: None
    from tqdm import tqdm

    update: Callable[[], object] = stack.enter_context(tqdm(total=total, desc="tuning", unit="layer")).update
    return update


def fast_layers(model: nn.Module) -> list[Any]:
    return [module for module in model.modules() if linear.is_fast(module)]


def check_module(function: str, model: object) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"{function}() takes an nn.Module, but was given {type(model).__name__}")


def call(model: nn.Module, example: Any) -> None:
    """Runs the model on what `check_example` has nothing against."""
    if isinstance(example, Mapping):
        model(**example)
    else:
        model(*example) if isinstance(example, tuple) else model(example)


def check_example(example: object) -> None:
    if not isinstance(example, (Tensor, tuple, Mapping)):
        raise TypeError(
            "the example must be a tensor, a tuple of arguments or a mapping of keyword arguments, "
            f"but is of type {type(example).__name__}"
        )
