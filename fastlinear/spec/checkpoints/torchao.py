"""torchao's weights in groups, by the parts of its tensors."""

from __future__ import annotations

import torch

from fastlinear.spec.checkpoints.codes import group_of
from fastlinear.spec.checkpoints.scheme import SCALES, Config, Parts, Scheme, need
from fastlinear.spec.int4 import TABLES, Coded, as_tensor


def _in_groups_shape(parts: Parts, config: Config) -> tuple[int, int]:
    (n, k), block = config["shape"], tuple(config["block_size"])
    packed = _is_packed(parts, config)
    need(parts, "qdata", (torch.int8,), n, k // 2 if packed else k)
    if len(block) != 2 or block[0] != 1 or block[1] < 1:
        raise ValueError(f"it has a scale for each block of {[*block]}, not for groups of one channel")
    groups = -(-k // block[1])
    group_of(k, groups)
    sizes = (groups, n) if packed else (n, groups)
    need(parts, "scale", SCALES, *sizes)
    if "zero_point" in parts:
        need(parts, "zero_point", SCALES if packed else (*SCALES, torch.int8), *sizes)
    return n, k


def _is_packed(parts: Parts, config: Config) -> bool:
    qdata = parts["qdata"]
    return qdata.dim() == 2 and qdata.shape[1] * 2 == config["shape"][1]


def _in_groups(parts: Parts, config: Config) -> Coded:
    """Int4Tensor has two signed codes of 4 bits in a byte, the first in the lower half, and W = scale * q + zero;
    IntxUnpackedToInt8Tensor and Int8Tensor one in a byte, and W = scale * (q - zero)."""
    (_, k), qdata, scale, zero = config["shape"], parts["qdata"], parts["scale"], parts.get("zero_point")
    zero = zero if zero is not None and bool(zero.any()) else None
    packed = _is_packed(parts, config)
    if packed:
        halves = qdata.view(torch.uint8)
        codes = torch.stack([halves & 15, halves >> 4], -1).flatten(1) ^ 8
        scale, offset = scale.t().contiguous(), None if zero is None else zero.t().contiguous()
    else:
        codes = qdata.contiguous()
        offset = None if zero is None else -zero.float() * scale.float()
        scale = scale.float() if zero is not None else scale.contiguous()
    if config["bits"] == 4 and not packed:
        codes = (codes + 8).view(torch.uint8)
    group = group_of(k, scale.shape[1])
    return Coded(codes, scale, as_tensor(TABLES["int4"]) if config["bits"] == 4 else None, group, offset)


SCHEME = Scheme("torchao", ("qdata", "scale"), ("zero_point",), _in_groups_shape, _in_groups)
