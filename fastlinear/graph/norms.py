"""Norms of a graph by kernels of our own: with the sum before them, where that is of two tensors of one shape, and in
the memory of what they read, where nobody else does.

It runs on what the products have left: a residual that one of them adds itself is no sum any more.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx

import fastlinear._rows as _rows
import fastlinear._tensors as _tensors
import fastlinear.spec.norms as spec
from fastlinear._modes import watched
from fastlinear.graph.capture import example, op_of, same_shape
from fastlinear.graph.story import Story
from fastlinear.spec.norms import Norm


class Found(NamedTuple):
    """A node that is a norm over the last axis. x: a node, too."""

    node: fx.Node
    x: Any
    weight: fx.Node | None
    bias: fx.Node | None
    how: Norm


def offset_rms_norm(x: Tensor, size: Sequence[int], weight: Tensor, eps: float) -> Tensor:
    """Gemma's: torch.rms_norm with 1 added to its weight in fp32."""
    return spec.norm(x, weight, None, Norm(False, eps, 1.0))[0]


_ARGUMENTS: dict[str, tuple[str, ...]] = {
    "layer_norm": ("input", "normalized_shape", "weight", "bias", "eps"),
    "rms_norm": ("input", "normalized_shape", "weight", "eps"),
    "offset_rms_norm": ("x", "size", "weight", "eps"),
}


def norm_at(node: fx.Node) -> Found | str | None:
    """The norm that a node is, why it is none that the kernels compute, or None for any other node."""
    name = op_of(node)
    if node.op != "call_function" or name not in _ARGUMENTS:
        return None
    given: dict[str, Any] = {**dict(zip(_ARGUMENTS[name], node.args, strict=False)), **node.kwargs}
    x, size = (given.get(argument) for argument in _ARGUMENTS[name][:2])
    weight, bias = given.get("weight"), given.get("bias")
    tensor = example(x)
    if tensor is None or tensor.dtype not in _tensors.FORMATS or tensor.device.type != "cpu":
        return "its input is no fp32, bf16 or fp16 tensor on the CPU"
    if not isinstance(size, (tuple, list, torch.Size)) or len(size) != 1:
        return "it is over more than the last axis"
    eps = given.get("eps", 1e-5 if name == "layer_norm" else None)
    eps = torch.finfo(tensor.dtype).eps if eps is None else eps
    if not isinstance(eps, float):
        return "its eps is no number"
    for each in (weight, bias):
        channels = example(each)
        if each is not None and (channels is None or channels.dim() != 1 or channels.dtype not in _tensors.FORMATS):
            return "its weight or bias is no fp32, bf16 or fp16 vector"
    return Found(node, x, weight, bias, Norm(name == "layer_norm", eps, float(name == "offset_rms_norm")))


def function(how: Norm, keep: bool, over: bool) -> Callable[..., Any]:
    """norm(x, weight, bias, residual) -> y, or (y, sum) with `keep`; `over`: x is nobody's afterwards, and its memory
    becomes that of the sum, if it is kept, or of y."""
    centered, eps, offset = how
    native = _rows.norm

    def norm(x: Tensor, weight: Tensor | None, bias: Tensor | None, residual: Tensor | None = None) -> Any:
        y = None if watched() else native(x, weight, bias, eps, offset, centered, residual, keep, over)
        if y is not None:
            return y
        result = spec.norm(x, weight, bias, how, residual)
        return result if keep else result[0]

    return norm


def absorb(
    graph: fx.Graph, story: Story, is_calm: Callable[[fx.Node, fx.Node], bool], is_fresh: Callable[[fx.Node], bool]
) -> None:
    """Puts our norms in the place of a graph's. is_calm: whether nothing between two nodes writes to a tensor;
    is_fresh: whether a node makes a tensor that shares its memory with no other."""
    order = {node: i for i, node in enumerate(graph.nodes)}
    for node in list(graph.nodes):
        found = norm_at(node)
        if isinstance(found, str):
            story.tell(node, "torch", found)
        elif found is not None:
            _place(graph, story, found, order, is_calm, is_fresh)


def _place(
    graph: fx.Graph,
    story: Story,
    found: Found,
    order: dict[fx.Node, int],
    is_calm: Callable[[fx.Node, fx.Node], bool],
    is_fresh: Callable[[fx.Node], bool],
) -> None:
    node, x, weight, bias, how = found
    total = _sum_before(found, order, is_calm)
    terms: list[Any] = [x] if total is None else [*total.args]
    kept = total is not None and len(total.users) > 1
    own = [each for each in terms if _is_last(each, node if total is None else total, node) and is_fresh(each)]
    terms.sort(key=lambda each: each not in own)
    (first, *rest), what = terms, "LayerNorm" if how.centered else "RMSNorm"
    with graph.inserting_before(node if total is None else total):
        made = graph.call_function(function(how, kept, bool(own)), (first, weight, bias, *rest))
        parts = [graph.call_function(operator.getitem, (made, i)) for i in range(2)] if kept else [made]
    for part, old in zip(parts, (node, total), strict=False):
        part.meta = dict(old.meta) if old is not None else {}
    place = f", in the memory of {first.name}" if own else ""
    story.tell(node, "fast", f"{what} of our own{place}")
    node.replace_all_uses_with(parts[0])
    graph.erase_node(node)
    if total is not None:
        story.tell(total, "fused", f"into {node.name}" + (", which hands the sum on" if kept else ""))
        if kept:
            total.replace_all_uses_with(parts[1])
        graph.erase_node(total)


def _is_last(each: Any, reader: fx.Node, norm: fx.Node) -> bool:
    """Whether `reader` is the only one, and reads it once, in the shape and dtype of the norm."""
    a, b = example(each), example(norm)
    alone = list(each.users) == [reader] and [*reader.args].count(each) == 1
    return alone and a is not None and b is not None and a.dtype is b.dtype and same_shape(a.shape, b.shape)


def _sum_before(found: Found, order: dict[fx.Node, int], is_calm: Callable[[fx.Node, fx.Node], bool]) -> fx.Node | None:
    """The sum that is normalized, if the norm may add it up itself."""
    x = found.x
    if op_of(x) != "add" or x.kwargs or len(x.args) != 2 or not is_calm(x, found.node):
        return None
    total, (a, b) = example(x), (example(each) for each in x.args)
    if total is None or a is None or b is None or not total.dtype is a.dtype is b.dtype:
        return None
    channels = [each for each in (found.weight, found.bias) if each is not None]
    if any(order.get(each, len(order)) > order[x] for each in channels):
        return None
    return x if same_shape(a.shape, total.shape) and same_shape(b.shape, total.shape) else None
