"""What several schemes share: fields of words, codes in groups, the order of these, values of 8 bits."""

from __future__ import annotations

import torch
from torch import Tensor

from fastlinear.spec.checkpoints.scheme import Config, Parts, need
from fastlinear.spec.int4 import FP8, TABLES, Coded, as_tensor, dequantize
from fastlinear.spec.packed import Weight


def fields(words: Tensor, bits: int) -> Tensor:
    """The unsigned fields of int32 words, the lowest first: [..., W] -> [..., W * 32 / bits], uint8."""
    octets = words.contiguous().view(torch.uint8)
    return octets if bits == 8 else torch.stack([octets & 15, octets >> 4], -1).flatten(-2)


def bits_of(config: Config, name: str = "bits") -> int:
    bits = config.get(name, 4)
    if bits not in (4, 8) or isinstance(bits, bool):
        raise ValueError(f"its {name} are {bits!r}, and 4 and 8 are supported")
    return int(bits)


def grouped(
    codes: Tensor, scale: Tensor, zero: Tensor | None, bits: int, group: int, of_group: Tensor | None
) -> Weight:
    """Of unsigned codes [N, K], and scales and zero points [N, groups]; of_group: the group of each column, or None
    where they lie one after another. Columns of groups as long as these are put in order; others are unpacked."""
    middle, order = 1 << bits - 1, None
    if of_group is not None:
        order = of_group.argsort(stable=True)
        if not torch.equal(of_group[order], _one_after_another(len(order), group)):
            zeros = middle if zero is None else zero[:, of_group]
            return scale.float()[:, of_group] * (codes.float() - zeros)
        codes, order = codes[:, order], order.int()
    offset = None
    if zero is not None and bool((zero != middle).any()):
        scale = scale.float()
        offset = scale * (middle - zero.float())
    if bits == 4:
        return Coded(codes, scale, as_tensor(TABLES["int4"]), group, offset, None, order)
    return Coded((codes.int() - middle).to(torch.int8), scale, None, group, offset, None, order)


def _one_after_another(k: int, group: int) -> Tensor:
    """The group of each of k inputs that lie so."""
    return torch.arange(k, device="cpu") // group


def group_of(k: int, groups: int) -> int:
    """The k that share a scale, as a power of two: one scale for all has the next one from k on."""
    if groups == 1:
        return 1 << max(k - 1, 15).bit_length()
    size = -(-k // groups) if groups else 0
    if size < 16 or size & (size - 1) or -(-k // size) != groups:
        raise ValueError(f"it has {groups} groups of {k} inputs, and groups of 16, 32, 64 ... are supported")
    return size


def check_order(parts: Parts, name: str, k: int, groups: int) -> None:
    """ValueError where what names the group of each input, if there is such, names none."""
    if name in parts:
        order = need(parts, name, (torch.int32, torch.int64), k)
        if bool((order < 0).any() | (order >= groups).any()):
            raise ValueError(f"{name} names groups that are none of {groups}")


def order_of(parts: Parts, name: str, k: int, groups: int) -> Tensor | None:
    """The group of each input, where these do not lie one after the other."""
    order = parts.get(name)
    if order is None or torch.equal(order.long(), _one_after_another(k, group_of(k, groups))):
        return None
    return order.long()


def values_shape(parts: Parts) -> tuple[int, int]:
    weight = need(parts, "weight", (torch.int8, FP8), None, None)
    return weight.shape[0], weight.shape[1]


def in_eight_bits(values: Tensor, scale: Tensor, group: int) -> Weight:
    """Of fp8, or integers, [N, K] and scales [N, groups]. Kernels have no NaN of fp8, with which a weight is floats."""
    weight = Coded(values.contiguous(), scale.contiguous(), None, group)
    odd = values.dtype is FP8 and bool((values.view(torch.uint8) & 0x7F == 0x7F).any())
    return dequantize(weight) if odd else weight
