"""What of a graph needs no call: values that nobody reads, and those that are the same in each call."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx

from fastlinear.graph.capture import activation_of, changes, example, op_of
from fastlinear.graph.story import Story

_PRODUCTS = {"linear", "addmm", "fastlinear", "matmul", "bmm"}
VIEWS = {"getitem", "view", "reshape", "transpose", "permute", "expand", "unsqueeze", "squeeze", "flatten"}
MADE = {"arange", "ones", "zeros", "full", "new_ones", "new_zeros", "new_full", "ones_like", "zeros_like"}
COMPUTED = {"add", "sub", "mul", "ge", "gt", "le", "lt", "eq", "ne", "and_", "or_", "logical_not", "to"}
# What does nothing but make its value. Others may raise an error for what they are called with, or draw numbers.
_PURE = _PRODUCTS | VIEWS | MADE | COMPUTED | {"contiguous", "chunk", "getattr", "mean"}
_CONSTANT = MADE | COMPUTED | VIEWS | {"floordiv"}  # which may raise, but then does so in each call
# Whose functions make tensors of their own, too.
_OURS = {f"fastlinear.{name}" for name in ("graph.mixtures", "graph.norms", "graph.operators", "layer.sdpa")}
# What makes a tensor that shares no memory with what it reads, and writes to nothing.
_READS = COMPUTED - {"to"} | {"linear", "where", "masked_fill", "gather", "embedding", "floordiv"}
_READS |= {"scaled_dot_product_attention"}
MOST = 1 << 20  # numbers of a value that is kept


def drop_unread(graph: fx.Graph, story: Story) -> None:
    """Takes out what makes a value for nobody, such as the pooler of a model whose last hidden states are wanted."""
    for node in reversed(list(graph.nodes)):
        pure = op_of(node) in _PURE or activation_of(node) is not None
        if not node.users and pure and not changes(node):
            story.tell(node, "dropped", "nobody reads it")
            graph.erase_node(node)


def keep_constants(module: fx.GraphModule, story: Story) -> None:
    """Puts values that depend on no input, and that nobody writes to or returns, in the place of what computes them:
    positions, and the masks that are made of these. They are attributes of the module."""
    graph, values = module.graph, dict[fx.Node, Any]()
    for node in graph.nodes:
        if _is_constant(node, values):
            with torch.inference_mode(False), torch.no_grad():
                value = computed(node, values)
            if isinstance(value, Tensor) and value.numel() <= MOST:
                values[node] = value
    leave_what_is_shared(values)
    for node in reversed(values):  # what no other constant needs, first
        if node.users:
            name = f"_constant_{node.name}"
            module.register_buffer(name, values[node], persistent=False)
            with graph.inserting_before(node):
                kept = graph.get_attr(name)
            kept.meta = dict(node.meta)
            node.replace_all_uses_with(kept)
        story.tell(node, "dropped", "it is the same in each call")
        graph.erase_node(node)


def leave_what_is_shared(values: dict[fx.Node, Any]) -> None:
    """Takes out of the constants those that others may write to or hand on, and whatever is computed with them: they
    may share their memory."""
    shared = [node for node in values for user in node.users if user not in values and not only_reads(user, node)]
    while shared:
        node = shared.pop()
        if values.pop(node, None) is not None:
            shared += [*node.all_input_nodes, *node.users]


def _is_constant(node: fx.Node, known: dict[fx.Node, Any]) -> bool:
    name, wanted = op_of(node), example(node)
    if name not in _CONSTANT or changes(node) or wanted is None or wanted.device.type != "cpu":
        return False
    if not all(isinstance(size, int) for size in wanted.shape) or not all(
        each in known for each in node.all_input_nodes
    ):
        return False
    return bool(node.all_input_nodes) or name in MADE


def computed(node: fx.Node, values: dict[fx.Node, Any]) -> Any:
    """What a node makes of these values of others."""
    args: Any = fx.node.map_arg(node.args, values.__getitem__)
    kwargs: Any = fx.node.map_arg(node.kwargs, values.__getitem__)
    function: Any = getattr(type(args[0]), node.target) if isinstance(node.target, str) else node.target
    return function(*args, **kwargs)


def only_reads(reader: fx.Node, node: fx.Node) -> bool:
    """Whether the value of a reader shares no memory with that of a node: an index may, but not what it is made by."""
    name = op_of(reader)
    if getattr(reader.target, "__module__", "") in _OURS:
        return True
    return not changes(reader) and (name in _READS or (name == "getitem" and reader.args[0] is not node))
