"""Rows of a parameter as a weight or bias of their own, such as the thirds of in_proj_weight in attention to another
sequence.

A model cuts them anew in each call. Here they are views that stay as long as the parameter lies where it did, the same
for all graphs, so that a layer knows its weight again. They share the parameter's memory and version.
"""

from __future__ import annotations

import operator
import weakref
from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx, nn

import fastlinear.graph.operators as operators
from fastlinear._modes import watched
from fastlinear.graph.capture import Capture, op_of
from fastlinear.graph.patterns import is_multiplied
from fastlinear.graph.story import Story
from fastlinear.graph.tidying import computed
from fastlinear.model.rows import Weight

_VIEWS = {"chunk", "detach", "getitem", "narrow", "reshape", "select", "split", "tensor_split", "unbind", "unflatten"}
_VIEWS |= {"flatten", "view"}
_OF = "_fastlinear_part_of"  # the attribute of a view that has its parameter and rows


def cut(capture: Capture, story: Story) -> None:
    """Puts views that stay in the place of the rows of parameters that products read."""
    graph, wanted = capture.graph, defaultdict[fx.Node, dict[fx.Node, Piece]](dict)
    found = _found(capture)
    for node, (parameter, rows) in found.items():
        if rows is not None and any(map(is_multiplied, node.users)):
            wanted[parameter][node] = rows
    begin = next(node for node in graph.nodes if node.op != "placeholder")
    for parameter, nodes in wanted.items():
        pieces = list(dict.fromkeys(nodes.values()))
        place = graph.inserting_before(begin) if parameter.op == "placeholder" else graph.inserting_after(parameter)
        with place:
            whole = graph.call_function(function(pieces), (parameter,))
        for node, rows in nodes.items():
            with graph.inserting_after(whole):
                part = graph.call_function(operator.getitem, (whole, pieces.index(rows)))
            part.meta, capture.values[part] = dict(node.meta), _view(capture.values[parameter], rows)
            if not rows.is_whole(capture.values[parameter]):
                capture.rows[part] = rows.rows
            node.replace_all_uses_with(part, delete_user_cb=is_multiplied)
    for node in reversed(found):
        if not node.users:
            story.tell(node, "dropped", "the rows of a parameter are cut once")
            graph.erase_node(node)


class Piece(NamedTuple):
    """Rows of a parameter. flat: whether all its dimensions but the first are one."""

    rows: range
    flat: bool = False

    def of(self, parameter: Tensor) -> Tensor:
        return (parameter.flatten(1) if self.flat else parameter)[self.rows.start : self.rows.stop]

    def is_whole(self, parameter: Tensor) -> bool:
        return self.flat and len(self.rows) == len(parameter)


def _found(capture: Capture) -> dict[fx.Node, tuple[fx.Node, Piece | None]]:
    """The nodes that are views of a parameter, in the order of the graph, with that, and with its rows if they are
    some of these and nothing else."""
    found: dict[fx.Node, tuple[fx.Node, Piece | None]] = {}
    values: dict[fx.Node, Any] = {node: t.detach() for node, t in capture.values.items() if _is_plain(t)}
    for node in capture.graph.nodes:
        if op_of(node) in _VIEWS and len(node.all_input_nodes) == 1 and node.all_input_nodes[0] in values:
            (source,) = node.all_input_nodes
            with torch.inference_mode(False), torch.no_grad():
                values[node] = computed(node, values)
            parameter = found[source][0] if source in found else source
            found[node] = parameter, _rows_of(values[node], values[parameter])
    return found


def _is_plain(tensor: Tensor) -> bool:
    return type(tensor) is nn.Parameter and tensor.layout is torch.strided


def _rows_of(view: Any, whole: Tensor) -> Piece | None:
    flat = isinstance(view, Tensor) and view.dim() == 2 < whole.dim() and whole.is_contiguous()
    whole = whole.flatten(1) if flat else whole
    if not isinstance(view, Tensor) or view.dim() != whole.dim() or view.dim() == 0 or view.numel() == 0:
        return None
    if view.stride() != whole.stride() or view.shape[1:] != whole.shape[1:] or whole.stride(0) == 0:
        return None
    if view.untyped_storage()._cdata != whole.untyped_storage()._cdata:  # a copy
        return None
    first = (view.storage_offset() - whole.storage_offset()) // whole.stride(0)
    rows = range(first, first + len(view))
    return Piece(rows, flat) if view.is_set_to(whole[first : rows.stop]) else None


class _Cut(NamedTuple):
    """seen: the parameter, as it lay in memory when it was cut."""

    seen: Tensor
    views: tuple[Tensor, ...]


def function(pieces: Sequence[Piece]) -> Callable[[Tensor], tuple[Tensor, ...]]:
    """cut(parameter): these rows of it, the same views in each call."""
    known: dict[int, _Cut] = {}

    def cut(parameter: Tensor) -> tuple[Tensor, ...]:
        graded = torch.is_grad_enabled() and parameter.requires_grad
        found = None if graded else known.get(id(parameter))  # which holds the parameter: nothing else has its id
        if found is not None and parameter.is_set_to(found.seen) and parameter.dtype is found.seen.dtype:
            return found.views
        if graded or watched() or not _is_plain(parameter):
            return tuple(piece.of(parameter) for piece in pieces)
        with torch.inference_mode(False), torch.no_grad():
            seen = parameter.detach()
        made: _Cut = operators.remember(known, parameter, _Cut(seen, tuple(_view(parameter, rows) for rows in pieces)))
        return made.views

    return cut


_views: weakref.WeakValueDictionary[Any, Tensor] = weakref.WeakValueDictionary()


def _view(parameter: Tensor, rows: Piece) -> Tensor:
    """Rows of a parameter, the same tensor as long as they lie where they did."""
    key = id(parameter), rows
    with torch.inference_mode(False), torch.no_grad():
        view, known = rows.of(parameter.detach()), _views.get(key)
    lies = known is not None and known.is_set_to(view) and known.dtype is view.dtype
    if known is not None and lies and weight_of(known).tensor is parameter:
        return known
    vars(view)[_OF], _views[key] = Weight(parameter, None if rows.is_whole(parameter) else rows.rows), view
    return view


def weight_of(tensor: Tensor) -> Weight:
    """What a weight is to the report: a parameter, or rows of one."""
    found: Weight | None = vars(tensor).get(_OF)
    return Weight(tensor, None) if found is None else found
