"""Masks as transformers make them, by indices that take all there is and by an `and` with what is true everywhere, as
views of the mask that was given."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import Tensor, fx

from fastlinear.graph.capture import example, op_of, same_size
from fastlinear.graph.story import Story
from fastlinear.graph.tidying import only_reads


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
