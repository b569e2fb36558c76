"""What a packed weight stands for."""

from __future__ import annotations

from torch import Tensor

import fastlinear._weights as _weights
from fastlinear.spec import int4, int8


def numbers(packed: _weights.Packed) -> Tensor:
    """The weight [n, k]: floats as they were packed, codes and integers as what they stand for, in fp32."""
    values, scale, table = packed.unpack(), packed.scale, packed.table
    if scale is None:
        return values
    if table is None:
        return int8.dequantize(int8.Quantized(values, scale, packed.zero))
    coding = int4.coding_of(packed)
    assert coding is not None
    return int4.dequantize(int4.Coded(values, scale, table, coding.group, packed.offset))
