"""The arguments of the op fastlinear::linear, and how a layer spells what it computes in them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor, nn

from fastlinear.spec.activations import Activation
from fastlinear.spec.formats import FP32, present
from fastlinear.spec.int4 import spelling
from fastlinear.spec.int8 import Requantize, Rows
from fastlinear.spec.precision import Precision
from fastlinear.spec.reference import Reference

IDENTITY = Activation("identity")  # what the op's string says for None
SCHEMA = (
    "linear(Tensor x, Tensor weight, Tensor? bias, str activation, float[] params, bool transposed, "
    "str packed='', str accumulate='fp32', str layout='', int n=0, int k=0, "
    "str rows='', float scale=0.0, int zero=0, Tensor? smooth=None, ScalarType? out=None, float out_scale=0.0, "
    "int out_zero=0, str products='fp32', str coding='', Tensor[]? operands=None) -> Tensor"
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
    products: str = FP32
    coding: str = ""
    tensors: Sequence[Tensor] | None = None  # the operands

    @property
    def operands(self) -> tuple[Tensor, ...]:
        return tuple(self.tensors or ())

    def precision(self) -> Precision:
        """What the op may round to."""
        rows = Rows(self.rows, self.scale, self.zero, self.smooth) if self.rows else None
        out = None if self.out is None else Requantize(self.out, self.out_scale, self.out_zero)
        coding = spelling(self.coding) if self.coding else None
        return Precision(
            present(self.packed) or None, self.accumulate, rows, out, products=self.products, coding=coding
        )

    def fused(self) -> Activation | None:
        """The activation as a layer has it."""
        return None if self.activation == IDENTITY.name else Activation(self.activation, tuple(self.params))

    def reference(self) -> Reference:
        """What the op computes, in torch's own ops."""
        return Reference(self.fused(), self.precision(), self.transposed, (self.layout, self.n, self.k))


def arguments(
    activation: Activation | None,
    transposed: bool,
    packed: str,
    precision: Precision,
    panels: tuple[str, int, int],
    operands: tuple[Tensor, ...] = (),
) -> Form:
    """What a layer tells the op. panels: layout, n and k of a frozen one, else "", 0 and 0."""
    name, params = activation or IDENTITY
    rows, out = precision.rows or Rows(""), precision.out or (None, 0.0, 0)
    coding = "" if precision.coding is None else precision.coding.spelled()
    rest: tuple[Any, ...] = (*panels, *rows, *out, precision.products, coding, [*operands] or None)
    return Form(name, list(params), transposed, packed, precision.accumulate, *rest)


def key_of(address: int | None, activation: Activation | None, transposed: bool, precision: Precision) -> Key:
    """Equal for what one layer may answer, whatever it is packed in."""
    rows, smooth = (precision.rows or Rows(""))._replace(smooth=None), address_of(precision.smooth)
    floats = precision.accumulate, precision.products, precision.coding
    return address, activation, transposed, floats, rows, smooth, precision.out


def address_of(t: Tensor | None) -> int | None:
    """Where the memory of a plain CPU tensor begins; None for anything else, which may have none."""
    if t is None or type(t) not in (Tensor, nn.Parameter) or t.layout is not torch.strided or t.device.type != "cpu":
        return None
    return t.data_ptr()


# The type of a Form, by which TorchScript knows it.
FORM = tuple[
    str,
    list[float],
    bool,
    str,
    str,
    str,
    int,
    int,
    str,
    float,
    int,
    Tensor | None,
    int | None,
    float,
    int,
    str,
    str,
    list[Tensor] | None,
]
