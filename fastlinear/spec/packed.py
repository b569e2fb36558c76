"""What a packed weight stands for."""

from __future__ import annotations

import torch
from torch import Tensor

import fastlinear._weights as _weights
from fastlinear.spec import int4, int8
from fastlinear.spec.int4 import Coded
from fastlinear.spec.int8 import Quantized

Weight = Tensor | Coded | Quantized  # what there is to be packed


def stands_for(weight: Weight) -> Tensor:
    """The weight [n, k]: floats as they are, codes and integers as what they stand for, in fp32."""
    if isinstance(weight, Tensor):
        return weight
    return int4.dequantize(weight) if isinstance(weight, Coded) else int8.dequantize(weight)


def rows_of(panels: Tensor, layout: str, n: int, k: int, ids: Tensor) -> Tensor:
    """Channels of an int8 weight [n, k] in panels of a layout "w8f/32x1": what they stand for, fp32 [ids, k]. No
    more than those are read. IndexError for an id that is none."""
    width = int(layout.partition("/")[2].partition("x")[0])
    count = -(-n // width)
    values = panels[: count * width * k].view(torch.int8).view(count, k, width)
    scale = panels[count * width * k :].view(torch.float32)[:n].index_select(0, ids)
    return values[ids // width, :, ids % width].float() * scale[:, None]


def numbers(packed: _weights.Packed, every: int = 1) -> Tensor:
    """The weight [n, k], or of its channels the first and each `every`-th after it: floats as they were packed, codes
    and integers as what they stand for, in fp32."""
    if packed.grouped:
        return int4.dequantize(int4.coded_of(packed).channels(every))
    values, scale, zero = (t if t is None else t[::every] for t in (packed.unpack(), packed.scale, packed.zero))
    assert values is not None
    return values if scale is None else int8.dequantize(int8.Quantized(values, scale, zero))
