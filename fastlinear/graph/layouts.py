"""How tensors lie in memory where that can be seen: at the ends of a graph, and where one is viewed in another shape.

Products and norms make tensors that are contiguous. torch's sum of a transposed tensor and another one lies as the
transposed one, and so what has absorbed it lies otherwise than in the model: the numbers are the same, and a `view` of
them may not be. Within a graph that is no matter, and a residual stream that is contiguous is read faster.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx

from fastlinear.graph.capture import example, is_contiguous, op_of, same_size

_OURS = {"fastlinear.graph.norms", "fastlinear.graph.operators"}  # whose functions make what is contiguous
_VIEWS: dict[Any, Any] = {  # what makes no copy, or raises -> what makes one where it has to
    "view": "reshape",
    torch.Tensor.view: torch.Tensor.reshape,
    torch.ops.aten.view.default: torch.ops.aten.reshape.default,
}
_ASKING = {"as_strided", "view", "view_as", "view_as_complex"}  # what else raises, or reads other numbers


def settle(graph: fx.Graph, writes: bool) -> None:
    """Lets what the graph returns lie as in the model. writes: whether a node of it writes to a tensor, so that a copy
    instead of a view could be seen."""
    moved: dict[fx.Node, set[fx.Node]] = {}  # what lies otherwise -> the products and norms that it comes from
    at_once = set[fx.Node]()
    for node in list(graph.nodes):
        if _is_ours(node):
            y = example(node)
            if y is not None and not is_contiguous(y) and writes:
                at_once.add(node)
            elif y is not None and not is_contiguous(y):
                moved[node] = {node}
            continue
        found = [each for each in node.all_input_nodes if each in moved]
        if not found:
            continue
        if _copies_if_need_be(node) or not (node.op == "output" or op_of(node) in _ASKING):
            moved[node] = set().union(*(moved[each] for each in found))
            continue
        for each in found:
            if _order_of(each) is None:  # a piece of something else
                at_once |= moved[each]
            else:
                node.replace_input_with(each, _lay(graph, each, node))
    for node in at_once:
        if _order_of(node) is not None:
            readers = list(node.users)
            instead = _lay(graph, node, node.next)
            for reader in readers:
                reader.replace_input_with(node, instead)


def _copies_if_need_be(node: fx.Node) -> bool:
    """Whether a node is a view of other sizes, which from now on makes a copy where it would have raised."""
    if node.target not in _VIEWS or node.kwargs or isinstance(node.args[1], torch.dtype):
        return False
    node.target = _VIEWS[node.target]
    return True


def _order_of(node: fx.Node) -> tuple[int, ...] | None:
    y = example(node)
    return None if y is None else order_of(y)


def _lay(graph: fx.Graph, node: fx.Node, before: fx.Node) -> fx.Node:
    """A node that has the value of one, and lies as in the model."""
    with graph.inserting_before(before):
        made = graph.call_function(laid, (node, _order_of(node)))
    made.meta = dict(node.meta)
    return made


def laid(x: Tensor, order: tuple[int, ...]) -> Tensor:
    """x with its dimensions in memory in this order, the outermost first: itself, or a copy."""
    back = sorted(range(len(order)), key=order.__getitem__)
    return x.permute(order).contiguous().permute(back)


def order_of(x: Tensor) -> tuple[int, ...] | None:
    """The dimensions of a fake tensor, the outermost in memory first, for every input that the graph is run on; None
    where there are gaps between its numbers, or nobody knows."""
    left, found, expected = [*range(x.dim())], list[int](), 1
    while left:
        single = [d for d in left if same_size(x.shape[d], 1)]
        fit = single or [d for d in left if same_size(x.stride(d), expected)]
        if not fit:
            return None
        found.append(fit[-1])
        left.remove(fit[-1])
        expected = expected if single else expected * x.shape[fit[-1]]
    return tuple(reversed(found))


def _is_ours(node: fx.Node) -> bool:
    """Whether a node is a tensor that a product or a norm of ours makes, alone or beside others."""
    whole: Any = node.args[0] if op_of(node) == "getitem" else node
    apart = whole is node or (isinstance(whole, fx.Node) and example(whole) is None)
    return apart and getattr(whole.target, "__module__", "") in _OURS
