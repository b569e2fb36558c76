"""What attention is, in plain torch: the specification that the kernels follow.

Of queries q [B, H, L, D], keys and values k, v [B, G, S, D], where each of the G heads serves H / G heads of q:

    s = (scale q) k^T + mask    a mask of bools adds 0 where it is true, else -inf; causal: query i sees keys 0 to i
    y = sum over keys of e^(s - max s) v / sum over keys of e^(s - max s)

where, with a cap, s is cap tanh(scale q k^T / cap) + mask instead; and with sinks, one number for each head, the last
sum has e^(sink - max s) more, and max s is not below the sink, which is the score of one key more, without a value.

All of it is in fp32 (of fp64: in fp64), rounded once at the end. A query that sees no key gives 0, as in torch. In
products of bf16, q, k, v and the numerators e^(s - max s) are rounded to it before they are multiplied, once; the sum
that y is divided by is that of the numerators as they were.

Rotary embedding of x [B, H, L, D] by cos and sin [B or 1, L, D], of which h(x) is the second half of its elements,
negated, and then the first:

    y = x cos + h(x) sin        rounded once at the end, too
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor


def scores(
    q: Tensor,
    k: Tensor,
    mask: Tensor | None = None,
    causal: bool = False,
    scale: float | None = None,
    cap: float | None = None,
) -> Tensor:
    """s, [B, H, L, S]; q and k of as many heads."""
    factor = 1 / math.sqrt(q.shape[-1]) if scale is None else scale
    s = (q * factor) @ k.mT
    s = s if cap is None else cap * (s / cap).tanh()
    if causal:
        mask = torch.ones(s.shape[-2:], dtype=torch.bool, device=s.device).tril()
    if mask is None:
        return s
    return s.masked_fill(~mask, -math.inf) if mask.dtype is torch.bool else s + mask.to(s.dtype)


def additive(mask: Tensor, of_bools: bool, dtype: torch.dtype) -> Tensor:
    """nn.MultiheadAttention's masks, which are true where nothing is to be looked at, as what is added to s."""
    return torch.zeros_like(mask, dtype=dtype).masked_fill(mask, -math.inf) if of_bools else mask


def with_weights(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, size: int, average: bool, dropout: float = 0.0
) -> tuple[Tensor, Tensor]:
    """y and the weights that nn.MultiheadAttention returns beside it, [B, H, L, S], or their mean over H, of heads of
    `size` numbers. In torch's steps, and by the arguments alone, so that a graph can be spelled out by it."""
    s = (q * math.sqrt(1.0 / size)) @ k.transpose(-2, -1)
    weights = torch.softmax(s if mask is None else s + mask, -1)
    weights = F.dropout(weights, dropout) if dropout > 0 else weights
    return weights @ v, weights.mean(1) if average else weights


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None = None,
    causal: bool = False,
    scale: float | None = None,
    products: torch.dtype | None = None,
    sinks: Tensor | None = None,
    cap: float | None = None,
) -> Tensor:
    """y, [B, H, L, D], in the dtype of q; k and v may have fewer heads. products: what is rounded to before. sinks:
    [H]."""
    wide = torch.float64 if q.dtype is torch.float64 else torch.float32
    rows, k, v = (t.to(products or t.dtype).to(wide) for t in (q, k, v))
    k, v = (t.repeat_interleave(q.shape[1] // t.shape[1], 1) for t in (k, v))
    s = scores(rows, k, mask, causal, scale, cap)
    highest = s.amax(-1, keepdim=True)
    if sinks is not None:
        sinks = sinks.to(wide)[:, None, None]
        highest = highest.maximum(sinks)
    e = (s - highest.masked_fill(highest == -math.inf, 0)).exp()
    total = e.sum(-1, keepdim=True) + (0 if sinks is None else (sinks - highest).exp())
    e = e.to(products or wide).to(wide)
    return ((e @ v) / total.masked_fill(total == 0, 1)).to(q.dtype)


def rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """y, in the shape and dtype of x."""
    wide = torch.float64 if x.dtype is torch.float64 else torch.float32
    return turned(x.to(wide), cos.to(wide), sin.to(wide)).to(x.dtype)


def turned(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """The same, with the roundings of the dtype of all three, as models have it."""
    low, high = x.chunk(2, -1)
    return x * cos.unsqueeze(1) + torch.cat((-high, low), -1) * sin.unsqueeze(1)


def store(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cos: Tensor,
    sin: Tensor,
    keys: Tensor,
    values: Tensor,
    at: int,
    full: bool = False,
) -> Tensor:
    """q rotated; k rotated, and v, become rows of the cache, keys and values [B, G, S, D], from `at` on; as many leave
    a full one at its front before."""
    rows = q.shape[2]
    for cache, new in ((keys, rotated(k, cos, sin)), (values, v)):
        if full:
            cache[:, :, :at] = cache[:, :, rows : at + rows].clone()
        cache[:, :, at : at + rows] = new
    return rotated(q, cos, sin)


def exact(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None = None,
    causal: bool = False,
    products: torch.dtype | None = None,
    sinks: Tensor | None = None,
    cap: float | None = None,
) -> tuple[Tensor, Tensor]:
    """y in fp64, and what a result in the dtype of q may be off by (docs/numerics.md says why). With `products`, that
    of q, k and v as these are rounded."""
    unit, dtype, (q, k, v) = 2.0**-24, q.dtype, (t.to(products or t.dtype).double() for t in (q, k, v))
    y = attention(q, k, v, mask, causal, sinks=sinks, cap=cap)
    k, v = (t.repeat_interleave(q.shape[1] // t.shape[1], 1) for t in (k, v))
    s = scores(q, k, mask, causal, cap=cap)
    off = (q.shape[-1] + 3) * unit * scores(q.abs(), k.abs())
    off = off if cap is None else off + 12 * unit * scores(q, k, cap=cap).abs()  # of tanh 4 ulp, beside roundings
    if sinks is not None:  # a key more, without a value
        s = torch.cat([s, sinks.double()[:, None, None].expand(*s.shape[:3], 1)], -1)
        off, v = F.pad(off, (0, 1)), F.pad(v, (0, 0, 0, 1))
    seen = s > -math.inf
    off = (off + unit * s.abs()).masked_fill(~seen, 0).amax(-1, keepdim=True)
    p, distance = s.softmax(-1).nan_to_num(), (s.amax(-1, keepdim=True) - s).masked_fill(~seen, 0)
    relative = torch.expm1(2 * off) + (2 * v.shape[2] + 16) * unit
    bound = relative * (p @ v.abs()) + unit * ((p * distance) @ v.abs() + (p * distance).sum(-1, True) * y.abs())
    if products is not None:  # of each numerator; and flushed to zero, of products and sums
        bound = bound + torch.finfo(products).eps / 2 * (1 + relative) * (p @ v.abs())
        bound = bound + (k.shape[2] + 2) * 2.0**-126
    rounding = torch.finfo(dtype).eps / 2 * (y.abs() + bound) if dtype is not torch.float32 else 0.0
    return y, bound + rounding + torch.finfo(dtype).smallest_normal
