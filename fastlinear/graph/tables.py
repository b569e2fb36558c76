"""Which parameters a graph reads and never multiplies by, before it is rewritten."""

from __future__ import annotations

from torch import fx

from fastlinear.graph.capture import Capture, op_of
from fastlinear.model import tables


def tables_of(capture: Capture) -> dict[int, bool]:
    """Of the id of each parameter, whether it is one of them."""
    return {id(tensor): tables.is_table(_readers(node)) for node, tensor in capture.values.items() if node.users}


def _readers(node: fx.Node) -> set[str]:
    """The names of what reads a node's value, or a view of it."""
    names, left = set[str](), [node]
    for each in left:
        for user in each.users:
            names.add(op_of(user) or user.op)
            if tables.is_view(op_of(user)) and user.args[0] is each:
                left.append(user)
    return names
