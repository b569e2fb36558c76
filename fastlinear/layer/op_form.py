"""The arguments of the op fastlinear::linear behind x, weight and bias, and what they mean."""

from __future__ import annotations

from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor, nn

from fastlinear.spec.activations import Activation
from fastlinear.spec.int8 import Requantize, Rows
from fastlinear.spec.precision import Precision
from fastlinear.spec.reference import Reference

IDENTITY = Activation("identity")  # what the op's string says for None
SCHEMA = (
    "linear(Tensor x, Tensor weight, Tensor? bias, str activation, float[] params, bool transposed, "
    "str packed='', str accumulate='fp32', str layout='', int n=0, int k=0, "
    "str rows='', float scale=0.0, int zero=0, Tensor? smooth=None, ScalarType? out=None, float out_scale=0.0, "
    "int out_zero=0) -> Tensor"
)
Key: TypeAlias = tuple[Any, ...]


class Form(NamedTuple):
    """The op's arguments behind the tensors; the dispatcher leaves out those that have their default values."""

    activation: str
    params: list[float]
    transposed: bool
    packed: str = ""
    accumulate: str = "fp32"
    layout: str = ""
    n: int = 0
    k: int = 0
    rows: str = ""
    scale: float = 0.0
    zero: int = 0
    smooth: Tensor | None = None
    out: torch.dtype | None = None
    out_scale: float = 0.0
    out_zero: int = 0

    def precision(self) -> Precision:
        """What the op may round to."""
        rows = Rows(self.rows, self.scale, self.zero, self.smooth) if self.rows else None
        out = None if self.out is None else Requantize(self.out, self.out_scale, self.out_zero)
        return Precision(self.packed or None, self.accumulate, rows, out)

    def fused(self) -> Activation | None:
        """The activation as a layer has it."""
        return None if self.activation == IDENTITY.name else Activation(self.activation, tuple(self.params))

    def reference(self) -> Reference:
        """What the op computes, in torch's own ops."""
        return Reference(self.fused(), self.precision(), self.transposed, (self.layout, self.n, self.k))


def arguments(
    activation: Activation | None, transposed: bool, packed: str, precision: Precision, panels: tuple[str, int, int]
) -> Form:
    """What a layer tells the op. panels: layout, n and k of a frozen one, else "", 0 and 0."""
    name, params = activation or IDENTITY
    rows, out = precision.rows or Rows(""), precision.out or (None, 0.0, 0)
    quantization: tuple[Any, ...] = (*rows, *out)
    return Form(name, list(params), transposed, packed, precision.accumulate, *panels, *quantization)


def key_of(address: int | None, activation: Activation | None, transposed: bool, precision: Precision) -> Key:
    """Equal for what one layer may answer, whatever it is packed in."""
    rows, smooth = (precision.rows or Rows(""))._replace(smooth=None), address_of(precision.smooth)
    return address, activation, transposed, precision.accumulate, rows, smooth, precision.out


def address_of(t: Tensor | None) -> int | None:
    """Where the memory of a plain CPU tensor begins; None for anything else, which may have none."""
    if t is None or type(t) not in (Tensor, nn.Parameter) or t.layout is not torch.strided or t.device.type != "cpu":
        return None
    return t.data_ptr()


def unpack(panels: Tensor, layout: str, n: int, k: int, smooth: Tensor | None = None) -> Tensor:
    """The weight [n, k] of which `panels` are the packed bytes, after its columns were divided by `smooth` if that is
    given; an op, and so right in every mode of torch."""
    weight: Tensor = torch.ops.fastlinear.unpack.default(panels, layout, n, k)
    return weight if smooth is None else weight * smooth
