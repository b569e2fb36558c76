"""Whether a layer's weight can be packed as it was asked for, and what stands for one that others quantised."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from fastlinear.layer.frozen import Frozen
from fastlinear.layer.packs import pack_quantized, why_unfit
from fastlinear.spec.foreign import foreign
from fastlinear.spec.int8 import Quantized
from fastlinear.spec.precision import Wanted


def why_weight_unfit(module: Any, asked: Wanted, name: str) -> str | None:
    """Why the parameters of the layer called `name` cannot be packed as asked, in a few words; None if they can."""
    theirs = _theirs(module, asked)
    if isinstance(theirs, str):
        return theirs
    if theirs is not None:
        return asked.why_not(name, theirs.values.shape[1], theirs) or why_unfit(module, but="weight")
    reason = why_unfit(module)
    if reason is not None or asked.scheme is None:
        return reason
    weight = module.weight
    reason = asked.why_not(name, weight.shape[0 if is_transposed(module) else 1])
    if reason is None and weight.numel() > 0 and not bool(torch.stack(weight.detach().aminmax()).isfinite().all()):
        reason = "its weight has infinities or NaN, which no integers stand for"
    return reason


def taken_over(module: Any, asked: Wanted) -> Frozen | None:
    """What stands for the weight of a module that was quantised elsewhere; None where its weight is its own."""
    theirs = _theirs(module, asked)
    if asked.scheme is None or not isinstance(theirs, Quantized):
        return None
    return Frozen(pack_quantized(theirs, asked.scheme.packed), module.weight.dtype)


def is_transposed(module: Any) -> bool:
    """Whether a layer, fast or not, holds its weight as [in, out]."""
    return bool(getattr(module, "_transposed", not isinstance(module, nn.Linear)))


def _theirs(module: Any, asked: Wanted) -> Quantized | str | None:
    """The integers that a module to be quantised has as its weight already, or why they cannot be taken over."""
    own = asked.scheme is None or is_transposed(module)
    return None if own else foreign(module._parameters.get("weight"))
