"""What a norm is, in plain torch: the specification that the kernels follow.

Of rows x [..., n], with t = x + residual, or x where there is none:

    LayerNorm (centered)  y = (t - mean(t)) / sqrt(mean((t - mean(t))^2) + eps) * (offset + weight) + bias
    RMSNorm               y = t / sqrt(mean(t^2) + eps) * (offset + weight) + bias

all of it in fp32 (of fp64 rows: in fp64), of the sum as it is before it is rounded to be kept, rounded once at the end.
That is one rounding where models in 16 bits that widen, normalize, round, and multiply by the weight have two.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class Norm(NamedTuple):
    """Which norm. offset: what is added to the weight, 1 in Gemma's."""

    centered: bool
    eps: float
    offset: float = 0.0


def norm(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, how: Norm, residual: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """(y, x + residual), both in the shape and dtype of x [..., n]; weight and bias: [n], or None for 1 and 0."""
    wide = torch.float64 if x.dtype is torch.float64 else torch.float32
    t = x.to(wide) if residual is None else x.to(wide) + residual.to(wide)
    scale = None if weight is None else weight.to(wide) + how.offset
    shift = None if bias is None else bias.to(wide)
    size = x.shape[-1:]
    if how.centered:
        y = F.layer_norm(t, size, scale, shift, how.eps)
    else:
        y = F.rms_norm(t, size, scale, how.eps)
        y = y if shift is None else y + shift
    return y.to(x.dtype), t.to(x.dtype)
