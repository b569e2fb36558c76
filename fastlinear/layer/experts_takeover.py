"""Experts that transformers holds in fp8 with scales in blocks (FP8Experts): told by their parameters, and taken over.

They become FastExperts, in place, frozen over the very fp8; the class that they had needs kernels that no CPU has.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import nn

from fastlinear.layer import mixture, takeover
from fastlinear.layer.experts_frozen import Frozen
from fastlinear.layer.fitness import odd_memory
from fastlinear.layer.shelf import Shelf, shelve
from fastlinear.spec import programs
from fastlinear.spec.checkpoints import MIXTURES
from fastlinear.spec.checkpoints.scheme import Config, Parts
from fastlinear.spec.experts import Form
from fastlinear.spec.formats import name_of
from fastlinear.spec.int4 import FP8
from fastlinear.spec.precision import Precision, Wanted

_SCHEME = MIXTURES["fp8"]
_BESIDE = ("_scale_inv", "_activation_scale")  # what inputs would be quantized by is let go: they are as they are


class Found(NamedTuple):
    """The weights of both products as a reader of checkpoints has them."""

    form: Form
    products: tuple[Parts, Parts]
    config: Config


def are_foreign(module: nn.Module) -> bool:
    """Whether a module holds experts with scales beside them."""
    own = module._parameters
    return any(own.get(f"{name}_scale_inv") is not None for name in (*mixture.FIRST, mixture.SECOND))


def found(module: Any) -> Found | str:
    """What such experts hold, or in a few words why they cannot be taken over."""
    form, config = mixture.form_of(module), {"weight_block_size": getattr(module, "block_size", None)}
    if isinstance(form, str):
        return form
    if form.transposed or form.interleaved:
        return "its experts are transposed, or their gates take turns, which those of fp8 are not known to be"
    products: list[Parts] = []
    for name in mixture.names_of(module):
        parts: dict[str, torch.Tensor] = {}
        for part in _SCHEME.parts:
            what = name + part
            held = module._parameters.get(what)
            if held is None:
                return f"it has no {what}"
            if (reason := odd_memory(what, held)) is not None:
                return reason
            parts[part] = held.detach()
        weight = parts[""]
        if weight.dtype is not FP8:
            return f"its {name} is {weight.dtype} with scales, and {FP8} is supported"
        try:
            _SCHEME.shape(parts, config)
        except ValueError as error:
            return f"of its {name}: {error}"
        if bool((weight.view(torch.uint8) & 0x7F == 0x7F).any()):
            return f"its {name} has NaN, which kernels of fp8 do not have"
        products.append(parts)
    return Found(form, (products[0], products[1]), config)


def why_not(module: Any, asked: Wanted) -> str | None:
    """Why such experts cannot be taken over as it was asked for, in a few words; None if they can."""
    told = found(module)
    if isinstance(told, str):
        return told
    return None if asked.scheme is None else "its experts are quantized already, to fp8"


def frozen(told: Found, held: torch.dtype) -> tuple[Frozen, Precision]:
    """What stands for the weights, of a model that computes in the dtype `held`, and what they are computed in: fp8, or
    where blocks are as no group can be, floats."""
    first, second = told.products
    shelves = _shelf(told, first, held, programs.is_gated(told.form.program)), _shelf(told, second, held, False)
    kept = all(shelf.packs[0].grouped for shelf in shelves)
    origin = "from fp8" if kept else f"unpacked from fp8 to {shelves[0].format}"
    own = shelves[0].format == name_of(held)
    return Frozen(*shelves, held, (False, False), origin), Precision(None if own else shelves[0].format)


def _shelf(told: Found, parts: Parts, held: torch.dtype, gated: bool) -> Shelf:
    count = len(parts[""])
    weights = (_SCHEME.weight(parts, told.config, expert) for expert in range(count))
    return shelve((takeover.packed_for(weight, held, gated) for weight in weights), count)


def beside(module: nn.Module) -> list[str]:
    """The parameters of such experts that are no weights or biases."""
    return [name for name in module._parameters if name.endswith(_BESIDE)]
