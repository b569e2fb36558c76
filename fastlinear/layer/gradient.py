"""The backward of a fast layer, for eval mode: the kernels answer, and torch's autograd is told how to go back.

With z = x^ W^T + b and y = activation(z), in the numbers that the kernels multiply (`reference`), and
g' = g activation'(z):

    dx = g' W^,    dW = g'^T x^,    db = sum g'

in fp32. z is not kept: where the derivative cannot be told from y, a product without activation computes it again, so
that a call whose gradients nobody asks for, in torch's default mode, costs little. What is kept is x, weight
and y, as far as they are needed, and as torch keeps them: a change of them in place is torch's own error.
Differentiated twice, all is made of torch's ops.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

import fastlinear._kernels as _kernels
from fastlinear.spec import activations
from fastlinear.spec.activations import Activation
from fastlinear.spec.int8 import Quantized, dequantize
from fastlinear.spec.reference import Reference, width

# Activations with the same slope at y = activation(z) as at z; leaky_relu if it keeps the sign.
_TOLD_BY_OUTPUT = {"relu", "relu6", "hardtanh", "leaky_relu"}


class Native(NamedTuple):
    """What ran, so that the backward need not pack, plan or round again."""

    packed: _kernels.Packed
    plan: _kernels.Plan | None  # None where no kernel of the table ran
    rows: _kernels.RowQuantizer | None

    def sums(self, x: Tensor, bias: Tensor | None) -> Tensor | None:
        """x^ W^T + b, in fp32, or None where the plan is of no use."""
        if self.plan is None:
            return None
        flat = x.reshape(-1, self.packed.k).contiguous()
        z = torch.empty(len(flat), self.packed.n, dtype=torch.float32, device="cpu")
        _kernels.run(self.packed, self.plan, _SUMS, flat, bias, z, self.rows)
        return z.view(*x.shape[:-1], self.packed.n)

    def weight(self) -> Tensor | None:
        """W^ [N, K] of an int8 weight, which it costs more to quantise again than to unpack."""
        scale = self.packed.scale
        return None if scale is None else dequantize(Quantized(self.packed.unpack(), scale, self.packed.zero))


_SUMS = _kernels.Epilogue()


def attach(
    run: Callable[[], Tensor],
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    reference: Reference,
    native: Native | None = None,
) -> Tensor:
    """run(), which is reference.floats(x, weight, bias) by other means, with the gradients of that in reverse mode."""
    y: Tensor = _Product.apply(x, weight, bias, run, reference, native)  # type: ignore[no-untyped-call]
    return y


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        run: Callable[[], Tensor],
        reference: Reference,
        native: Native | None,
    ) -> Tensor:
        y = run()
        told = reference.precision.out is None and _is_told_by_output(reference.activation)
        again = reference.activation is not None and not told  # z is needed, and so all that it is made of
        of_x, of_weight, *_ = ctx.needs_input_grad
        ctx.reference, ctx.native = reference, native
        ctx.dtypes = x.dtype, weight.dtype, None if bias is None else bias.dtype
        ctx.save_for_backward(
            x if of_weight else _kept(x) if again else None,
            weight if of_x else _kept(weight) if again else None,
            _kept(bias) if again and bias is not None else None,
            y if told else None,
        )
        return y

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, bias, y = ctx.saved_tensors
        reference: Reference = ctx.reference
        # Differentiated once more, traced or batched, all of it has to be of torch's ops.
        native = None if torch.is_grad_enabled() or type(g) is not Tensor or _is_transformed() else ctx.native
        g = g.to(width(g))
        if y is not None:
            g = _through(reference.activation, y, g)
        elif reference.activation is not None:
            z = None if native is None else native.sums(x, bias)
            g = _through(reference.activation, reference.sums(x, weight, bias) if z is None else z, g)
        flat, smooth = g.reshape(-1, g.shape[-1]), reference.precision.smooth
        dx = dw = db = None
        to_x, to_weight, to_bias = ctx.dtypes
        of_x, of_weight, of_bias, *_ = ctx.needs_input_grad
        if of_x:
            w = None if native is None else native.weight()
            dx = g @ (reference.weight(weight) if w is None else w).to(g.dtype)
            dx = (dx if smooth is None else dx * smooth).to(to_x)
        if of_weight:
            dw = flat.t() @ reference.rows(x).reshape(-1, x.shape[-1])
            dw = (dw if smooth is None else dw / smooth).to(to_weight)
            dw = dw.t() if reference.transposed else dw
        if of_bias:
            db = flat.sum(0).to(to_bias)
        return dx, dw, db, None, None, None


def _is_told_by_output(activation: Activation | None) -> bool:
    return activation is not None and activation.name in _TOLD_BY_OUTPUT and min((0.0, *activation.params[:1])) >= 0


def _kept(t: Tensor) -> Tensor:
    """What torch would not save, and so would not refuse to: tensors made in inference mode."""
    return t.clone() if t.is_inference() else t


def _is_transformed() -> bool:
    return torch._C._functorch.peek_interpreter_stack() is not None


def _through(activation: Activation | None, z: Tensor, g: Tensor) -> Tensor:
    """g activation'(z), itself differentiable where gradients are on."""
    twice = torch.is_grad_enabled()
    z = z.to(g.dtype) if twice else z.detach().to(g.dtype)
    with torch.enable_grad():
        z = z if z.requires_grad else z.requires_grad_()
        (through,) = torch.autograd.grad(activations.apply(activation, z), z, g, create_graph=twice)
    return through
