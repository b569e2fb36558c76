"""What attention is, in plain torch: the specification that the kernels follow.

Of queries q [B, H, L, D], keys and values k, v [B, G, S, D], where each of the G heads serves H / G heads of q:

    s = (scale q) k^T + mask    a mask of bools adds 0 where it is true, else -inf; causal: query i sees keys 0 to i
    y = sum over keys of e^(s - max s) v / sum over keys of e^(s - max s)

all of it in fp32 (of fp64: in fp64), rounded once at the end. A query that sees no key gives 0, as in torch.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def scores(q: Tensor, k: Tensor, mask: Tensor | None, causal: bool, scale: float | None) -> Tensor:
    """s, [B, H, L, S]; q and k of as many heads."""
    factor = 1 / math.sqrt(q.shape[-1]) if scale is None else scale
    s = (q * factor) @ k.mT
    if causal:
        mask = torch.ones(s.shape[-2:], dtype=torch.bool, device=s.device).tril()
    if mask is None:
        return s
    return s.masked_fill(~mask, -math.inf) if mask.dtype is torch.bool else s + mask.to(s.dtype)


def attention(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, causal: bool = False, scale: float | None = None
) -> Tensor:
    """y, [B, H, L, D], in the dtype of q; k and v may have fewer heads."""
    wide = torch.float64 if q.dtype is torch.float64 else torch.float32
    k, v = (t.to(wide).repeat_interleave(q.shape[1] // t.shape[1], 1) for t in (k, v))
    s = scores(q.to(wide), k, mask, causal, scale)
    highest = s.amax(-1, keepdim=True)
    e = (s - highest.masked_fill(highest == -math.inf, 0)).exp()
    total = e.sum(-1, keepdim=True)
    return ((e @ v) / total.masked_fill(total == 0, 1)).to(q.dtype)


def exact(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, causal: bool = False, scale: float | None = None
) -> tuple[Tensor, Tensor]:
    """y in fp64, and what a result in the dtype of q may be off by (docs/numerics.md says why)."""
    unit, dtype, (q, k, v) = 2.0**-24, q.dtype, (t.double() for t in (q, k, v))
    y = attention(q, k, v, mask, causal, scale)
    k, v = (t.repeat_interleave(q.shape[1] // t.shape[1], 1) for t in (k, v))
    s = scores(q, k, mask, causal, scale)
    seen = s > -math.inf
    off = (q.shape[-1] + 3) * unit * scores(q.abs(), k.abs(), None, False, None if scale is None else abs(scale))
    off = (off + unit * s.abs()).masked_fill(~seen, 0).amax(-1, keepdim=True)
    p, distance = s.softmax(-1).nan_to_num(), (s.amax(-1, keepdim=True) - s).masked_fill(~seen, 0)
    relative = torch.expm1(2 * off) + (2 * k.shape[2] + 16) * unit
    bound = relative * (p @ v.abs()) + unit * ((p * distance) @ v.abs() + (p * distance).sum(-1, True) * y.abs())
    rounding = torch.finfo(dtype).eps / 2 * y.abs() if dtype is not torch.float32 else 0.0
    return y, bound + rounding + torch.finfo(dtype).smallest_normal
