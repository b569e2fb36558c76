"""Attention over a preallocated cache, in two native calls: rotary embedding with the write, and what is read.

    attend(q, k, v, cos, sin, keys, values, length, mask, sinks) -> y

which is [B, H, L, D], the transpose of a contiguous [B, L, H, D], of q [B, H, L, D] and k, v [B, G, L, D] before they
are rotated by cos and sin [B or 1, L, D], a cache of keys and values [B, G, S, D] that is filled up to `length`, an
int64 tensor that grows by L, a mask that broadcasts to [B, H, L, S], or None, and sinks [H], or None. Where it is
causal instead, query i sees the first i + 1 rows of the cache. Where `length` is None the cache is full, as one of a
sliding window is: its first L rows leave it. q, k, v and y may be as linear layers have them instead, [B, L, H * D] and
[B, L, G * D].
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

import torch
from torch import Tensor

import fastlinear._attention as _attention
import fastlinear.layer.sdpa as sdpa
from fastlinear._modes import undisturbed
from fastlinear.plan.attention import FEW_QUERIES, Answer
from fastlinear.spec.attention import turned

Attend: TypeAlias = Callable[
    [Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None], Tensor
]


def function(
    causal: bool,
    scale: float | None,
    measure: bool,
    tell: Callable[[Answer], object],
    given: sdpa.Rows | None = None,
    cap: float | None = None,
) -> Attend:
    """attend; causal, scale, measure, tell, cap: as in `sdpa.function`, which answers more than a few queries. given:
    what q, k and v are where they are not cut into heads yet, and y is not to be, either; with B first."""
    many, how = sdpa.function(causal, scale, True, measure, tell, cap=cap), (causal, scale, True)
    native, store = _attention.attention, _attention.store
    whole, heads = given is not None, (0, 0) if given is None else given[:2]

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
        sinks: Tensor | None = None,
    ) -> Tensor:
        rows = q.shape[1 if whole else 2]
        at = keys.shape[2] - rows if length is None else int(length)
        plain = torch.is_grad_enabled() or not undisturbed()
        rotated = None if plain else store(q, k, v, cos, sin, keys, values, at, length is None, None, heads)
        if length is not None:
            length.add_(rows)
        if rotated is None:
            q, k, v = (q, k, v) if given is None else given.cut(q, k, v)
            rotated = in_torch(q, k, v, cos, sin, keys, values, at, length is None)
            return as_given(sdpa.stock(rotated, keys, values, mask, *how, sinks=sinks, cap=cap))
        if causal:
            keys, values = keys[:, :, :rows], values[:, :, :rows]
        if rows <= FEW_QUERIES:
            numbers = sdpa.numbers_of(sinks)
            y: Tensor | None = native(rotated, keys, values, mask, *how, joined=whole, sinks=numbers, cap=cap)
            if y is not None:
                return y
        end = at + rows
        if mask is not None and not _shows(mask, end, keys.shape[2]):
            keys, values, mask = keys[:, :, :end], values[:, :, :end], mask[..., :end]
        return as_given(many(rotated, keys, values, mask, sinks))

    def as_given(y: Tensor) -> Tensor:
        return y if given is None else given.joined(y)

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
