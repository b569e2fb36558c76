"""What a packed weight stands for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

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


def joined(weights: Sequence[Weight]) -> Weight:
    """Weights of as many columns, the channels of each behind those of the one before: of codes in the same groups and
    of one table, or of integers, what they are; else what they stand for."""
    first = weights[0]
    if len(weights) == 1:
        return first
    coded = [weight for weight in weights if isinstance(weight, Coded)]
    if any(weight.offset is not None for weight in coded):
        coded = [with_offsets(weight) for weight in coded]
    if len(coded) == len(weights) and all(_are_alike(coded[0], weight) for weight in coded):
        parts = ([getattr(weight, name) for weight in coded] for name in ("codes", "scale", "offset", "supers"))
        codes, scale, offset, supers = (None if part[0] is None else _one_after_another(part) for part in parts)
        assert codes is not None and scale is not None
        return replace(coded[0], codes=codes, scale=scale, offset=offset, supers=supers)
    integers = [weight for weight in weights if isinstance(weight, Quantized) and weight.zero is None]
    if len(integers) == len(weights):
        values, scales = ([getattr(weight, name) for weight in integers] for name in ("values", "scale"))
        return Quantized(torch.cat(values), torch.cat(scales))
    return torch.cat([stands_for(weight) for weight in weights])


def with_offsets(weight: Coded) -> Coded:
    """The same with offsets, of zeros where it has none."""
    if weight.offset is not None:
        return weight
    scale = weight.scale.float()
    return replace(weight, scale=scale, offset=torch.zeros_like(scale))


def _are_alike(a: Coded, b: Coded) -> bool:
    dtypes = (a.codes.dtype, a.scale.dtype, a.group) == (b.codes.dtype, b.scale.dtype, b.group)
    tensors = ((a.table, b.table), (a.order, b.order))
    same = all(t is u or (t is not None and u is not None and torch.equal(t, u)) for t, u in tensors)
    return dtypes and same and (a.supers is None) == (b.supers is None)


def _one_after_another(parts: Sequence[Tensor]) -> Tensor:
    """torch.cat, which not all dtypes of 8 bits have."""
    narrow = parts[0].itemsize == 1
    return torch.cat([part.view(torch.uint8) for part in parts]).view(parts[0].dtype) if narrow else torch.cat([*parts])


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
