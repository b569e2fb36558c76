"""tune: one run of a model in which all its fast layers choose their kernels."""

from __future__ import annotations

import importlib.util
import logging
import sys
import warnings
from collections.abc import Callable
from contextlib import ExitStack
from difflib import get_close_matches
from typing import Any, TypeVar

import torch
from torch import nn

from fastlinear.layer import experts, linear
from fastlinear.layer.planning import watching
from fastlinear.model.arguments import call, check_example, check_module
from fastlinear.plan import decide, measuring

Model = TypeVar("Model", bound=nn.Module)

_log = logging.getLogger("fastlinear")


def tune(model: Model, example: Any, *, again: bool = False, progress: bool | None = None) -> Model:
    """Run `model` once without gradients, so that every fast layer chooses its kernels now, and return it.

    What first calls could not measure, because their seconds were spent or the machine was busy, is measured now.

    example: what to call the model with: a tensor, a tuple of arguments, or a mapping of keyword arguments. Each batch
        size is tuned for itself: call this once with every one that matters.
    again: measure anew what is known already, too.
    progress: show a bar over the layers, which needs tqdm; None shows it on a terminal where tqdm is installed.
    """
    check_module("tune", model)
    check_example(example)
    if progress and importlib.util.find_spec("tqdm") is None:
        raise ImportError("tune(progress=True) needs tqdm, which is not installed: pip install fastlinear[progress]")
    run_to_tune(model, example, progress, again)
    return model


def force(model: Model, name: str, kernel: str | None) -> Model:
    """Have the fast layer called `name` run one kernel of `kernels()`, or "torch/linear", "torch/mkl", "torch/mkldnn",
    for every batch size and dtype that it can; None goes back to what is measured. Returns the model.

    Raises TypeError for anything but an nn.Module; ValueError for a name of no fast layer and for a kernel that this
    CPU, or the layer's weight as it is packed, does not run on, with those that it does.
    """
    check_module("force", model)
    layer = dict(model.named_modules(remove_duplicate=False)).get(name)
    if layer is None or not linear.is_fast(layer):
        names = [each for each, module in model.named_modules() if linear.is_fast(module)]
        near = get_close_matches(str(name), names, 3, 0.0)
        raise ValueError(f"{type(model).__name__} has no fast layer {name!r}; the nearest are {near or 'none'}")
    linear.force(layer, kernel)
    return model


def clear_cache() -> None:
    """Forget all that was measured on this machine, in this process and on disk. Plans that layers have already stay:
    `tune(model, example, again=True)` measures these anew."""
    decide.cache().clear()


def run_to_tune(model: nn.Module, example: Any, progress: bool | None, again: bool = False) -> None:
    pending = set(fast_layers(model))
    mixtures: list[Any] = [module for module in model.modules() if experts.is_fast_experts(module)]
    if not pending and not mixtures:
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
        if again:
            decide.cache().forget(key for layer in pending for key in layer.problem_keys())
        for layer in tuple(pending):
            layer.ask_again(again)
        for mixture in mixtures:
            if again:
                decide.cache().forget(mixture.problem_keys())
            mixture.ask_again(again)
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
