"""Attention of a graph's call, on kernels of our own where they are faster; and the op fastlinear::attention.

    attention(query, key, value, mask, is_causal, scale, enable_gqa, sinks, cap)

is F.scaled_dot_product_attention of tensors [B, H, L, D], without dropout, and always gives the transpose of a
contiguous [B, L, H, D], so that what follows may view it as [B, L, H * D]. sinks [H] and cap, which torch's own has
not, are what fastlinear/spec/attention.py says.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

import fastlinear._attention as _attention
import fastlinear._environment as environment
import fastlinear._tensors as _tensors
import fastlinear._torch as _torch
from fastlinear._modes import undisturbed
from fastlinear.plan import attention as plan
from fastlinear.plan.attention import Answer, Question
from fastlinear.spec import attention as spec

SCHEMA = (
    "attention(Tensor query, Tensor key, Tensor value, Tensor? mask=None, bool is_causal=False, "
    "float? scale=None, bool enable_gqa=False, Tensor? sinks=None, float? cap=None) -> Tensor"
)
_MOST = 1024  # kinds of calls that a function remembers the answers for
Attention = Callable[[Tensor, Tensor, Tensor, Tensor | None, Tensor | None], Tensor]


class Rows(NamedTuple):
    """Rows as linear layers have them: q and y are [B, L, H * D], k and v [B, S, G * D], of H and G heads; with B
    second where `length_first`."""

    heads: int
    kv_heads: int
    length_first: bool = False

    def cut(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """q, k and v by heads: [B, H, L, D] and [B, G, S, D]."""
        order = (1, 2, 0, 3) if self.length_first else (0, 2, 1, 3)
        counts = (self.heads, self.kv_heads, self.kv_heads)
        q, k, v = (t.unflatten(-1, (count, -1)).permute(order) for t, count in zip((q, k, v), counts, strict=True))
        return q, k, v

    def joined(self, y: Tensor) -> Tensor:
        """What heads [B, H, L, D] are cut from."""
        return y.permute((2, 0, 1, 3) if self.length_first else (0, 2, 1, 3)).flatten(2)


def stock(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None = None,
    causal: bool = False,
    scale: float | None = None,
    grouped: bool = False,
    sinks: Tensor | None = None,
    cap: float | None = None,
) -> Tensor:
    """torch's own, with the op's arguments."""
    if sinks is not None or cap is not None:
        return spec.attention(q, k, v, mask, causal, scale, sinks=sinks, cap=cap)
    return F.scaled_dot_product_attention(q, k, v, mask, is_causal=causal, scale=scale, enable_gqa=grouped)


def numbers_of(sinks: Tensor | None) -> Tensor | None:
    """Sinks, which are a parameter, as the kernels take them."""
    return None if sinks is None else sinks.detach().float()


def why_not(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> str | None:
    """Why the kernels do not compute it, of dtypes, devices and numbers of dimensions alone; None where they may."""
    for t in (q, k, v):
        if t.device.type != "cpu" or t.dtype not in _tensors.FORMATS or t.layout is not torch.strided or t.is_nested:
            return "its input is no fp32, bf16 or fp16 tensor on the CPU"
        if t.dim() != 4 or t.dtype is not q.dtype:
            return "its input is not of four dimensions and one dtype"
    if mask is not None and (mask.dim() not in (2, 3, 4) or mask.dtype not in (torch.bool, torch.float32, q.dtype)):
        return "its mask is of another dtype or number of dimensions"
    return None


def function(
    causal: bool,
    scale: float | None,
    grouped: bool,
    measure: bool,
    tell: Callable[[Answer], object] = lambda _: None,
    rows: Rows | None = None,
    rounds: bool = False,
    cap: float | None = None,
) -> Attention:
    """attention(q, k, v, mask, sinks) -> y, as the op with these arguments, on what is faster for each kind of call.

    measure: whether that may be found out in calls; else by a rule. tell: is given each new answer. rows: what q, k and
    v are where they are not cut into heads yet, and y is not to be, either. rounds: whether fp32 may be multiplied in
    bf16.
    """
    answers: dict[Any, Answer] = {}
    how = (causal, scale, grouped)
    native: Callable[..., Tensor | None] = _attention.attention
    plain: Callable[..., Tensor] = stock
    if rows is not None:
        native = functools.partial(native, rows=rows[:2], length_first=rows.length_first)
        plain = functools.partial(_stock_of_rows, rows)
    if cap is not None:
        native, plain = functools.partial(native, cap=cap), functools.partial(plain, cap=cap)

    def attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, sinks: Tensor | None = None) -> Tensor:
        if not undisturbed() or _wants_grad(q, k, v, mask, sinks):
            return plain(q, k, v, mask, *how, sinks=sinks)
        kind = (q.shape, k.shape, q.dtype, None if mask is None else mask.shape, torch.get_num_threads())
        found = answers.get(kind)
        if found is None or (found.due and plan.is_due(found)):
            found = ask(q, k, v, mask, sinks)
            if len(answers) >= _MOST:
                answers.clear()
            answers[kind] = found
            tell(found)
        numbers = numbers_of(sinks)
        y = native(q, k, v, mask, *how, products=found.products, sinks=numbers) if found.ours else None
        return plain(q, k, v, mask, *how, sinks=sinks) if y is None else y

    def ask(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, sinks: Tensor | None) -> Answer:
        numbers = numbers_of(sinks)
        parts = (q, k, v) if rows is None else rows.cut(q, k, v)
        if why_not(*parts, mask) is not None or native(q, k, v, mask, *how, sinks=numbers) is None:
            return Answer(False, "torch: the kernels do not take these tensors")
        kind = "causal" if causal else "none"
        if mask is not None:
            kind = "row" if mask.shape[-2] == 1 or mask.stride(-2) == 0 else "full"
        kind += ("" if sinks is None else ", sinks") + ("" if cap is None else ", cap")
        b, h, queries, size = parts[0].shape
        name = _tensors.FORMATS[q.dtype] + (" as bf16" if rounds and q.dtype is torch.float32 else "")
        asked = Question(b * h, queries, parts[1].shape[2], size, name, kind, torch.get_num_threads())
        return plan.answer(
            asked,
            lambda kernel: native(q, k, v, mask, *how, products=kernel, sinks=numbers),
            lambda: plain(q, k, v, mask, *how, sinks=sinks),
            measure=measure,
        )

    return attention


def _stock_of_rows(rows: Rows, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, *how: Any, **more: Any) -> Tensor:
    return rows.joined(stock(*rows.cut(q, k, v), mask, *how, **more))


def _wants_grad(*tensors: Tensor | None) -> bool:
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def _laid_out(y: Tensor) -> Tensor:
    return y.transpose(1, 2).contiguous().transpose(1, 2)


def _fake(query: Tensor, key: Tensor, value: Tensor, *_: Any) -> Tensor:
    torch._check(query.dim() == 4, lambda: f"fastlinear::attention: query is [B, H, L, D], not {list(query.shape)}")
    b, h, length, _size = query.shape
    return query.new_empty((b, length, h, value.shape[-1])).transpose(1, 2)


def _formula(*args: Any) -> Tensor:
    return _laid_out(stock(*args))


class _Rest(NamedTuple):
    """What the op is given behind the mask; the dispatcher leaves out defaults at the end."""

    causal: bool = False
    scale: float | None = None
    grouped: bool = False
    sinks: Tensor | None = None
    cap: float | None = None


def _cpu(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, *rest: Any) -> Tensor:
    given, y = _Rest(*rest), None
    if not environment.disabled():
        y = _attention.attention(q, k, v, mask, *given[:3], sinks=numbers_of(given.sinks), cap=given.cap)
    return _formula(q, k, v, mask, *rest) if y is None else y


def _autograd(keyset: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None, *rest: Any) -> Tensor:
    """Gradients are those of torch's own, which knows no other derivatives: they are the specification's."""
    given = _Rest(*rest)
    tensors = [t for t in (query, key, value, mask, given.sinks) if t is not None]
    dual = any(_torch.unpack_dual(t, level=0)[1] is not None for t in tensors)
    if dual or _torch.transform() is not None:
        more: Any = {"sinks": given.sinks, "cap": given.cap}
        return _laid_out(spec.attention(query, key, value, mask, given.causal, given.scale, **more))
    if _wants_grad(*tensors):
        return _formula(query, key, value, mask, *rest)
    y: Tensor = OP.redispatch(keyset & _torch.after_autograd, query, key, value, mask, *rest)
    return y


def _vmap(
    info: Any, in_dims: tuple[int | None, ...], query: Tensor, key: Tensor, value: Tensor, mask: Any = None, *rest: Any
) -> tuple[Tensor, int]:
    """A batch more is a larger batch; but sinks are of heads alone."""
    if len(in_dims) > 7 and in_dims[7] is not None:
        given = (query, key, value, mask, *rest)
        cut = [[t] * info.batch_size if dim is None else t.unbind(dim) for t, dim in zip(given, in_dims, strict=True)]
        return torch.stack([OP(*each) for each in zip(*cut, strict=True)]), 0

    def in_front(t: Tensor, dim: int | None) -> Tensor:
        return t.expand(info.batch_size, *t.shape) if dim is None else t.movedim(dim, 0)

    tensors = [in_front(t, dim).flatten(0, 1) for t, dim in zip((query, key, value), in_dims, strict=False)]
    if mask is not None:
        mask = in_front(mask, in_dims[3])
        mask = mask.reshape(info.batch_size, *[1] * (5 - mask.dim()), *mask.shape[1:])
        mask = mask.expand(info.batch_size, query.shape[0 if in_dims[0] is None else 1], *mask.shape[2:]).flatten(0, 1)
    y = OP(tensors[0], tensors[1], tensors[2], mask, *rest)
    return y.unflatten(0, (info.batch_size, -1)), 0


_library = torch.library.Library("fastlinear", "FRAGMENT")
_library.define(SCHEMA, tags=(torch.Tag.pt2_compliant_tag,))
OP = torch.ops.fastlinear.attention.default
_library.impl("attention", _cpu, "CPU")
_library.impl("attention", _formula, "CompositeExplicitAutograd")  # every other device
_library.impl("attention", _formula, "AutocastCPU")  # torch's own casts
_library.impl("attention", _autograd, "Autograd", with_keyset=True)
_library.impl("attention", _fake, "Meta")
torch.library.register_vmap("fastlinear::attention", _vmap, lib=_library)
