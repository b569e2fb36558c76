"""What a packed weight stands for."""

from __future__ import annotations

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


def numbers(packed: _weights.Packed) -> Tensor:
    """The weight [n, k]: floats as they were packed, codes and integers as what they stand for, in fp32."""
    if packed.grouped:
        return int4.dequantize(int4.coded_of(packed))
    values, scale = packed.unpack(), packed.scale
    return values if scale is None else int8.dequantize(int8.Quantized(values, scale, packed.zero))
