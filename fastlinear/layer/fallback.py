"""What a fast layer computes in torch's own ops, where its kernels cannot answer."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fastlinear._environment as environment
import fastlinear._tensors as _tensors
from fastlinear.layer.fitness import dtype_of
from fastlinear.layer.frozen import record_of
from fastlinear.spec import programs
from fastlinear.spec.reference import Reference


def in_torch(layer: Any, x: Tensor, bare: bool = False, operands: tuple[Tensor, ...] = ()) -> Tensor:
    """The answer in torch's own ops: in training, and where the user switched the kernels off, of the parameter as
    it is, which for a frozen layer is what it is packed in; otherwise of the numbers that the kernels multiply."""
    try:
        plain = layer.training or environment.disabled() or _is_odd(layer, x)
        return _plain(layer, x, bare, operands) if plain else _referred(layer, x, bare, operands)
    except RuntimeError as error:  # looked at only now, because torch.jit.trace warns of every look at a shape
        if isinstance(x, Tensor) and not x.is_nested and (x.dim() == 0 or x.shape[-1] != layer.in_features):
            raise RuntimeError(
                f"{label(layer)} takes inputs whose last dimension is in_features={layer.in_features}, "
                f"not a tensor of shape {tuple(x.shape)}"
            ) from error
        raise


def _each(layer: Any, x: Any, bare: bool) -> Tensor:
    """The answer to a nested tensor, part by part, since rows are quantized by what is in them."""

    def part(rows: Tensor) -> Tensor:
        y = layer._engine.forward(layer, rows)
        return y if bare or layer._absorbed is None else programs.apply(layer.activation, y)

    if x.layout is torch.jagged:
        y = part(x.values())
        return torch.nested.nested_tensor_from_jagged(y, x.offsets(), x.lengths())
    return torch.nested.as_nested_tensor([part(rows) for rows in x.unbind()])


def _plain(layer: Any, x: Tensor, bare: bool, operands: tuple[Tensor, ...]) -> Tensor:
    frozen = record_of(layer)
    x = layer._precision.numbers(x) if isinstance(x, Tensor) else x
    weight, bias = layer.weight if frozen is None else frozen.unpack(layer._transposed), layer.bias
    mixed = isinstance(x, Tensor) and any(t is not None and t.dtype is not x.dtype for t in (weight, bias))
    if mixed and layer._takes(x):
        weight, bias = weight.to(x.dtype), None if bias is None else bias.to(x.dtype)
    y = F.linear(x, weight.t() if layer._transposed else weight, bias)
    return programs.apply(layer.computes(bare)[0], y, operands)


def _is_odd(layer: Any, x: Any) -> bool:
    """Whether x is no rows, or the dtypes are none that go together, of which nn.Linear knows what to say."""
    if not isinstance(x, Tensor) or x.dim() == 0:
        return True
    if layer._takes(x):
        return False
    if _is_autocast(x):
        return x.dtype not in _tensors.FORMATS
    fit = x.is_floating_point() and dtype_of(layer) is x.dtype
    return not fit or (layer.bias is not None and layer.bias.dtype is not x.dtype)


def _referred(layer: Any, x: Tensor, bare: bool, operands: tuple[Tensor, ...]) -> Tensor:
    if layer._precision.rows is not None and (x.is_nested or x.layout is not torch.strided):
        if x.is_nested:
            return _each(layer, x, bare)
        x = x.to_dense()  # torch multiplies sparse rows, but has no extremes of them
    frozen, precision = record_of(layer), layer.computes(bare)[1]
    reference: Reference = layer._reference(precision, frozen, bare)
    weight, bias = layer.weight if frozen is None else frozen.panels, layer.bias
    if not _is_autocast(x):
        return reference.floats(x, weight, bias, operands)
    device = x.device.type
    dtype = torch.get_autocast_dtype(device)
    with torch.autocast(device, enabled=False):
        if x.dtype in _tensors.FORMATS:
            x = x.to(dtype)
            reference = reference._replace(precision=precision._replace(packed=precision.under(dtype)))
        return reference.floats(x, weight, bias, operands)


def _is_autocast(x: Tensor) -> bool:
    device = x.device.type
    return torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)


def label(module: nn.Module) -> str:
    """What messages call a layer: its class, and its name in the converted model if it has one."""
    name = vars(module).get("_name", "")
    return f"{type(module).__name__} {name!r}" if name else type(module).__name__
