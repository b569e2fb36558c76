"""fp8 with a scale for each block of a weight."""

from __future__ import annotations

import torch

import fastlinear._kernels as _kernels
from fastlinear.spec.checkpoints.codes import group_of, in_eight_bits, values_shape
from fastlinear.spec.checkpoints.scheme import SCALES, Config, Parts, Scheme, need
from fastlinear.spec.packed import Weight

_BLOCK_SCALES = (*SCALES, torch.uint8, torch.float8_e8m0fnu)


def _block_size(config: Config) -> list[int]:
    size = config.get("weight_block_size") or [128, 128]
    if not (isinstance(size, (list, tuple)) and len(size) == 2 and all(type(s) is int and s > 0 for s in size)):
        raise ValueError(f"its weight_block_size is {size!r}, not two numbers")
    return [*size]


def _blocks_shape(parts: Parts, config: Config) -> tuple[int, int]:
    n, k = values_shape(parts)
    if parts["weight_scale_inv"].numel() != 1:
        rows, columns = _block_size(config)
        need(parts, "weight_scale_inv", _BLOCK_SCALES, -(-n // rows), -(-k // columns))
    elif parts["weight_scale_inv"].dtype not in _BLOCK_SCALES:
        raise ValueError(f"weight_scale_inv is {parts['weight_scale_inv'].dtype}")
    return n, k


def _blocks(parts: Parts, config: Config) -> Weight:
    """fp8 with a scale for each block, 128 x 128 unless told otherwise, or with one for all. Blocks as wide as groups
    may be keep their bits, with a scale for each of their channels; others are floats."""
    (n, k), weight, scale = _blocks_shape(parts, config), parts["weight"], parts["weight_scale_inv"]
    if scale.dtype is torch.uint8:
        scale = scale.view(torch.float8_e8m0fnu)
    if scale.numel() == 1:
        return in_eight_bits(weight, scale.reshape(1, 1).expand(n, 1), group_of(k, 1))
    rows, columns = _block_size(config)
    by_row = scale.repeat_interleave(rows, 0)[:n]
    whole = columns in _kernels.GROUP_SIZES
    if whole or scale.shape[1] == 1:
        return in_eight_bits(weight, by_row, columns if whole else group_of(k, 1))
    return weight.float() * by_row.float().repeat_interleave(columns, 1)[:, :k]


BLOCKS = Scheme("fp8", ("weight_scale_inv", "weight"), (), _blocks_shape, _blocks)
SCHEMES = (BLOCKS,)
