"""What a mixture of experts computes, in plain torch: the specification that the grouped products follow.

    y[t] = sum_j weights[t, j] * second_e(program(first_e(x[t]))),    e = ids[t, j]

first_e and second_e are linear layers, one of each an expert; the program is a gate of the two halves of what first_e
makes, or an activation. What lies between the two is rounded to the dtype of x; what second_e makes is not: weights and
sum are of fp32 (of fp64 for an fp64 x), in the order of j, and y is rounded once. An id of E, one past the last, stands
for no expert and adds nothing: it is what the other machines' experts are called where experts are spread over many.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

import fastlinear._weights as _weights
from fastlinear.spec.activations import Activation
from fastlinear.spec.int4 import spelling
from fastlinear.spec.int8 import Rows
from fastlinear.spec.precision import AS_HELD, Precision
from fastlinear.spec.reference import Reference

Product = Callable[[int, Tensor], Tensor]  # (expert, rows) -> what its layer makes of them


class Form(NamedTuple):
    """How a module holds its experts, and what they compute.

    transposed: a weight is [in, out]; interleaved: the channels of gates and of what goes through them take turns; else
    they are in halves. panels: of frozen experts the layouts, N and K of both weights.
    """

    program: Activation | None
    precision: Precision = AS_HELD
    transposed: bool = False
    interleaved: bool = False
    panels: tuple[tuple[str, int, int], tuple[str, int, int]] | None = None

    def spelled(self) -> str:
        """One string for it, which `spelling_of` reads. There is no smoothing, and no sample."""
        name, params = self.program or (None, ())
        p = self.precision
        rows = None if p.rows is None else p.rows.kind
        coding = None if p.coding is None else p.coding.spelled()
        floats = (p.packed, p.accumulate, rows, p.products, coding)
        return json.dumps([name, params, floats, self.transposed, self.interleaved, self.panels])

    def weight(self, weight: Tensor) -> Tensor:
        """That of one expert for its first product as [N, K], the halves one after another."""
        w = weight.mT if self.transposed else weight
        return _in_halves(w, -2) if self.interleaved else w

    def bias(self, bias: Tensor | None) -> Tensor | None:
        """[..., N] of the first product likewise."""
        return _in_halves(bias, -1) if self.interleaved and bias is not None else bias

    def held(self, weight: Tensor) -> Tensor:
        """A weight [N, K] of the first product as the module holds it."""
        if self.interleaved:
            weight = torch.stack(weight.chunk(2, -2), -2).flatten(-3, -2)
        return weight.mT if self.transposed else weight


def spelling_of(spelled: str) -> Form:
    """What `Form.spelled` wrote."""
    name, params, floats, transposed, interleaved, panels = json.loads(spelled)
    packed, accumulate, rows, products, coding = floats
    precision = Precision(
        packed,
        accumulate,
        rows=None if rows is None else Rows(rows),
        products=products,
        coding=None if coding is None else spelling(coding),
    )
    of_panels = None if panels is None else (tuple(panels[0]), tuple(panels[1]))
    program = None if name is None else Activation(name, tuple(params))
    return Form(program, precision, transposed, interleaved, of_panels)


def _in_halves(t: Tensor, dim: int) -> Tensor:
    return torch.cat([t.unflatten(dim, (-1, 2)).select(dim, half) for half in (0, 1)], dim)


def experts(
    x: Tensor, ids: Tensor, weights: Tensor, count: int, first: Product, second: Product, dense: bool = False
) -> Tensor:
    """y [M, N] of x [M, K], ids [M, T] and weights [M, T]; second's rows are of fp32 or fp64.

    dense: every expert gets every row, which no contents decide, so that it can be traced; else its own.
    """
    if dense:
        return _dense(x, ids, weights, count, first, second)
    top_k = ids.shape[1]
    pairs = ids.reshape(-1)
    places, parts = [], []
    for expert in pairs.unique().tolist():
        if expert < count:
            at = (pairs == expert).nonzero().squeeze(1)
            places.append(at)
            parts.append(second(expert, first(expert, x[at // top_k])))
    if not parts:
        return torch.zeros_like(x)
    every = torch.cat(parts)
    spread = every.new_zeros(len(pairs), every.shape[-1]).index_copy(0, torch.cat(places), every)
    return _mixed(spread.view(*ids.shape, -1), weights).to(x.dtype)


def _mixed(parts: Tensor, weights: Tensor) -> Tensor:
    """sum over j of weights [M, T] times parts [M, T, N], in that order."""
    y = parts.new_zeros(parts.shape[0], parts.shape[2])
    for j in range(parts.shape[1]):
        y = y + weights[:, j, None].to(parts.dtype) * parts[:, j]
    return y


def _dense(x: Tensor, ids: Tensor, weights: Tensor, count: int, first: Product, second: Product) -> Tensor:
    y = None
    for expert in range(count):
        chosen = ids == expert
        share = torch.where(chosen, weights, 0.0).sum(-1, keepdim=True)
        part = second(expert, first(expert, x))
        part = torch.where(chosen.any(-1, keepdim=True), part * share.to(part.dtype), 0.0)
        y = part if y is None else y + part
    assert y is not None
    return y.to(x.dtype)


def _panels(reference: Reference, stored: Tensor) -> Tensor:
    """The panels of one expert, behind which there may be some bytes up to those of the next."""
    return stored[: _weights.packed_nbytes(*reference.panels)]


def computed(
    form: Form,
    x: Tensor,
    ids: Tensor,
    weights: Tensor,
    first: Tensor,
    second: Tensor,
    first_bias: Tensor | None = None,
    second_bias: Tensor | None = None,
    dense: bool = False,
) -> Tensor:
    """The same of a module's tensors: weights [E, ...] and biases [E, N] as it holds them, or uint8 [E, bytes] where
    they are frozen. All of it can be differentiated, as `Reference` says."""
    up = Reference(form.program, form.precision, False, form.panels[0] if form.panels else ("", 0, 0))
    down = Reference(None, form.precision, form.transposed, form.panels[1] if form.panels else ("", 0, 0))
    biases = form.bias(first_bias)

    def ahead(expert: int, rows: Tensor) -> Tensor:
        weight = _panels(up, first[expert]) if form.panels else form.weight(first[expert])
        return up.linear(rows, weight, None if biases is None else biases[expert])

    def behind(expert: int, rows: Tensor) -> Tensor:
        weight = _panels(down, second[expert]) if form.panels else second[expert]
        return down.sums(rows, weight, None if second_bias is None else second_bias[expert])

    return experts(x, ids, weights, len(first), ahead, behind, dense)
