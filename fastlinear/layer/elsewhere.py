"""Why a call of a fast layer went round the kernels, in a few words; looked at only once it has."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

import fastlinear._environment as environment
import fastlinear._reasons as _reasons
import fastlinear._tensors as _tensors
import fastlinear._torch as _torch
from fastlinear.layer.fitness import dtype_of, why_unread
from fastlinear.layer.frozen import record_of


def why_elsewhere(layer: Any, x: Any, stale: bool) -> str:
    """The first of all reasons that there are for a call layer(x) not to be answered by the kernels. stale: whether the
    weight was not packed, or changed since."""
    reason = why_switched_off(layer) or why_watched() or _why_input(layer, x) or why_unread(layer)
    return reason or (_reasons.CHANGING if stale else "the form of its tensors")


def why_switched_off(layer: Any) -> str | None:
    """Training mode, or what the user set."""
    if layer.training:
        return _reasons.TRAINING
    return _reasons.SWITCHED_OFF if environment.disabled() else None


def why_watched() -> str | None:
    """The mode of torch that rewrites or records calls, the innermost first."""
    interpreter = _torch.transform()
    if interpreter is not None:
        return str(interpreter.key()).rpartition(".")[2].lower()  # vmap, grad, jvp, functionalize
    if torch.compiler.is_exporting():
        return "torch.export"
    if _torch.is_tracing():
        return "torch.jit.trace"
    if forward_ad._current_level >= 0:
        return "forward-mode AD"
    for depth, mode_at in (
        (_torch.dispatch_modes(), _torch.dispatch_mode_at),
        (_torch.function_modes(), _torch.function_mode_at),
    ):
        for level in reversed(range(depth)):
            if type(mode := mode_at(level)) is not _torch.DeviceContext:  # which rewrites nothing but factories
                return type(mode).__name__
    return None


def _why_input(layer: Any, x: Any) -> str | None:
    if not isinstance(x, Tensor) or type(x) not in (Tensor, torch.nn.Parameter):
        return f"an input of type {type(x).__name__}"
    if x.is_nested:
        return "a nested input"
    if x.device.type != "cpu":
        return f"an input on device {x.device}"
    if x.layout is not torch.strided:
        return f"an input that is {x.layout}, not dense"
    weight = dtype_of(layer) if record_of(layer) is not None or layer._parameters.get("weight") is not None else None
    if weight in _tensors.FORMATS and not layer.precision.takes(x.dtype):
        return f"an input of {x.dtype}"
    return None
