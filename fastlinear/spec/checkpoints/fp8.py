"""fp8 with a scale for each block of a weight."""

from __future__ import annotations

import torch

import fastlinear._kernels as _kernels
from fastlinear.spec.checkpoints.codes import group_of, in_eight_bits, values_shape
from fastlinear.spec.checkpoints.scheme import SCALES, Config, Mixture, Parts, Scheme, need
from fastlinear.spec.int4 import FP8
from fastlinear.spec.packed import Weight, joined

_BLOCK_SCALES = (*SCALES, torch.uint8, torch.float8_e8m0fnu)


def _block_size(config: Config) -> list[int]:
    size = config.get("weight_block_size") or [128, 128]
    if not (isinstance(size, (list, tuple)) and len(size) == 2 and all(type(s) is int and s > 0 for s in size)):
        raise ValueError(f"its weight_block_size is {size!r}, not two numbers")
    return [*size]


def _blocks_shape(parts: Parts, config: Config) -> tuple[int, int]:
    n, k = values_shape(parts)
    scale = parts["weight_scale_inv"]
    blocks: tuple[int | None, ...] = (None,) * scale.dim()  # one for all may be of any shape
    if scale.numel() != 1:
        rows, columns = _block_size(config)
        blocks = -(-n // rows), -(-k // columns)
    need(parts, "weight_scale_inv", _BLOCK_SCALES, *blocks)
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


def _experts_shape(parts: Parts, config: Config) -> tuple[int, int, int]:
    experts, n, k = need(parts, "", (FP8,), None, None, None).shape
    scale = parts["_scale_inv"]
    if scale.dim() != 3 or len(scale) != experts:
        raise ValueError(f"_scale_inv is of shape {list(scale.shape)}, not [{experts}, any, any]")
    if experts:
        for half in _halves(parts, config, 0):
            BLOCKS.shape(half, config)
    return experts, n, k


def _halves(parts: Parts, config: Config, expert: int) -> list[Parts]:
    """The weight of an expert, or, where gates and what goes through them have blocks of their own, of which the last
    may be short, each of both."""
    weight, scale = parts[""][expert], parts["_scale_inv"][expert]
    n, blocks = len(weight), len(scale)
    rows = _block_size(config)[0] if config.get("weight_block_size") else n
    apart = blocks != -(-n // rows) and blocks == 2 * -(-(n // 2) // rows) and n % 2 == 0
    cut = zip(weight.chunk(2), scale.chunk(2), strict=True) if apart else [(weight, scale)]
    return [{"weight": w, "weight_scale_inv": s} for w, s in cut]


def _experts(parts: Parts, config: Config, expert: int) -> Weight:
    return joined([_blocks(half, config) for half in _halves(parts, config, expert)])


MIXTURE = Mixture("fp8", ("", "_scale_inv"), _experts_shape, _experts)
