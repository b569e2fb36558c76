"""MXFP4, in which experts are stored: blocks of 32 with an exponent."""

from __future__ import annotations

import torch

from fastlinear.spec.checkpoints.scheme import Config, Mixture, Parts, need
from fastlinear.spec.int4 import TABLES, Coded, as_tensor


def _mxfp4_shape(parts: Parts, config: Config) -> tuple[int, int, int]:
    blocks = need(parts, "_blocks", (torch.uint8,), None, None, None, 16)
    experts, n, groups, _ = blocks.shape
    need(parts, "_scales", (torch.uint8,), experts, n, groups)
    return experts, n, 32 * groups


def _mxfp4(parts: Parts, config: Config, expert: int) -> Coded:
    """Blocks of 32 k: the lower half of a byte is the even one; scales are the exponents that e8m0 is."""
    pairs = parts["_blocks"][expert]
    codes = torch.stack([pairs & 15, pairs >> 4], -1).flatten(1)
    table = as_tensor(TABLES["fp4"])
    return Coded(codes, parts["_scales"][expert].contiguous().view(torch.float8_e8m0fnu), table, 32)


MIXTURE = Mixture("MXFP4", ("_blocks", "_scales"), _mxfp4_shape, _mxfp4)
