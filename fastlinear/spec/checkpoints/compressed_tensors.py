"""compressed-tensors: integers of 4 and 8 bits packed into words, and int8 or fp8 as they are."""

from __future__ import annotations

from typing import Any

import torch

from fastlinear.spec.checkpoints.codes import (
    bits_of,
    check_order,
    fields,
    group_of,
    grouped,
    in_eight_bits,
    order_of,
    values_shape,
)
from fastlinear.spec.checkpoints.fp8 import BLOCKS
from fastlinear.spec.checkpoints.scheme import SCALES, Config, Parts, Scheme, need
from fastlinear.spec.int8 import Quantized
from fastlinear.spec.packed import Weight

_INPUTS = ("input_scale", "input_zero_point")  # by which it would quantize inputs, which are as they are


_FORMATS = ("pack-quantized", "int-quantized", "float-quantized", "naive-quantized", "mixed-precision")


def check_format(config: Config) -> None:
    """ValueError where the config, or that of one of its groups of layers, tells a format that is not read."""
    groups = config.get("config_groups")
    every = groups.values() if isinstance(groups, dict) else ()
    for told in (config, *(group for group in every if isinstance(group, dict))):
        if told.get("format") not in (None, *_FORMATS):
            raise ValueError(f"its format is {told['format']!r}, and read are {', '.join(_FORMATS)}")


def _told(config: Config) -> list[Any]:
    """What the groups of layers tell of their weights, a dict each if they are sound."""
    groups = config.get("config_groups")
    every = groups.values() if isinstance(groups, dict) else ()
    return [group.get("weights") if isinstance(group, dict) else None for group in every]


def _packed_bits(parts: Parts, config: Config) -> int:
    """The config's, or, where its groups of layers tell several, those of a layer's weight."""
    told = _told(config)
    if not told or not all(isinstance(each, dict) for each in told):
        raise ValueError("its config_groups do not tell in which way weights are quantized")
    if all(each.get("num_bits") == told[0].get("num_bits") for each in told):
        return bits_of(told[0], "num_bits")
    words, k = parts["weight_packed"].shape[1], int(parts["weight_shape"][1])
    return bits_of({"num_bits": words * 32 // k if k else None}, "num_bits")


def _packed_shape(parts: Parts, config: Config) -> tuple[int, int]:
    packed = need(parts, "weight_packed", (torch.int32,), None, None)
    n, k = need(parts, "weight_shape", (torch.int64, torch.int32), 2).tolist()
    bits = _packed_bits(parts, config)
    if n != len(packed) or k < 0 or -(-k * bits // 32) != packed.shape[1]:
        raise ValueError(f"weight_shape is [{n}, {k}], which weight_packed, {list(packed.shape)}, does not hold")
    groups = need(parts, "weight_scale", SCALES, n, None).shape[1]
    if "weight_zero_point" in parts:
        need(parts, "weight_zero_point", (torch.int32,), -(-n * bits // 32), groups)
    group_of(k, groups)
    check_order(parts, "weight_g_idx", k, groups)
    return n, k


def _packed(parts: Parts, config: Config) -> Weight:
    """Codes are packed along K, zero points along N, both with half of their range added."""
    (n, k), bits = _packed_shape(parts, config), _packed_bits(parts, config)
    scale, zero = parts["weight_scale"], None
    codes = fields(parts["weight_packed"], bits)[:, :k].contiguous()
    if "weight_zero_point" in parts:
        zero = fields(parts["weight_zero_point"].t().contiguous(), bits)[:, :n].t()
    order = order_of(parts, "weight_g_idx", k, scale.shape[1])
    return grouped(codes, scale, zero, bits, group_of(k, scale.shape[1]), order)


def _structure(config: Config) -> Any:
    """The size of the blocks that have a scale each, where the config tells one."""
    sizes = (each.get("block_structure") for each in _told(config) if isinstance(each, dict))
    return next(filter(None, sizes), None)


def _as_blocks(parts: Parts, config: Config) -> tuple[Parts, Config] | None:
    """Values with a scale for each block, as checkpoints of fp8 have them; None where each channel has one, or all
    have."""
    structure, scale = _structure(config), parts["weight_scale"]
    if structure is None or scale.dim() != 2 or scale.shape == (len(parts["weight"]), 1):
        return None
    return {"weight": parts["weight"], "weight_scale_inv": scale}, {"weight_block_size": structure}


def _plain_shape(parts: Parts, config: Config) -> tuple[int, int]:
    (n, k), scale, zero = values_shape(parts), parts["weight_scale"], parts.get("weight_zero_point")
    if (blocks := _as_blocks(parts, config)) is not None:
        BLOCKS.shape(*blocks)
    elif scale.dtype not in SCALES or scale.shape not in ((), (1,), (n,), (n, 1)):
        raise ValueError(f"weight_scale is {scale.dtype} {list(scale.shape)}, not one float for all, or for a channel")
    if parts["weight"].dtype is torch.int8 and zero is not None and bool(zero.any()):
        raise ValueError("weight_zero_point of int8 weights must be 0")
    return n, k


def _plain(parts: Parts, config: Config) -> Weight:
    """Integers or fp8 with a scale for all, for a channel, or for a block."""
    (n, k), weight = _plain_shape(parts, config), parts["weight"]
    if (blocks := _as_blocks(parts, config)) is not None:
        return BLOCKS.weight(*blocks)
    scale = parts["weight_scale"].reshape(-1, 1).expand(n, 1)
    if weight.dtype is torch.int8:
        return Quantized(weight, scale.float().flatten())
    return in_eight_bits(weight, scale, group_of(k, 1))


SCHEMES = (
    Scheme(
        "compressed-tensors",
        ("weight_packed", "weight_scale", "weight_shape"),
        ("weight_zero_point", "weight_g_idx", *_INPUTS),
        _packed_shape,
        _packed,
    ),
    Scheme("compressed-tensors", ("weight_scale", "weight"), ("weight_zero_point", *_INPUTS), _plain_shape, _plain),
)
