"""How the channels of a gated weight lie in a pack, so that a tile has what its gates open.

A gated weight is [2 N, K] as its Parameter: the N channels of the gates, then those that go through them. In a pack
they take turns: half a panel of the first, half a panel of the second, as many of each where the last panel is short.
Of N = 40 in panels of 32: gates 0 to 15, through 0 to 15, gates 16 to 31, through 16 to 31, gates 32 to 39, through 32
to 39.
"""

from __future__ import annotations

import torch
from torch import Tensor


def half_of(layout: str) -> int:
    """Channels that lie together in a layout: half a panel of nr, of "fp32/32x1" 16."""
    return int(layout.split("/")[1].split("x")[0]) // 2


def interleave(weight: Tensor, layout: str) -> Tensor:
    """[2 N, ...] as a pack in `layout` has it."""
    return weight[_order(weight.shape[0], half_of(layout))]


def separate(weight: Tensor, layout: str) -> Tensor:
    """[..., 2 N, K] of a pack as the Parameter has it."""
    return weight.index_select(-2, _order(weight.shape[-2], half_of(layout)).argsort())


def _order(channels: int, half: int) -> Tensor:
    place = torch.arange(channels, device="cpu")
    first = place // (2 * half) * (2 * half)  # of the panel
    width = (channels - first).clamp(max=2 * half) // 2
    inside = place - first
    return first // 2 + inside % width + (inside >= width) * (channels // 2)
