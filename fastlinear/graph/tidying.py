"""What of a graph needs no call: values that nobody reads, those that are the same in each call, and indices and masks
that take all there is."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import Tensor, fx

from fastlinear.graph.capture import activation_of, changes, example, op_of, same_size
from fastlinear.graph.story import Story

_PRODUCTS = {"linear", "addmm", "fastlinear", "matmul", "bmm"}
VIEWS = {"getitem", "view", "reshape", "transpose", "permute", "expand", "unsqueeze", "squeeze", "flatten"}
MADE = {"arange", "ones", "zeros", "full", "new_ones", "new_zeros", "new_full", "ones_like", "zeros_like"}
COMPUTED = {"add", "sub", "mul", "ge", "gt", "le", "lt", "eq", "ne", "and_", "or_", "logical_not", "to"}
# What does nothing but make its value. Others may raise an error for what they are called with, or draw numbers.
_PURE = _PRODUCTS | VIEWS | MADE | COMPUTED | {"contiguous", "chunk", "getattr"}
_CONSTANT = MADE | COMPUTED | VIEWS | {"floordiv"}  # which may raise, but then does so in each call
# Whose functions make tensors of their own, too.
_OURS = {"fastlinear.graph.norms", "fastlinear.graph.operators", "fastlinear.layer.sdpa"}
# What makes a tensor that shares no memory with what it reads, and writes to nothing.
_READS = COMPUTED - {"to"} | {"linear", "where", "masked_fill", "gather", "embedding", "scaled_dot_product_attention"}
_READS |= {"floordiv"}
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
                value = _computed(node, values)
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


def _computed(node: fx.Node, values: dict[fx.Node, Any]) -> Any:
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


def take_whole(graph: fx.Graph, story: Story) -> None:
    """Puts views in the place of indices that take all of a tensor in its order, as masks of transformers are made."""
    for node in list(graph.nodes):
        places = _whole_places(node) if op_of(node) == "getitem" else None
        if places is None or not all(only_reads(user, node) for user in node.users):
            continue
        at = tuple(slice(None) if i in places else None for i in range(places[-1] + 1))
        with graph.inserting_before(node):
            view = graph.call_function(operator.getitem, (node.args[0], at))
        _replace(node, view, story, "a view: its indices take all there is")


def _whole_places(node: fx.Node) -> list[int] | None:
    """At which dimensions of the result those of the indexed tensor are, if it is indexed by its whole range in each,
    one behind the other, and its last is the result's."""
    of, index = node.args
    x, made = example(of), example(node)
    if x is None or made is None or not isinstance(index, tuple) or len(index) != x.dim():
        return None
    places = [_place_of_range(each, size) for each, size in zip(index, x.shape, strict=True)]
    found = [place for place in places if place is not None]
    in_order = found == sorted(set(found)) and len(found) == len(places)
    return found if in_order and found[-1] == made.dim() - 1 else None


def _place_of_range(node: Any, size: Any) -> int | None:
    """Of arange(size)[None, :, None]: 1, where the range is."""
    if not isinstance(node, fx.Node) or op_of(node) != "getitem" or not isinstance(node.args[1], tuple):
        return None
    of: Any = node.args[0]
    at = node.args[1]
    if op_of(of) == "add" and of.args[1] == 0:
        of = of.args[0]
    length = example(of)
    plain = op_of(of) == "arange" and len(of.args) == 1 and set(of.kwargs) <= {"device", "dtype"}
    if not plain or length is None or not same_size(length.shape[0], size):
        return None
    ranges = [i for i, each in enumerate(at) if each is not None]
    return ranges[0] if len(ranges) == 1 and at[ranges[0]] == slice(None) else None


def drop_true(module: fx.GraphModule, story: Story) -> None:
    """Takes a mask that is true everywhere out of an `and`."""
    for node in list(module.graph.nodes):
        if op_of(node) != "and_" or not all(only_reads(user, node) for user in node.users):
            continue
        for true, other in (node.args, node.args[::-1]):
            sizes = _sizes_to(other, node) if _is_true(module, true) else None
            if sizes is not None:
                with module.graph.inserting_before(node):
                    view = module.graph.call_method("expand", (other, *sizes))
                _replace(node, view, story, "a view: the other mask is true everywhere")
                break


def _replace(node: fx.Node, view: fx.Node, story: Story, why: str) -> None:
    view.meta = dict(node.meta)
    node.replace_all_uses_with(view)
    story.rename(node, view, why)
    constants = [each for each in node.all_input_nodes if each.op == "get_attr"]
    node.graph.erase_node(node)
    for each in constants:
        if not each.users:
            node.graph.erase_node(each)


def _is_true(module: fx.GraphModule, node: Any) -> bool:
    constant = isinstance(node, fx.Node) and node.op == "get_attr"
    value = getattr(module, str(node.target), None) if constant else None
    return isinstance(value, Tensor) and value.dtype is torch.bool and bool(value.all())


def _sizes_to(node: Any, wanted: fx.Node) -> list[int] | None:
    """What expand takes to make a mask as large as another: -1 where it is already."""
    x, y = example(node), example(wanted)
    if x is None or y is None or x.dtype is not torch.bool or x.dim() > y.dim():
        return None
    sizes = [None] * (y.dim() - x.dim()) + list(x.shape)
    found: list[Any] = [-1 if a is not None and same_size(a, b) else b for a, b in zip(sizes, y.shape, strict=True)]
    return found if all(isinstance(size, int) for size in found) else None
