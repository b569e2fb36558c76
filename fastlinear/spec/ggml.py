"""What the blocks of ggml's tensors stand for, in plain torch; GGUF files are made of them.

A row of K weights is K / size blocks of the same kind, one behind the other, each with scales of its own (llama.cpp,
ggml/src/ggml-common.h). Nothing is rounded here: what `unpack` gives stands for the very numbers that ggml's own
dequantization gives in fp32.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from fastlinear.spec.int4 import TABLES, Coded, as_tensor

_UNSIGNED = tuple(map(float, range(16)))


class Kind(NamedTuple):
    """number: ggml's, in a file; size: weights of a block of nbytes; unpack: takes blocks, uint8 [N, B, nbytes]."""

    number: int
    size: int
    nbytes: int
    unpack: Callable[[Tensor], Tensor | Coded]


def unpack(kind: str, rows: Tensor) -> Tensor | Coded:
    """What rows, uint8 [N, bytes of a row], stand for."""
    return KINDS[kind].unpack(rows.unflatten(1, (-1, KINDS[kind].nbytes)))


def is_floating(kind: str) -> bool:
    """Whether a kind is plain floats, which are blocks of one."""
    return KINDS[kind].size == 1


# ---- the kinds ----


def _floats(dtype: torch.dtype) -> Callable[[Tensor], Tensor]:
    return lambda blocks: blocks.flatten(1).contiguous().view(dtype)


def _half(blocks: Tensor, at: int) -> Tensor:
    """The fp16 at a byte of each block, [N, B]."""
    return blocks[..., at : at + 2].contiguous().view(torch.float16).squeeze(-1)


def _nibbles(bytes_: Tensor) -> Tensor:
    """[..., n] -> [..., 2 n]: all lower halves, then all upper ones."""
    return torch.cat([bytes_ & 15, bytes_ >> 4], -1)


def _coded(table: tuple[float, ...], offset: bool = False) -> Callable[[Tensor], Coded]:
    """An fp16 scale, perhaps an fp16 offset, 16 bytes of codes: of k = j in the lower, of 16 + j in the upper half."""

    def unpack_blocks(blocks: Tensor) -> Coded:
        codes = _nibbles(blocks[..., -16:]).flatten(1)
        numbers_ = as_tensor(table)
        return Coded(codes, _half(blocks, 0), numbers_, 32, _half(blocks, 2) if offset else None)

    return unpack_blocks


def _q8_0(blocks: Tensor) -> Coded:
    return Coded(blocks[..., 2:].contiguous().view(torch.int8).flatten(1), _half(blocks, 0), None, 32)


def _fives(offset: bool) -> Callable[[Tensor], Coded]:
    """Q5_0 and Q5_1: as of 4 bits, with 4 bytes before the codes in which bit k is the fifth of weight k."""

    def unpack_blocks(blocks: Tensor) -> Coded:
        fifth = blocks[..., -20:-16, None] >> torch.arange(8, device="cpu", dtype=torch.uint8) & 1
        codes = _nibbles(blocks[..., -16:]) | fifth.flatten(-2) << 4
        values = codes.view(torch.int8) if offset else codes.view(torch.int8) - 16
        return Coded(values.flatten(1), _half(blocks, 0), None, 32, _half(blocks, 2) if offset else None)

    return unpack_blocks


def _sixes(blocks: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Of the 8 groups of a block of Q4_K or Q5_K the scales and offsets, uint8 [N, 8 B], each 6 bits, and the fp16 that
    multiply them, [N, 2 B].

    Of the first four groups the 6 bits are the lower ones of bytes 0 to 3 (scales) and 4 to 7 (offsets); of the others
    4 bits are the halves of bytes 8 to 11, and 2 the upper ones of the former."""
    first, second, third = blocks[..., 4:16].split(4, -1)
    scale = torch.cat([first & 63, third & 15 | first >> 6 << 4], -1)
    least = torch.cat([second & 63, third >> 4 | second >> 6 << 4], -1)
    return scale.flatten(1), least.flatten(1), torch.cat([_half(blocks, 0), -_half(blocks, 2)], 1)


def _runs(bytes_: Tensor) -> Tensor:
    """The codes of 32-byte runs [..., 32 r]: 32 in the lower halves of a run, the next 32 in its upper ones."""
    return _nibbles(bytes_.unflatten(-1, (-1, 32))).flatten(-2)


def _q4_k(blocks: Tensor) -> Coded:
    scale, offset, supers = _sixes(blocks)
    table = as_tensor(_UNSIGNED)
    return Coded(_runs(blocks[..., 16:]).flatten(1), scale, table, 32, offset, supers)


def _q5_k(blocks: Tensor) -> Coded:
    scale, offset, supers = _sixes(blocks)
    # Bit g of byte j is the fifth of weight j of group g.
    fifth = blocks[..., None, 16:48] >> torch.arange(8, device="cpu", dtype=torch.uint8)[:, None] & 1
    codes = _runs(blocks[..., 48:]) | fifth.flatten(-2) << 4
    return Coded(codes.view(torch.int8).flatten(1), scale, None, 32, offset, supers)


def _q6_k(blocks: Tensor) -> Coded:
    """Of each 128: 64 bytes of lower halves, then upper ones; 32 bytes of two bits more of four runs of 32."""
    low = _nibbles(blocks[..., :128].unflatten(-1, (2, 64)))
    shifts = torch.arange(0, 8, 2, device="cpu", dtype=torch.uint8)[:, None]
    high = blocks[..., 128:192].unflatten(-1, (2, 1, 32)) >> shifts & 3
    values = (low | high.flatten(-2) << 4).view(torch.int8) - 32
    scale = blocks[..., 192:208].contiguous().view(torch.int8)
    return Coded(values.flatten(1), scale.flatten(1), None, 16, None, _half(blocks, 208))


KINDS = {
    "F32": Kind(0, 1, 4, _floats(torch.float32)),
    "F16": Kind(1, 1, 2, _floats(torch.float16)),
    "BF16": Kind(30, 1, 2, _floats(torch.bfloat16)),
    "Q4_0": Kind(2, 32, 18, _coded(TABLES["int4"])),
    "Q4_1": Kind(3, 32, 20, _coded(_UNSIGNED, offset=True)),
    "IQ4_NL": Kind(20, 32, 18, _coded(TABLES["iq4_nl"])),
    "Q5_0": Kind(6, 32, 22, _fives(offset=False)),
    "Q5_1": Kind(7, 32, 24, _fives(offset=True)),
    "Q8_0": Kind(8, 32, 34, _q8_0),
    "Q4_K": Kind(12, 256, 144, _q4_k),
    "Q5_K": Kind(13, 256, 176, _q5_k),
    "Q6_K": Kind(14, 256, 210, _q6_k),
}
UNREAD = {  # what others are called
    9: "Q8_1", 10: "Q2_K", 11: "Q3_K", 15: "Q8_K", 16: "IQ2_XXS", 17: "IQ2_XS", 18: "IQ3_XXS", 19: "IQ1_S",
    21: "IQ3_S", 22: "IQ2_S", 23: "IQ4_XS", 24: "I8", 25: "I16", 26: "I32", 27: "I64", 28: "F64", 29: "IQ1_M",
    34: "TQ1_0", 35: "TQ2_0", 39: "MXFP4", 40: "NVFP4",
}  # fmt: skip
