"""Sinks of attention that a model spells out: a learned number for each head, which stands beside the scores while the
softmax is made of them, and whose weight is dropped.

    softmax(cat((scores, sinks), -1), -1)[..., :-1]     or of that less its own maximum
"""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import fx

from fastlinear.graph.capture import example, op_of, same_shape


class Sinks(NamedTuple):
    """numbers: [H]; nodes: all between scores and softmax, the last one first."""

    scores: Any
    numbers: fx.Node
    nodes: tuple[fx.Node, ...]


def drops_last(node: fx.Node) -> bool:
    """Whether a node is [..., :-1] of another."""
    return op_of(node) == "getitem" and node.args[1] == (Ellipsis, slice(None, -1, None))


def sinks_beside(node: Any) -> Sinks | None:
    """What a softmax of scores and sinks is made of."""
    lowered, both = _raised(node)
    (scores, spread), dim = _joined(both)
    y, column = example(both), example(spread)
    if y is None or column is None or dim not in (-1, y.dim() - 1):
        return None
    narrow: Any = spread.args[0] if op_of(spread) == "expand" else None
    numbers: Any = narrow.args[0] if narrow is not None and op_of(narrow) in ("reshape", "view") else None
    one, given = example(narrow), example(numbers)
    if y.dim() != 4 or one is None or given is None or given.dim() != 1:
        return None
    fits = same_shape(column.shape, (*y.shape[:3], 1)) and same_shape(one.shape, (1, y.shape[1], 1, 1))
    return Sinks(scores, numbers, (*lowered, both, spread, narrow)) if fits else None


def _raised(node: Any) -> tuple[tuple[fx.Node, ...], Any]:
    """What a node is without the maximum of its last dimension, which a softmax is the same for; and the nodes that
    take that away."""
    if not isinstance(node, fx.Node) or op_of(node) != "sub" or node.kwargs or len(node.args) != 2:
        return (), node
    x, most = node.args
    found: Any = most.args[0] if isinstance(most, fx.Node) and op_of(most) == "getitem" and most.args[1] == 0 else None
    if not isinstance(most, fx.Node) or found is None or op_of(found) != "max":
        return (), node
    if found.args != (x,) or found.kwargs != {"dim": -1, "keepdim": True}:
        return (), node
    return (node, most, found), x


def _joined(node: Any) -> tuple[Any, Any]:
    """The two tensors that are joined, and in which dimension."""
    if not isinstance(node, fx.Node) or op_of(node) != "cat" or not node.args:
        return (None, None), None
    parts: Any = node.args[0]
    return parts if len(parts) == 2 else (None, None), node.args[1] if len(node.args) > 1 else node.kwargs.get("dim")
