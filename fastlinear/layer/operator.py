"""The dispatcher's view of a fast layer: the op fastlinear::linear.

    linear(x, weight, bias, activation, params, transposed, packed, accumulate) = activation(F.linear(x, weight, bias))

weight is the canonical one, [N, K], or [K, N] if `transposed`; x is [..., K] and the output [..., N], contiguous, of
the dtype of x. `packed` is the format that the weight is rounded to, its own if "", `accumulate` the least exact
one of the sums, and `rows` with `scale`, `zero` and `smooth` tell how x is quantized, or was, where it is integers.
With `out`, a dtype, the output is integers, of `out_scale` and `out_zero`; `products` is the format that
x is rounded to, if it is floats. `activation` and `params` may spell a whole epilogue program (spec/programs.py), whose
tensors are `operands`. `reference` says it all in torch's ops.
The packed weight is no argument but an accelerator behind the
scenes: on the CPU, the layer whose parameters these are is looked up by their memory and its engine answers. So a graph
that holds the op never holds packed bytes, goes where the parameters go, and is right for any other tensors too.

A frozen layer has no canonical weight: its panels stand there, with `layout`, N and K, and its graphs hold them. What
needs the weight itself has it from fastlinear::unpack(panels, layout, n, k, smooth), [N, K] in the dtype of the layout,
or in fp32 where that is integers.

Eager calls do not pass here (the dispatcher costs 3 us): it serves Dynamo and the profiler.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

import fastlinear._tensors as _tensors
import fastlinear._torch as _torch
import fastlinear._weights as _weights
from fastlinear.layer import gradient
from fastlinear.layer.form import FORM, SCHEMA, Form, arguments, key_of
from fastlinear.layer.lookup import Layer, find, key_of_layer
from fastlinear.spec import activations
from fastlinear.spec.activations import Activation
from fastlinear.spec.formats import DTYPES, name_of, present
from fastlinear.spec.packed import numbers
from fastlinear.spec.programs import is_gated

_AUTOCAST = _torch.DispatchKeySet(_torch.DispatchKey.AutocastCPU)


def unpack(panels: Tensor, layout: str, n: int, k: int, smooth: Tensor | None = None) -> Tensor:
    """The weight [n, k] of which `panels` are the packed bytes, after its columns were divided by `smooth` if that is
    given; an op, and so right in every mode of torch."""
    weight: Tensor = torch.ops.fastlinear.unpack.default(panels, layout, n, k)
    return weight if smooth is None else weight * smooth


def linear(layer: Layer, x: Tensor, bare: bool = False, operands: tuple[Tensor, ...] = ()) -> Tensor:
    """layer(x, *operands) as the op where that is what a fast layer would run natively, else as torch's own ops;
    traceable."""
    precision = layer.computes(bare)[1]
    weight, bias = layer._parameters.get("weight"), layer._parameters.get("bias")
    frozen = layer._frozen if weight is None else None
    if layer.training or (weight is None and frozen is None) or not _native_form(layer, x, weight, bias, operands):
        return layer._torch(x, bare, operands)
    tensors = (x, weight, bias, *operands)
    wanted = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)
    if wanted and precision.out is not None:  # integers have no gradients
        return layer._torch(x, bare, operands)
    return recorded(layer, x, bare, operands)


def recorded(layer: Layer, x: Any, bare: bool, operands: tuple[Any, ...] = ()) -> Tensor:
    """The call of the op, without a look at x: torch.fx hands its Proxy."""
    activation, precision = layer.computes(bare)
    operand, panels = layer._parameters.get("weight"), ("", 0, 0)
    if operand is None:
        operand, panels = layer._frozen.panels, layer._frozen.form
    form = arguments(activation, layer._transposed, layer.packed_as, precision, panels, operands)
    y: Tensor = _op(x, operand, layer._parameters.get("bias"), *form)
    return y


def for_script(layer: Layer, bare: bool) -> tuple[Tensor | None, Any]:
    """What stands for the weight of a frozen layer, and the arguments of the op behind the bias, as TorchScript takes
    them."""
    activation, precision = layer.computes(bare)
    frozen = layer._frozen if layer._parameters.get("weight") is None else None
    panels = None if frozen is None else frozen.form
    form = arguments(activation, layer._transposed, layer.packed_as, precision, panels or ("", 0, 0))
    return None if frozen is None else frozen.panels, torch.jit.Attribute(tuple(form), FORM)


def _native_form(
    layer: Layer, x: Tensor, weight: Tensor | None, bias: Tensor | None, operands: tuple[Tensor, ...] = ()
) -> bool:
    if (
        type(x) not in (Tensor, nn.Parameter, _torch.FakeTensor)
        or x.is_nested
        or x.dim() == 0
        or x.shape[-1] != layer._columns()
    ):
        return False
    if weight is not None and weight.dim() != 2:
        return False
    tensors = [t for t in (x, weight, bias) if t is not None]
    dense = all(t.device.type == "cpu" and t.layout is torch.strided for t in (*tensors, *operands))
    fit = (torch.is_autocast_enabled("cpu") and all(t.dtype in _tensors.FORMATS for t in tensors)) or layer._takes(x)
    return dense and fit


def _formula(x: Tensor, weight: Tensor, bias: Tensor | None, *rest: Any) -> Tensor:
    form = Form(*rest)
    return form.reference().linear(x, weight, bias, form.operands)


def _cpu(x: Tensor, weight: Tensor, bias: Tensor | None, *rest: Any) -> Tensor:
    form = Form(*rest)
    packed = present(form.packed) or name_of(weight.dtype)
    key = key_of(weight.data_ptr(), form.fused(), form.transposed, form.precision())
    slot = (*key, packed)
    layer = find(slot, key, packed, weight, bias)
    y = None if layer is None else layer._native(x, packed, key_of_layer(layer, False) != key, form.operands)
    return _formula(x, weight, bias, *rest).contiguous() if y is None else y


def _fake(x: Tensor, weight: Tensor, bias: Tensor | None, *rest: Any) -> Tensor:
    form = Form(*rest)
    n, k = (form.n, form.k) if form.layout else reversed(weight.shape) if form.transposed else weight.shape
    torch._check(x.dim() > 0 and x.shape[-1] == k, lambda: f"fastlinear::linear: x {x.shape} needs {k} columns")
    n = n // 2 if is_gated(form.fused()) else n
    dtype = form.out or (x.dtype if x.dtype.is_floating_point else torch.float32)
    return x.new_empty((*x.shape[:-1], n), dtype=dtype)


def _unpack(panels: Tensor, layout: str, n: int, k: int) -> Tensor:
    packed = _weights.Packed.over(panels.numpy(), present(layout), n, k)
    return numbers(packed)


def _fake_weight(panels: Tensor, layout: str, n: int, k: int) -> Tensor:
    return panels.new_empty((n, k), dtype=DTYPES.get(layout.split("/")[0], torch.float32))


def _autocast(x: Tensor, weight: Tensor, bias: Tensor | None, *rest: Any) -> Tensor:
    """F.linear under autocast: x is cast, and the weight packed as it is cast."""
    form, dtype = Form(*rest), torch.get_autocast_dtype("cpu")
    integers = form.precision().numbers(x) is not x
    if x.dtype not in _tensors.FORMATS and not integers:  # autocast leaves fp64 alone
        return _formula(x, weight, bias, *rest)
    form = form._replace(packed=form.precision().under(dtype))
    with _torch.ExcludeDispatchKeyGuard(_AUTOCAST):
        y: Tensor = _op(x if integers else x.to(dtype), weight, bias, *form)
    return y


def _autograd(keyset: Any, x: Tensor, weight: Tensor, bias: Tensor | None, *rest: Any) -> Tensor:
    """What reverse mode differentiates has a backward of its own; other derivatives are those of torch's ops."""

    def below() -> Tensor:
        y: Tensor = _op.redispatch(keyset & _torch.after_autograd, x, weight, bias, *rest)
        return y

    form = Form(*rest)
    tensors = [t for t in (x, weight, bias, *form.operands) if t is not None]
    differentiated = torch.is_grad_enabled() and any(t.requires_grad for t in tensors)
    # Dynamo enters forward_ad without its Python level, so the tensors are asked themselves; there is but one level, 0.
    if any(_torch.unpack_dual(t, level=0)[1] is not None for t in tensors):
        return _formula(x, weight, bias, *rest)
    if not differentiated or form.out is not None:
        return below()
    if _torch.transform() is not None:
        return _formula(x, weight, bias, *rest)
    with torch.no_grad():
        y = below()
    return gradient.Attachment(form.reference())(x, weight, bias, y, None, form.operands)


def _vmap(
    info: Any, in_dims: tuple[int | None, ...], x: Tensor, weight: Tensor, bias: Tensor | None, *rest: Any
) -> tuple[Tensor, int]:
    """A batch of inputs is more rows of x; a batch of parameters is a batched product."""
    of_x, of_weight, of_bias, *_ = in_dims
    form = Form(*rest)
    if form.operands:
        dims: Any = in_dims[3 + Form._fields.index("tensors")]
        batched = [_in_front(t, d, x.dim() + (of_x is None)) for t, d in zip(form.operands, dims, strict=True)]
        rest = form._replace(tensors=batched)
    x = x.expand(info.batch_size, *x.shape) if of_x is None else x.movedim(of_x, 0)
    if of_weight is None and of_bias is None:
        return _op(x, weight, bias, *rest), 0
    reference, operands = Form(*rest).reference(), Form(*rest).operands
    rows = reference.rows(x)
    weight = reference.weight(weight if of_weight is None else weight.movedim(of_weight, 0)).to(rows.dtype)
    y = rows.reshape(info.batch_size, x.shape[1:-1].numel(), x.shape[-1]) @ weight.mT
    if bias is not None:
        y = y + (bias if of_bias is None else bias.movedim(of_bias, 0).unsqueeze(1)).to(y.dtype)
    return reference.finish(y.reshape(*x.shape[:-1], y.shape[-1]), x.dtype, operands), 0


def _in_front(operand: Tensor, dim: int | None, dims: int) -> Tensor:
    """An operand with its batch, if it has one, as the first of `dims` dimensions."""
    if dim is None:
        return operand
    operand = operand.movedim(dim, 0)
    return operand.reshape(operand.shape[0], *[1] * (dims - operand.dim()), *operand.shape[1:])


_library = torch.library.Library("fastlinear", "DEF")
_library.define(SCHEMA, tags=(torch.Tag.pt2_compliant_tag,))
_op = torch.ops.fastlinear.linear.default
_library.impl("linear", _cpu, "CPU")
_library.impl("linear", _formula, "CompositeExplicitAutograd")  # every other device
_library.impl("linear", _autocast, "AutocastCPU")
_library.impl("linear", _autograd, "Autograd", with_keyset=True)
_library.impl("linear", _fake, "Meta")  # register_fake looks through all modules for who calls it
torch.library.register_vmap("fastlinear::linear", _vmap, lib=_library)

_library.define("activation(Tensor y, str name, float[] params) -> Tensor", tags=(torch.Tag.pt2_compliant_tag,))
_library.impl(
    "activation", lambda y, name, params: activations.apply(Activation(name, params), y), "CompositeImplicitAutograd"
)

_library.define("unpack(Tensor panels, str layout, int n, int k) -> Tensor", tags=(torch.Tag.pt2_compliant_tag,))
_library.impl("unpack", _unpack, "CPU")
_library.impl("unpack", _fake_weight, "Meta")
