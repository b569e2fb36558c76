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
from torch.autograd.function import once_differentiable

import fastlinear._environment as environment
import fastlinear._modes as _modes
import fastlinear._torch as _torch
from fastlinear.layer.form import address_of
from fastlinear.spec.experts import computed, spelling_of

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


def _cpu(x: Tensor, ids: Tensor, weights: Tensor, *rest: Any) -> Tensor:
    *tensors, form, handle = rest
    y = None
    module = _modules.get(handle)
    if module is not None and module._spelled == form and _may_answer(module, x, ids, weights, tuple(tensors)):
        y = module.native(x, ids, weights)
    return _formula(x, ids, weights, *rest) if y is None else y


def _formula(x: Tensor, ids: Tensor, weights: Tensor, *rest: Any) -> Tensor:
    *tensors, form, _handle = rest
    return computed(_form(form), x, ids, weights, *tensors).contiguous()


def _fake(x: Tensor, *_: Any) -> Tensor:
    return x.new_empty(x.shape)


_DIFFERENTIABLE = (0, 2, 3, 4, 5, 6)  # of the op's arguments


def _gradients(grad: Tensor, x: Tensor, ids: Tensor, *rest: Any) -> list[Tensor]:
    """The gradients of what `wanted` says, of x, weights, both weights and both biases: those of the specification."""
    *tensors, form, wanted = rest
    given = [x, *tensors]
    leaves = [
        None if t is None else t.detach().requires_grad_() if want else t.detach()
        for t, want in zip(given, wanted, strict=True)
    ]
    with torch.enable_grad():
        y = computed(_form(form), leaves[0], ids, *leaves[1:])  # type: ignore[arg-type]
    asked = [leaf for leaf, want in zip(leaves, wanted, strict=True) if leaf is not None and want]
    found = torch.autograd.grad(y, asked, grad, allow_unused=True) if y.requires_grad else [None] * len(asked)
    return [torch.zeros_like(t) if g is None else g.contiguous() for g, t in zip(found, asked, strict=True)]


def _back_autograd(keyset: Any, *arguments: Any) -> list[Tensor]:
    """Where autograd still is, which it is not below this; whoever traces gets the op."""
    if not _modes.watched():
        return _gradients(*arguments)
    return _back.redispatch(keyset & _torch.after_autograd, *arguments)  # type: ignore[no-any-return]


def _fake_gradients(grad: Tensor, x: Tensor, ids: Tensor, *rest: Any) -> list[Tensor]:
    *tensors, _form, wanted = rest
    return [t.new_empty(t.shape) for t, want in zip([x, *tensors], wanted, strict=True) if want and t is not None]


class _Mixture(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, below: Any, *arguments: Any) -> Tensor:
        ctx.save_for_backward(*arguments[:-2])
        ctx.form = arguments[-2]
        y: Tensor = _op.redispatch(below, *arguments)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        needs = ctx.needs_input_grad[1:]
        wanted = [bool(needs[i]) for i in _DIFFERENTIABLE]
        found = iter(_back(grad.contiguous(), *ctx.saved_tensors, ctx.form, wanted))
        grads: list[Any] = [None] * len(needs)
        for i, want in zip(_DIFFERENTIABLE, wanted, strict=True):
            grads[i] = next(found) if want else None
        return None, *grads


def _autograd(keyset: Any, *arguments: Any) -> Tensor:
    """What reverse mode differentiates has a backward of its own; other derivatives are those of torch's ops."""
    tensors = [t for t in arguments[:-2] if t is not None]
    dual = any(_torch.unpack_dual(t, level=0)[1] is not None for t in tensors)
    if dual or _torch.transform() is not None:
        return functools.partial(computed, dense=True)(_form(arguments[-2]), *arguments[:-2])
    if torch.is_grad_enabled() and any(t.requires_grad for t in tensors):
        y: Tensor = _Mixture.apply(keyset & _torch.after_autograd, *arguments)  # type: ignore[no-untyped-call]
        return y
    return _op.redispatch(keyset & _torch.after_autograd, *arguments)  # type: ignore[no-any-return]


_PARAMETERS = (
    "Tensor x, Tensor ids, Tensor weights, Tensor first, Tensor second, Tensor? first_bias, Tensor? second_bias"
)
_library = torch.library.Library("fastlinear", "FRAGMENT")
_library.define(f"experts({_PARAMETERS}, str form, int handle) -> Tensor", tags=(torch.Tag.pt2_compliant_tag,))
_library.define(
    f"experts_backward(Tensor grad, {_PARAMETERS}, str form, bool[] wanted) -> Tensor[]",
    tags=(torch.Tag.pt2_compliant_tag,),
)
_op = torch.ops.fastlinear.experts.default
_back = torch.ops.fastlinear.experts_backward.default
_library.impl("experts", _cpu, "CPU")
_library.impl("experts", _formula, "CompositeExplicitAutograd")  # every other device
_library.impl("experts", _autograd, "Autograd", with_keyset=True)
_library.impl("experts_backward", _gradients, "CompositeExplicitAutograd")
_library.impl("experts_backward", _back_autograd, "Autograd", with_keyset=True)
_library.impl("experts", _fake, "Meta")
_library.impl("experts_backward", _fake_gradients, "Meta")
