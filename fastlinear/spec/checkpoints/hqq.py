"""HQQ of 4 bits, with groups along K (axis 1)."""

from __future__ import annotations

import torch

from fastlinear.spec.checkpoints.codes import group_of
from fastlinear.spec.checkpoints.scheme import SCALES, Config, Parts, Scheme, need
from fastlinear.spec.int4 import TABLES, Coded, as_tensor
from fastlinear.spec.packed import Weight

_NOTES = (  # what HQQ notes of a layer, beside its weight
    "axis", "nbits", "group_size", "packing", "unpack_view_dtype", "view_as_float", "quant_scale", "quant_zero",
    "compute_dtype", "offload_meta", "encoded_state_dict", "stores_quant_config", "channel_wise", "optimize",
    "round_zero",
)  # fmt: skip


def _hqq_shape(parts: Parts, config: Config) -> tuple[int, int]:
    for name, supported in (("axis", 1), ("nbits", 4)):
        if name in parts and parts[name].flatten().tolist() != [supported]:
            raise ValueError(f"its {name} is {parts[name].flatten().tolist()}, and {supported} is supported")
    n, k = need(parts, "shape", (torch.int64, torch.int32), 2).tolist()
    pairs = need(parts, "W_q", (torch.uint8,), None, None)
    if n < 0 or k < 0 or pairs.numel() * 2 != n * k:
        raise ValueError(f"its shape is {n} x {k}, and W_q has another size: 4 bits are supported")
    size = pairs.shape[1]
    if size < 16 or k % size or (k != size and size & (size - 1)):
        raise ValueError(f"its groups are of {size}, which rows of {k} inputs do not hold whole")
    for name in ("scale", "zero"):
        need(parts, name, SCALES, n * k // size, 1)
    return n, k


def _hqq(parts: Parts, config: Config) -> Weight:
    """A row of W_q is a group; the first half of them in the upper, the second in the lower halves of the bytes."""
    (n, k), pairs = _hqq_shape(parts, config), parts["W_q"]
    scale, zero = (parts[name].float().view(n, -1) for name in ("scale", "zero"))
    codes = torch.cat([pairs >> 4, pairs & 15]).view(n, k)
    table = as_tensor(TABLES["int4"])
    return Coded(codes, scale, table, group_of(k, scale.shape[1]), scale * (8 - zero))


SCHEMES = (Scheme("HQQ", ("W_q", "scale", "zero", "shape"), _NOTES, _hqq_shape, _hqq),)
