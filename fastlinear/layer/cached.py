"""Attention over a preallocated cache, in two native calls: rotary embedding with the write, and what is read.

    attend(q, k, v, cos, sin, keys, values, length, mask) -> y [B, H, L, D], the transpose of a contiguous [B, L, H, D]

of q [B, H, L, D] and k, v [B, G, L, D] before they are rotated by cos and sin [B or 1, L, D], a cache of keys and
values [B, G, S, D] that is filled up to `length`, an int64 tensor that grows by L, and a mask that broadcasts to
[B, H, L, S], or None. Where `length` is None the cache is full, as one of a sliding window is: its first L rows leave
it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

import torch
from torch import Tensor

import fastlinear._attention as _attention
import fastlinear._environment as environment
import fastlinear.layer.sdpa as sdpa
from fastlinear._modes import watched
from fastlinear.plan.attention import FEW_QUERIES, Answer
from fastlinear.spec.attention import turned

Attend: TypeAlias = Callable[
    [Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor | None, Tensor | None], Tensor
]


def function(scale: float | None, measure: bool, tell: Callable[[Answer], object]) -> Attend:
    """attend, with this scale of the scores; measure, tell: as in `sdpa.function`, which answers more than a few
    queries."""
    many = sdpa.function(False, scale, True, measure, tell)
    native, store = _attention.attention, _attention.store

    def attend(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        cos: Tensor,
        sin: Tensor,
        keys: Tensor,
        values: Tensor,
        length: Tensor | None,
        mask: Tensor | None,
    ) -> Tensor:
        rows = q.shape[2]
        at = keys.shape[2] - rows if length is None else int(length)
        plain = watched() or torch.is_autocast_enabled("cpu") or environment.disabled() or torch.is_grad_enabled()
        rotated = None if plain else store(q, k, v, cos, sin, keys, values, at, length is None)
        if length is not None:
            length.add_(rows)
        if rotated is None:
            rotated = in_torch(q, k, v, cos, sin, keys, values, at, length is None)
            return sdpa.stock(rotated, keys, values, mask, False, scale, True)
        if rows <= FEW_QUERIES:
            y: Tensor | None = native(rotated, keys, values, mask, False, scale, True)
            if y is not None:
                return y
        end = at + rows
        if mask is not None and not _shows(mask, end, keys.shape[2]):
            keys, values, mask = keys[:, :, :end], values[:, :, :end], mask[..., :end]
        return many(rotated, keys, values, mask)

    return attend


def _shows(mask: Tensor, end: int, keys: int) -> bool:
    """Whether some query may see what of so many keys lies behind `end`."""
    return mask.dtype is not torch.bool or mask.shape[-1] != keys or bool(mask[..., end:].any())


def in_torch(
    q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor, keys: Tensor, values: Tensor, at: int, full: bool
) -> Tensor:
    """fastlinear/spec/attention.py's store as models spell it, with the roundings of their dtype."""
    if full:
        for cache in (keys, values):
            cache.copy_(cache.roll(-q.shape[2], 2))
    rows = torch.arange(at, at + q.shape[2], device=q.device)
    keys.index_copy_(2, rows, turned(k, cos, sin))
    values.index_copy_(2, rows, v)
    return turned(q, cos, sin)
