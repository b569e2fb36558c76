"""Weights that somebody else quantized to int8: plain tensors, and the tensor subclasses of torchao, by their parts."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastlinear.spec.int8 import Quantized, is_zero

_PARTS = ("qdata", "scale", "zero_point", "block_size")  # what torchao's integer tensors have in common


def quantized(values: Tensor, scale: Tensor, zero: Tensor | None = None) -> Quantized:
    """The int8 weight scale * (values - zero), for int8 values [N, K] with a scale and a zero point a channel.

    scale: of any floating dtype; zero: of any integer dtype, from -128 to 127, or None for zeros; both [N] or [N, 1].
    Raises TypeError or ValueError for anything else.
    """
    for what, tensor in (("values", values), ("scale", scale), ("zero", zero)):
        if not isinstance(tensor, Tensor) and (tensor is not None or what != "zero"):
            raise TypeError(f"the {what} of an int8 weight must be a tensor, but is a {type(tensor).__name__}")
        if tensor is not None and tensor.device.type != "cpu":
            raise ValueError(f"the {what} of an int8 weight must be on the CPU, but is on device {tensor.device}")
    if not scale.dtype.is_floating_point:
        raise ValueError(f"the scale of an int8 weight must be floating-point, but is {scale.dtype}")
    if zero is not None and (zero.dtype.is_floating_point or zero.dtype.is_complex or zero.dtype is torch.bool):
        raise ValueError(f"the zero of an int8 weight must be of an integer dtype, but is {zero.dtype}")
    if zero is not None and not is_zero(zero):  # an int64 would wrap around below
        raise ValueError("the zero of an int8 weight must be from -128 to 127 in every channel")
    if zero is not None:
        zero = _one_dim(zero.int(), values) if bool(zero.any()) else None
    return Quantized(values.detach(), _one_dim(scale.detach().float(), values), zero)


def foreign(weight: Any) -> Quantized | str | None:
    """The int8 weight [N, K] that a tensor of torchao's holds, or in a few words why its kind cannot be taken over.

    None for any other tensor. Taken are integers of up to 8 bits in int8 (Int8Tensor and its like) with a scale a
    channel, with or without zero points; how torchao would quantize the inputs makes no difference.
    """
    if type(weight) is Tensor or not all(hasattr(weight, part) for part in _PARTS):
        return None
    kind, values, block = type(weight).__name__, weight.qdata, tuple(weight.block_size)
    if values.dtype is not torch.int8:
        return f"its weight ({kind}) holds {values.dtype}, not torch.int8"
    if values.dim() != 2 or block != (1, values.shape[1]):
        return f"its weight ({kind}) has a scale for each block of {list(block)}, not for each output channel"
    if getattr(weight, "act_pre_scale", None) is not None:
        return f"its weight ({kind}) wants its inputs scaled first, by act_pre_scale"
    try:
        return quantized(values, weight.scale, weight.zero_point)
    except ValueError as error:
        return f"of its weight ({kind}): {error}"


def _one_dim(column: Tensor, values: Tensor) -> Tensor:
    return column.squeeze(1) if column.shape == (len(values), 1) else column
