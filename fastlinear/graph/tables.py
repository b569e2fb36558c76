"""Which parameters a graph reads and never multiplies by, before it is rewritten."""

from __future__ import annotations

from torch import fx

from fastlinear.graph.capture import Capture, example, op_of
from fastlinear.model import tables


def tables_of(capture: Capture) -> dict[int, bool]:
    """Of the id of each parameter, whether it is one of them."""
    return {id(tensor): tables.is_table(_readers(node)) for node, tensor in capture.values.items() if node.users}


def _readers(node: fx.Node) -> set[str]:
    """The names of what reads a node's value, or a view of it."""
    names, left = set[str](), [node]
    for each in left:
        for user in each.users:
            name = "index" if _is_index(user) else op_of(user) or user.op
            names.add(name)
            if tables.is_view(name) and user.args[0] is each:
                left.append(user)
    return names


def _is_index(node: fx.Node) -> bool:
    """Whether a node takes rows by the numbers in a tensor."""
    return op_of(node) == "getitem" and any(example(each) is not None for each in node.all_input_nodes[1:])
