"""The table of composites: several nodes of a graph that are one function.

A composite is written as the torch code that models spell it in, and found by tracing that: its first parameter is x,
further ones stand for whatever stands there.
"""

from __future__ import annotations

import functools
import inspect
import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import fx

from fastlinear.graph.capture import example, op_of, same_size
from fastlinear.graph.norms import offset_rms_norm
from fastlinear.spec.activations import quick_gelu, relu2

_COMMUTATIVE = {"add", "mul"}

Call = tuple[Any, tuple[Any, ...], dict[str, Any]]  # function, arguments, keywords


class Composite(NamedTuple):
    """Several nodes that are one function. form: as models spell it; call: what it is, from what its parameters stand
    for."""

    name: str
    form: Callable[..., Any]
    call: Callable[..., Call]


def _one(function: Any, **keywords: Any) -> Callable[..., Call]:
    return lambda x: (function, (x,), keywords)


def _rms_norm(x: fx.Node, weight: fx.Node, eps: float, dtype: Any = None) -> Call:
    shape = tuple(weight.meta["example_value"].shape)
    return torch.rms_norm, (x, shape, weight, eps), {}


def _offset_rms_norm(x: fx.Node, weight: fx.Node, eps: float, dtype: Any = None) -> Call:
    return offset_rms_norm, _rms_norm(x, weight, eps)[1], {}


def _rms(x: Any, weight: Any, eps: Any) -> Any:
    return weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps))


def _rms_of_16_bits(x: Any, weight: Any, eps: Any, dtype: Any) -> Any:
    wide = x.to(torch.float32)
    return weight * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)).to(dtype)


def _rms_of_16_bits_late(x: Any, weight: Any, eps: Any, dtype: Any) -> Any:
    return weight * (x * torch.rsqrt(x.to(torch.float32).pow(2).mean(-1, keepdim=True) + eps)).to(dtype)


def _rms_of_16_bits_last(x: Any, weight: Any, eps: Any, dtype: Any) -> Any:
    wide = x.to(torch.float32)
    return (weight * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps))).to(dtype)


def _offset_rms(x: Any, weight: Any, eps: Any) -> Any:
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps) * (1.0 + weight)


def _offset_rms_of_16_bits(x: Any, weight: Any, eps: Any, dtype: Any) -> Any:
    wide = x.float()
    return (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps) * (1.0 + weight.float())).type_as(x)


_TANH, _ROOT = math.sqrt(2 / math.pi), math.sqrt(2)

COMPOSITES = (
    Composite("gelu", lambda x: x * 0.5 * (1.0 + torch.erf(x / _ROOT)), _one(F.gelu)),
    Composite(
        "gelu_tanh",
        lambda x: 0.5 * x * (1.0 + torch.tanh(_TANH * (x + 0.044715 * torch.pow(x, 3.0)))),
        _one(F.gelu, approximate="tanh"),
    ),
    Composite(
        "gelu_tanh",
        lambda x: 0.5 * x * (1.0 + torch.tanh(x * _TANH * (1.0 + 0.044715 * x * x))),
        _one(F.gelu, approximate="tanh"),
    ),
    Composite("quick_gelu", lambda x: x * torch.sigmoid(1.702 * x), _one(quick_gelu)),
    Composite("silu", lambda x: x * torch.sigmoid(x), _one(F.silu)),
    Composite("relu2", lambda x: torch.square(F.relu(x)), _one(relu2)),
    Composite("relu2", lambda x: torch.pow(F.relu(x), 2), _one(relu2)),
    Composite("mish", lambda x: x * torch.tanh(F.softplus(x)), _one(F.mish)),
    Composite("rms_norm", _offset_rms, _offset_rms_norm),
    Composite("rms_norm", _offset_rms_of_16_bits, _offset_rms_norm),
    Composite("rms_norm", _rms, _rms_norm),  # after those whose weight is a sum
    Composite("rms_norm", _rms_of_16_bits, _rms_norm),
    Composite("rms_norm", _rms_of_16_bits_late, _rms_norm),
    Composite("rms_norm", _rms_of_16_bits_last, _rms_norm),
)


class Match(NamedTuple):
    """bound: what the parameters of a form stand for; inner: the nodes that are matched, but for the root."""

    bound: dict[str, Any]
    inner: set[fx.Node]


def composites(root: fx.Node) -> Iterator[tuple[Composite, Match]]:
    """The rows whose last node `root` may be, with what their parameters stand for."""
    for row in COMPOSITES:
        pattern, names = _traced(row.form)
        if op_of(pattern) == op_of(root):
            bindings: dict[fx.Node, Any] | None = _match(pattern, root, {})
            if bindings is not None:
                bound = {names[p]: value for p, value in bindings.items() if p in names}
                inner = {v for p, v in bindings.items() if p not in names and v is not root}
                if _is_sound(row, bound):
                    yield row, Match(bound, inner)


def _is_sound(row: Composite, bound: dict[str, Any]) -> bool:
    x = example(bound["x"])
    if x is None or not x.is_floating_point():
        return False
    if row.name != "rms_norm":
        return True
    weight = example(bound["weight"])
    if weight is None or not weight.dtype is x.dtype is bound.get("dtype", x.dtype):
        return False
    return weight.dim() == 1 and same_size(x.shape[-1], weight.shape[0]) and isinstance(bound["eps"], float)


@functools.cache
def _traced(form: Callable[..., Any]) -> tuple[fx.Node, dict[fx.Node, str]]:
    # Not by fx.symbolic_trace, which patches nn.Module.__call__ for a while: the next call of a fast layer would go
    # round what stands in its class's slot, and so without its activation.
    graph = fx.Graph()
    tracer = fx.proxy.GraphAppendingTracer(graph)
    names = {graph.placeholder(name): name for name in inspect.signature(form).parameters}
    return form(*(fx.Proxy(node, tracer) for node in names)).node, names


def _match(p: Any, v: Any, bindings: dict[fx.Node, Any]) -> dict[fx.Node, Any] | None:
    """`bindings` with those that make the pattern p the value v; None where nothing does."""
    if not isinstance(p, fx.Node):
        return bindings if _is_same(p, v) else None
    if p in bindings:
        return bindings if bindings[p] is v else None
    if p.op == "placeholder":
        return {**bindings, p: v}
    if not isinstance(v, fx.Node) or op_of(p) != op_of(v) or len(p.args) != len(v.args):
        return None
    named, given = _keywords(p), _keywords(v)
    if {*named} != {*given}:
        return None
    orders = [v.args, v.args[::-1]] if op_of(p) in _COMMUTATIVE else [v.args]
    for args in orders:
        found: dict[fx.Node, Any] | None = {**bindings, p: v}
        for mine, theirs in zip((*p.args, *named.values()), (*args, *(given[k] for k in named)), strict=True):
            found = None if found is None else _match(mine, theirs, found)
        if found is not None:
            return found
    return None


def _keywords(node: fx.Node) -> dict[str, Any]:
    """But for what some spellings of an activation say and others leave out."""
    return {name: value for name, value in node.kwargs.items() if not (name == "inplace" and value is False)}


def _is_same(a: Any, b: Any) -> bool:
    if isinstance(a, float) or isinstance(b, float):
        numbers = all(isinstance(each, (int, float)) for each in (a, b))
        return numbers and math.isclose(a, b, rel_tol=1e-6)
    return type(a) is type(b) and bool(a == b)
