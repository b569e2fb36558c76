"""The backward of a fast layer, for eval mode: the kernels answer, and torch's autograd is told how to go back.

With z = x^ W^T + b and y = activation(z), or a program of z and of operands, which then have gradients, too, in the
numbers that the kernels multiply (`reference`), and
g' = g activation'(z):

    dx = g' W^,    dW = g'^T x^,    db = sum g'

in fp32. Where the derivative cannot be told from y, z is kept, too: the product that makes y stores it beside, tile by
tile. What else is kept is x, weight and y, as far as they are needed, and as torch keeps them: a change of them in
place is torch's own error. Differentiated twice, all is made of torch's ops.

dx is a product like any other: by W^ in panels of its own, [K, N], which the first backward through a pack makes and
which go with the pack; but not where the weight wants gradients itself, and so will be another one soon.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

import fastlinear._plans as _plans
import fastlinear._products as _products
import fastlinear._torch as _torch
import fastlinear._weights as _weights
from fastlinear._plans import bucket
from fastlinear.layer.lock import lock
from fastlinear.plan import decide, table
from fastlinear.plan.problem import FROZEN, Problem
from fastlinear.spec import activations, programs
from fastlinear.spec.activations import Activation
from fastlinear.spec.formats import FP32, name_of
from fastlinear.spec.int8 import handed_on
from fastlinear.spec.packed import numbers
from fastlinear.spec.precision import Precision
from fastlinear.spec.reference import Reference, width

# Activations with the same slope at y = activation(z) as at z; leaky_relu if it keeps the sign.
_TOLD_BY_OUTPUT = {"relu", "relu6", "hardtanh", "leaky_relu"}
_SUMS = _plans.Epilogue()
_SMALL = 2**16  # multiply-adds that torch has done before a product of ours is looked up, planned and called


class Transpose:
    """W^ of a pack, [N, K], in panels of [K, N] and the narrowest floats that hold it exactly: integers below 2^8 are
    bf16, and their scales multiply g; codes of 4 bits are fp32. Its plans are kept like those of a layer."""

    def __init__(self, packed: _weights.Packed) -> None:
        self.scale = None if packed.grouped else packed.scale
        if self.scale is None:
            values = numbers(packed)
        else:
            values, zero = packed.unpack(), packed.zero
            centered = values if zero is None else values.short() - zero.short()[:, None]
            values = centered.to(torch.bfloat16)
        self.packed = _weights.Packed(values.t(), table.layout(name_of(values.dtype)))
        self._plans: dict[tuple[int, torch.dtype, int], Any] = {}

    def product(self, g: Tensor, measure: bool) -> Tensor:
        """g W^ [M, K] of a dense g [M, N], in the dtype of g, which is fp32 where there are scales."""
        g = g if self.scale is None else g * self.scale
        dx = torch.empty(len(g), self.packed.n, dtype=g.dtype, device="cpu")
        if dx.numel() > 0:
            _products.run(self.packed, self._plan(len(g), g.dtype, measure), _SUMS, g, None, dx)
        return dx

    def _plan(self, m: int, dtype: torch.dtype, measure: bool) -> Any:
        m, threads, packed = bucket(m), _products.num_threads(), self.packed
        plan = self._plans.get((threads, dtype, m))
        if plan is None or 0 < plan.due < time.monotonic():
            formats = name_of(dtype), packed.format, FROZEN, FP32
            problem = Problem(m, packed.n, packed.k, *formats, False, None, False, threads, layout=packed.layout)
            operands = decide.Operands(None, None, packed)
            plan = decide.executable(decide.decide(problem, operands, measure=measure), problem, operands)
            self._plans[threads, dtype, m] = plan
        return plan


_transposes: WeakKeyDictionary[_weights.Packed, Transpose] = WeakKeyDictionary()


def transpose_of(packed: _weights.Packed) -> Transpose:
    """That of a pack, made when it is first asked for."""
    with lock:
        made = _transposes.get(packed)
        if made is None:
            made = _transposes[packed] = Transpose(packed)
        return made


def nbytes(packed: _weights.Packed) -> int:
    """What a pack has in memory for its backward."""
    made = _transposes.get(packed)
    return 0 if made is None else made.packed.nbytes


class Attachment:
    """Gives the answers of a layer their gradients. weight: what stands for it where the layer has no Parameter;
    measure: whether products of the backward are tuned. An engine may hold it, and so it holds no engine."""

    def __init__(self, reference: Reference, weight: Tensor | None = None, measure: bool = False) -> None:
        self.reference, self.measure = reference, measure
        self._weight, self._out, self.frozen = weight, reference.precision.out, weight is not None
        self.again = needs_sums(reference.activation, reference.precision)  # z is needed, and so all that it is made of
        self.told = reference.activation is not None and not self.again

    def __call__(
        self,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        y: Tensor,
        packed: _weights.Packed | None = None,
        operands: Sequence[Tensor] = (),
        sums: Tensor | None = None,
    ) -> Tensor:
        """y, which is reference.floats(x, weight, bias, operands) by other means, with the gradients of that in reverse
        mode. packed: what the kernels multiplied, so that the backward need not pack or round again; sums: z, if it
        was kept."""
        weight = self._weight if weight is None else weight
        y = y if self._out is None else handed_on(y, self._out)
        return _apply(x, weight, bias, self, packed, (y, sums), *operands)


def needs_sums(activation: Activation | None, precision: Precision) -> bool:
    """Whether the derivative of what follows the product is not told by y."""
    return activation is not None and (precision.out is not None or not _is_told_by_output(activation))


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        by: Attachment,
        packed: _weights.Packed | None,
        answer: tuple[Tensor, Tensor | None],
        *operands: Tensor,
    ) -> Tensor:
        ctx.answered = by, packed
        (y, sums), again, needs = answer, by.again, ctx.needs_input_grad
        ctx.save_for_backward(
            x if needs[1] else _kept(x) if again else None,
            weight if needs[0] else _kept(weight) if again else None,
            _kept(bias) if again and bias is not None else None,
            y if by.told else sums,
            *map(_kept, operands),
        )
        return y

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, bias, kept, *operands = ctx.saved_tensors
        by, packed = ctx.answered
        reference: Reference = by.reference
        # Differentiated once more, traced or batched, all of it has to be of torch's ops.
        if torch.is_grad_enabled() or type(g) is not Tensor or _is_transformed(g):
            packed = None
        wide, of_operands = _as(g, width(g)), []
        if by.told:
            wide, *_ = _through(reference.activation, kept, wide)
        elif reference.activation is not None:
            z = reference.sums(x, weight, bias) if packed is None or kept is None else kept
            wide, *of_operands = _through(reference.activation, z, wide, operands)
        flat, smooth = _flat(wide), reference.precision.smooth
        dx = dw = db = None
        of_x, of_weight, of_bias, *_ = ctx.needs_input_grad
        if of_x:
            dx = _back(by, packed, weight, flat, of_weight)
            dx = dx if wide.dim() == 2 else dx.view(*wide.shape[:-1], dx.shape[-1])
            dx = dx if smooth is None else dx * smooth
        if of_weight:
            dw = flat.t() @ _flat(reference.rows(x))
            dw = dw if smooth is None else dw / smooth
            dw = dw.t() if reference.transposed else dw
        if of_bias:
            db = flat.sum(0)
        return dx, dw, db, None, None, None, *of_operands  # autograd makes them of the dtypes of x, weight and bias


# Function.apply without its looks for functorch, which whoever comes here has had.
_apply: Callable[..., Tensor] = super(torch.autograd.Function, _Product).apply


def _back(by: Attachment, packed: _weights.Packed | None, weight: Tensor, g: Tensor, of_weight: bool) -> Tensor:
    """g W^ [M, K]."""
    reference = by.reference
    rounded = packed is None or packed.scale is None  # to quantize a weight again costs more than to unpack it
    small = rounded and not by.frozen and g.shape[0] * weight.numel() <= _SMALL
    if not of_weight and not small and packed is not None:
        return transpose_of(packed).product(g.contiguous(), by.measure)
    if packed is not None and not rounded:
        return g @ _as(numbers(packed), g.dtype)
    return g @ _as(reference.weight(weight), g.dtype)


def _as(t: Tensor, dtype: torch.dtype) -> Tensor:
    return t if t.dtype is dtype else t.to(dtype)  # even a to() that does nothing costs a call


def _flat(t: Tensor) -> Tensor:
    return t if t.dim() == 2 else t.reshape(-1, t.shape[-1])


def _is_told_by_output(activation: Activation | None) -> bool:
    return activation is not None and activation.name in _TOLD_BY_OUTPUT and min((0.0, *activation.params[:1])) >= 0


def _kept(t: Tensor) -> Tensor:
    """What torch would not save, and so would not refuse to: tensors made in inference mode."""
    return t.clone() if t.is_inference() else t


def _is_transformed(g: Tensor) -> bool:
    """Whether some transform of torch.func is on, or g is a batch of gradients (is_grads_batched)."""
    return _torch.transform() is not None or _torch.is_batched(g)


def _through(program: Activation | None, z: Tensor, g: Tensor, operands: Sequence[Tensor] = ()) -> tuple[Tensor, ...]:
    """The gradients of z and of the operands, of which g is that of program(z), themselves differentiable where
    gradients are on."""
    twice = torch.is_grad_enabled()
    # Autograd within autograd costs several small products.
    dz = None if twice or program is None else activations.slope(program, g, z.to(g.dtype))
    if dz is not None:
        return (dz,)
    z = z.to(g.dtype) if twice else z.detach().to(g.dtype)
    with torch.enable_grad():
        # Each as a node of its own: one operand may have been made of another.
        own = [t.view_as(t) if twice and t.requires_grad else t.detach().requires_grad_() for t in (z, *operands)]
        y = programs.apply(program, own[0], own[1:])
        return torch.autograd.grad(y, own, g, create_graph=twice, materialize_grads=True)
