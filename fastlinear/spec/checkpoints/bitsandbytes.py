"""bitsandbytes: 4-bit codes of a table, and int8 row by row."""

from __future__ import annotations

import json
from typing import Any

import torch

from fastlinear.spec.checkpoints.scheme import Config, Parts, Scheme, need
from fastlinear.spec.int4 import Coded
from fastlinear.spec.int8 import Quantized
from fastlinear.spec.packed import Weight

_STATES = ("weight.quant_state.bitsandbytes__nf4", "weight.quant_state.bitsandbytes__fp4")


def _state(parts: Parts) -> dict[str, Any]:
    raw = next((parts[name] for name in _STATES if name in parts), None)
    if raw is None or raw.dtype is not torch.uint8 or raw.numel() > 1 << 16:
        raise ValueError("it has no quant_state of nf4 or fp4")
    try:
        state = json.loads(bytes(raw.tolist()).decode())
    except RecursionError as error:
        raise ValueError("its quant_state is no JSON that could be read") from error
    shape = state.get("shape") if isinstance(state, dict) else None
    if not isinstance(shape, list) or len(shape) != 2 or not all(type(s) is int and 0 < s < 1 << 40 for s in shape):
        raise ValueError("its quant_state tells no shape")
    return dict(state)


def _nf4_shape(parts: Parts, config: Config) -> tuple[int, int]:
    state = _state(parts)
    (n, k), size = state["shape"], state.get("blocksize")
    if need(parts, "weight", (torch.uint8,), None, 1).shape[0] * 2 != n * k:
        raise ValueError(f"its quant_state tells a shape of {n} x {k}, and weight has another size")
    if type(size) is not int or size < 16 or size & (size - 1) or k % size:
        raise ValueError(f"its blocks are of {size!r}, which rows of {k} inputs do not hold whole")
    need(parts, "weight.quant_map", (torch.float32,), 16)
    scale = need(parts, "weight.absmax", (torch.float32, torch.uint8), n * k // size)
    if scale.dtype is torch.uint8:
        outer, offset = state.get("nested_blocksize"), state.get("nested_offset")
        if type(outer) is not int or outer <= 0 or type(offset) not in (int, float):
            raise ValueError("its quant_state tells no nested_blocksize and nested_offset")
        for name in ("weight.nested_quant_map", "weight.nested_absmax"):
            if name not in parts:
                raise ValueError(f"its scales are codes of 8 bits, and it has no {name}")
        need(parts, "weight.nested_quant_map", (torch.float32,), 256)
        need(parts, "weight.nested_absmax", (torch.float32,), -(-len(scale) // outer))
    return n, k


def _nf4(parts: Parts, config: Config) -> Weight:
    """Codes of consecutive elements, the first in the upper half; a scale for each `blocksize` of them, itself perhaps
    a code of 8 bits with scales of its own."""
    (n, k), state, scale = _nf4_shape(parts, config), _state(parts), parts["weight.absmax"]
    if scale.dtype is torch.uint8:
        index = torch.arange(len(scale), device="cpu") // state["nested_blocksize"]
        offset = torch.tensor(state["nested_offset"], dtype=torch.float32, device="cpu")
        scale = parts["weight.nested_quant_map"][scale.int()] * parts["weight.nested_absmax"][index] + offset
    pairs = parts["weight"].view(-1)
    codes = torch.stack([pairs >> 4, pairs & 15], -1).view(n, k)
    return Coded(codes, scale.view(n, -1), parts["weight.quant_map"], state["blocksize"])


def _int8_shape(parts: Parts, config: Config) -> tuple[int, int]:
    n, k = need(parts, "weight", (torch.int8,), None, None).shape
    need(parts, "SCB", (torch.float32,), n)
    if "weight_format" in parts and bool(parts["weight_format"].any()):
        raise ValueError(f"its weight_format is {parts['weight_format'].tolist()}, and 0, row by row, is supported")
    return n, k


def _int8(parts: Parts, config: Config) -> Weight:
    """Integers with the largest magnitude of each channel, which 127 stands for."""
    return Quantized(parts["weight"], parts["SCB"] / 127)


SCHEMES = (
    Scheme(
        "bitsandbytes",
        ("weight.absmax", "weight", "weight.quant_map"),
        (*_STATES, "weight.nested_absmax", "weight.nested_quant_map"),
        _nf4_shape,
        _nf4,
    ),
    Scheme("bitsandbytes", ("SCB", "weight"), ("weight_format",), _int8_shape, _int8),
)
