"""The op of a frozen layer under one string, for Dynamo.

It traces every frame and looks at every attribute of every layer's call, which took most of the time that compiling a
language model takes; here both are few, and the string is all of a layer that guards look at beside its parameters.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastlinear._tensors import FORMATS
from fastlinear._torch import is_constant
from fastlinear.layer.form import Form, arguments
from fastlinear.layer.lookup import Layer
from fastlinear.spec.precision import Precision

_spelled: dict[str, tuple[Form, Precision, torch.dtype]] = {}


def spell(layer: Layer) -> str:
    """What `form_of` knows the op of a frozen layer by; "" where calls differ, or tensors are among its arguments."""
    precision, frozen = layer.precision._replace(sample=None), layer._frozen
    if layer._differs_by_call or precision.smooth is not None:
        return ""
    form = arguments(layer.activation, layer._transposed, layer.packed_as, precision, frozen.form)
    spelled = f"{form} {precision} {frozen.dtype}"
    _spelled[spelled] = form, precision, frozen.dtype
    return spelled


@is_constant
def form_of(spelled: str, x: torch.dtype, bias: torch.dtype | None) -> Form | None:
    """The arguments of the op; None where the kernels do not take these dtypes."""
    form, precision, weight = _spelled[spelled]
    return form if precision.takes(x) and weight in FORMATS and bias in (None, torch.float32, weight) else None


def linear(layer: Layer, x: Tensor) -> Tensor | None:
    """layer(x) as the op, in few frames; None where `operator.linear` has to take a longer look."""
    if layer.training or layer._parameters.get("weight") is not None:  # which functional_call lends
        return None
    bias = layer._parameters.get("bias")
    plain = type(x) is Tensor and x.is_cpu and x.layout is torch.strided and not x.is_nested and x.dim() > 0
    if not plain or x.shape[-1] != layer.in_features or not (bias is None or bias.is_cpu):
        return None
    form = form_of(layer._spelled, x.dtype, None if bias is None else bias.dtype)
    if form is None:
        return None
    y: Tensor = torch.ops.fastlinear.linear.default(x, layer._frozen.panels, bias, *form)
    return y
