"""The dispatcher's view of fast experts: the op fastlinear::experts.

    experts(x, ids, weights, first, second, first_bias, second_bias, form, handle) -> y, as spec/experts.py says

`first` and `second` are the module's parameters, or the panels of frozen ones; `form` is a `Form`, spelled. The packed
weights are no arguments: `handle` tells the module that has them, which answers if the tensors are its own. So a graph
that holds the op is right for any tensors, and in any process. Eager calls pass here where gradients are wanted.
"""

from __future__ import annotations

import functools
import itertools
import weakref
from typing import Any

import torch
from torch import Tensor

import fastlinear._engine as _engine
import fastlinear._environment as environment
import fastlinear._torch as _torch
from fastlinear.layer.form import address_of
from fastlinear.spec.experts import Form, computed, spelling_of

_modules: weakref.WeakValueDictionary[int, Any] = weakref.WeakValueDictionary()
_numbers = itertools.count(1)
_form = functools.lru_cache(maxsize=1024)(spelling_of)


def register(module: Any) -> int:
    """The handle of a module, a new one each time."""
    handle = next(_numbers)
    _modules[handle] = module
    return handle


def call(module: Any, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
    """module(x, ids, weights) as the op; traceable."""
    y: Tensor = torch.ops.fastlinear.experts(x, ids, weights, *module.tensors(), module._spelled, module._handle)
    return y


def _may_answer(module: Any, x: Tensor, ids: Tensor, weights: Tensor, tensors: tuple[Tensor | None, ...]) -> bool:
    if environment.disabled() or module.training or not _is_of(module, tensors):
        return False
    return module.why_not_these(x, ids, weights) is None


def _is_of(module: Any, tensors: tuple[Tensor | None, ...]) -> bool:
    for own, given in zip(module.tensors(), tensors, strict=True):
        if (own is None) != (given is None):
            return False
        if own is not None and given is not None:
            same = own.dtype is given.dtype and own.shape == given.shape and own.stride() == given.stride()
            if not same or address_of(own) is None or address_of(own) != address_of(given.detach()):
                return False
    return True


@torch.library.custom_op("fastlinear::experts", mutates_args=())
def experts(
    x: Tensor,
    ids: Tensor,
    weights: Tensor,
    first: Tensor,
    second: Tensor,
    first_bias: Tensor | None,
    second_bias: Tensor | None,
    form: str,
    handle: int,
) -> Tensor:
    tensors = (first, second, first_bias, second_bias)
    module, how = _modules.get(handle), _form(form)
    y = None
    if module is not None and module._spelled == form and _may_answer(module, x, ids, weights, tensors):
        y = module.native(x, ids, weights)
    return _formula(how, x, ids, weights, tensors) if y is None else y


def _formula(form: Form, x: Tensor, ids: Tensor, weights: Tensor, tensors: tuple[Tensor | None, ...]) -> Tensor:
    return computed(form, x, ids, weights, *tensors).contiguous()  # type: ignore[arg-type]


@experts.register_fake
def _(x: Tensor, ids: Tensor, weights: Tensor, *rest: Any) -> Tensor:
    return x.new_empty(x.shape)


_DIFFERENTIABLE = (0, 2, 3, 4, 5, 6)  # of the op's arguments


def _gradients(
    grad: Tensor,
    x: Tensor,
    ids: Tensor,
    weights: Tensor,
    first: Tensor,
    second: Tensor,
    first_bias: Tensor | None,
    second_bias: Tensor | None,
    form: str,
    wanted: list[bool],
) -> list[Tensor]:
    """The gradients of what `wanted` says, of x, weights, both weights and both biases: those of the specification."""
    given = [x, weights, first, second, first_bias, second_bias]
    leaves = [
        None if t is None else t.detach().requires_grad_() if want else t.detach()
        for t, want in zip(given, wanted, strict=True)
    ]
    with torch.enable_grad():
        y = computed(_form(form), leaves[0], ids, *leaves[1:])  # type: ignore[arg-type]
    asked = [leaf for leaf, want in zip(leaves, wanted, strict=True) if leaf is not None and want]
    found = torch.autograd.grad(y, asked, grad, allow_unused=True) if y.requires_grad else [None] * len(asked)
    return [torch.zeros_like(t) if g is None else g.contiguous() for g, t in zip(found, asked, strict=True)]


def _autograd(keyset: Any, *arguments: Any) -> list[Tensor]:
    """Where autograd still is, which it is not below this; whoever traces gets the op."""
    if not _engine.watched():
        return _gradients(*arguments)
    return _back.redispatch(keyset & _torch.after_autograd, *arguments)  # type: ignore[no-any-return]


def _fake_gradients(grad: Tensor, *rest: Any) -> list[Tensor]:
    x, _ids, weights, first, second, first_bias, second_bias, _form, wanted = rest
    given = (x, weights, first, second, first_bias, second_bias)
    return [t.new_empty(t.shape) for t, want in zip(given, wanted, strict=True) if want and t is not None]


_library = torch.library.Library("fastlinear", "FRAGMENT")
_library.define(
    "experts_backward(Tensor grad, Tensor x, Tensor ids, Tensor weights, Tensor first, Tensor second, "
    "Tensor? first_bias, Tensor? second_bias, str form, bool[] wanted) -> Tensor[]",
    tags=(torch.Tag.pt2_compliant_tag,),
)
_back = torch.ops.fastlinear.experts_backward.default
_library.impl("experts_backward", _gradients, "CompositeExplicitAutograd")
_library.impl("experts_backward", _autograd, "Autograd", with_keyset=True)
torch.library.register_fake("fastlinear::experts_backward", _fake_gradients, lib=_library)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, form, _handle = inputs
    ctx.save_for_backward(*tensors)
    ctx.form = form


def _backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    wanted = [bool(ctx.needs_input_grad[i]) for i in _DIFFERENTIABLE]
    found = iter(_back(grad.contiguous(), *ctx.saved_tensors, ctx.form, wanted))
    grads: list[Any] = [None] * 9
    for i, want in zip(_DIFFERENTIABLE, wanted, strict=True):
        grads[i] = next(found) if want else None
    return tuple(grads)


experts.register_autograd(_backward, setup_context=_keep)
