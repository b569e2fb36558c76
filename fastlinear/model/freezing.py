"""freeze and unfreeze: which weights of a model can go, and their way back."""

from __future__ import annotations

import ctypes
import logging
import warnings
from collections import defaultdict
from typing import TypeVar

from torch import nn

from fastlinear.layer import experts, experts_frozen
from fastlinear.layer.embedding import pack_of, unpack_rows
from fastlinear.layer.fitness import why_unread
from fastlinear.layer.form import address_of
from fastlinear.layer.frozen import Freezable, Frozen, is_frozen, thaw_layer
from fastlinear.layer.linear import freeze_layer
from fastlinear.model.arguments import check_module

Model = TypeVar("Model", bound=nn.Module)

# glibc keeps what casts, copies and quantization took and freed, as packs that stay lie between: at most as much as
# weights of so many bytes in fp32 take is left there, where a model of 60 MB once peaked at 2.7 times its file.
_KEPT = 4 << 20

_log = logging.getLogger("fastlinear")


def freeze(model: Model) -> Model:
    """Drop the weights of all fast layers of `model`, layer by layer, keep what they are packed in, and return it.

    `layer.weight` and `state_dict()` unpack on demand: exactly, or what `convert(dtype=...)` rounded it to. `weight` is
    no Parameter then, but a tensor for reading; where a model reads it in call after call (T5 does), it stays unpacked.
    Writing to it (`weight.data += delta`, as LoRA's merge does, `copy_`, an init), loading a state dict, or a change of
    dtype or device makes it a Parameter again, with what was written; tensors of `state_dict()` are copies. A layer
    without a bias shows an empty Parameter, so that `next(model.parameters())` tells dtype and device. Weights that
    something else in `model` uses, an embedding, say, stay, since dropping them would save nothing. Gradients reach
    all but the frozen weights; in training mode each call unpacks, in eval mode each backward.

    Raises TypeError for anything but an nn.Module; warns (UserWarning) of a model without fast layers.
    """
    check_module("freeze", model)
    layers = [module for module in model.modules() if isinstance(module, Freezable)]
    mixtures = [module for module in model.modules() if experts.is_fast_experts(module)]
    if not layers and not mixtures:
        warnings.warn(f"nothing to freeze: {type(model).__name__} has no fast layer", stacklevel=2)
    kept = 0
    for tied in _alone(model):
        kept += 4 * tied[0].in_features * tied[0].out_features
        freeze_layer(*tied)
        if kept > _KEPT:
            _trim()
            kept = 0
    for module in mixtures:
        if module.why_unread() is None:  # type: ignore[operator]
            experts_frozen.freeze(module)
    _trim()
    _log.info("%d of %d fast layers are frozen", sum(map(is_frozen, layers)), len(layers))
    return model


def _trim() -> None:
    """Gives back what the C library holds of freed memory."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def unfreeze(model: Model) -> Model:
    """Undo `freeze` in place, with the ties between layers, and return the model.

    Raises TypeError for anything but an nn.Module.
    """
    check_module("unfreeze", model)
    tied: dict[Frozen, nn.Parameter] = {}
    for module in model.modules():
        if (frozen := pack_of(module)) is not None:  # first, while it knows the layers that are tied to it
            unpack_rows(module, tied.get(frozen))
            tied[frozen] = module.weight  # type: ignore[assignment]
    for module in model.modules():
        if isinstance(module, Freezable):
            thaw_layer(module)
        elif experts.is_fast_experts(module):
            experts_frozen.thaw(module)
    return model


def _alone(model: nn.Module) -> list[list[Freezable]]:
    """The fast layers whose weights nothing else in the model uses; those with the same weight and pack together.

    Only layers are held here, so that each weight can go as soon as it is packed.
    """
    users = defaultdict(list)
    for module in model.modules():
        for name, tensor in (*module._parameters.items(), *module._buffers.items()):
            if tensor is not None:
                users[address_of(tensor) or id(tensor)].append((module, name, id(tensor)))
    groups = []
    for uses in users.values():
        fast = [module for module, name, _ in uses if name == "weight" and isinstance(module, Freezable)]
        if len(fast) == len(uses) and not any(map(why_unread, fast)):
            kinds = {
                (key, layer.packed_as, layer._transposed, id(layer.precision.smooth))
                for layer, (*_, key) in zip(fast, uses, strict=True)
            }
            groups += [fast] if len(kinds) == 1 else []
    return groups
