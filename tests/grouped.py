"""Weights in groups, of whatever codes and scales there are."""

import torch
from torch import Tensor

import fastlinear._tensors as _tensors
from fastlinear._weights import Packed
from fastlinear.spec.int4 import FP8, Coded, Coding

# Weights of many kinds, of random numbers.
WEIGHTS = {
    "normal": lambda r: r * 0.02,
    "heavy tails": lambda r: r / r.flip(0),
    "sparse": lambda r: r * (r > 1.5),
    "few values": lambda r: r.round() * 0.1,
    "ties": lambda r: (5 * r).round().clamp(-9, 9) * 0.37,
    "far from 0": lambda r: r * 0.01 + 0.5,
    "lost in an offset": lambda r: r * 0.01 + r[:, :1] * 1000,
    "below what scales tell": lambda r: r * 1e-6,
    "zeros": lambda r: r * 0,
    "constant": lambda r: r[:, :1].expand(r.shape),
    "bf16": lambda r: r.bfloat16().float(),
}

E8M0 = torch.float8_e8m0fnu


def small(dtype: torch.dtype, n: int, groups: int) -> Tensor:
    """Random scales or offsets, of both signs where the dtype has them."""
    if dtype is E8M0:
        return torch.randint(120, 130, (n, groups), dtype=torch.uint8).view(dtype)
    if dtype is torch.uint8:
        return torch.randint(0, 64, (n, groups), dtype=dtype)
    return torch.randint(-128, 128, (n, groups)).to(dtype) if dtype is torch.int8 else torch.randn(n, groups).to(dtype)


def eight_bits(numbers: Tensor, layout: str) -> Tensor:
    """Small integers as codes of 8 bits."""
    return numbers.float().to(FP8) if layout.startswith("fp8") else numbers.to(torch.int8)


def every_byte(layout: str) -> Tensor:
    """All codes of 8 bits that there are."""
    codes = torch.arange(256).to(torch.uint8)
    return codes[codes & 0x7F != 0x7F].view(FP8) if layout.startswith("fp8") else codes.view(torch.int8)


def coded(n: int, k: int, coding: Coding, ordered: bool = False, layout: str = "") -> Coded:
    """A weight of random codes, scales and offsets, and of columns in a random order, for a layout."""
    groups, supers = -(-k // coding.group), None
    if coding.scales in (torch.int8, torch.uint8):
        supers = (torch.randn(n, (1 + coding.offsets) * -(-k // _tensors.SUPER)) / 32).half()
    scale, offset = (small(coding.scales, n, groups) for _ in range(2))
    codes, table = torch.randint(0, 16, (n, k), dtype=torch.uint8), None
    if coding.table:
        table = torch.tensor(coding.table)
    else:
        codes = every_byte(layout)[torch.randint(254, (n, k))]
    order = torch.randperm(k).int() if ordered else None
    return Coded(codes, scale, table, coding.group, offset if coding.offsets else None, supers, order)


def pack(weight: Coded, layout: str) -> Packed:
    return Packed(weight.codes, weight.layout(layout), *weight.contents())
