"""Static int8 layers that hand integers on: the first one's epilogue quantizes its output as the second wants it."""

from __future__ import annotations

import itertools
from collections.abc import Container
from typing import Any

import torch
from torch import nn

from fastlinear.layer.linear import precision_of
from fastlinear.model import fusion
from fastlinear.spec.activations import has_hooks
from fastlinear.spec.int8 import Requantize


def find(model: nn.Module, layers: Container[nn.Module]) -> list[tuple[nn.Module, Requantize]]:
    """The layers among `layers` whose output goes into another of them and nowhere else, and what it is to become.

    That is certain in nn.Sequential, where nothing but an absorbed activation, nn.Identity or nn.Dropout in eval mode
    stands between the two. Whoever stands at two places, has hooks (they would see integers), or wants its input
    smoothed first is left out.
    """
    single = fusion.single_places(model)
    found = []
    for sequential in model.modules():
        if isinstance(sequential, nn.Sequential):
            leaves = (leaf for *_, leaf in fusion.leaves(sequential, single))
            doing = [leaf for leaf in leaves if not _is_nothing(leaf)]
            found += [pair for pair in itertools.pairwise(doing) if all(_may_link(e, layers, single) for e in pair)]
    return [(first, out) for first, second in dict(found).items() if (out := _input_of(second)) is not None]


def _is_nothing(module: nn.Module) -> bool:
    if has_hooks(module):
        return False
    idle = isinstance(module, nn.Dropout) and not module.training
    return idle or type(module) in (nn.Identity, fusion.Absorbed)


def _may_link(layer: nn.Module, layers: Container[nn.Module], single: Container[nn.Module]) -> bool:
    return layer in layers and layer in single and not has_hooks(layer)


def _input_of(layer: Any) -> Requantize | None:
    rows = precision_of(layer).rows
    if rows is None or rows.kind != "static" or rows.smooth is not None:
        return None
    return Requantize(torch.uint8, rows.scale, rows.zero)
