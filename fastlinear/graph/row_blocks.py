"""Two products of which one reads the other, such as those of a feed-forward network: where what lies between them is
more than the caches hold, both run for a block of rows, and then for the next.

It runs on what the rest of the rewriting has left.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx

from fastlinear._modes import watched
from fastlinear.graph.capture import example, same_shape, same_size
from fastlinear.model.rows import NodeReport
from fastlinear.plan import caches, row_blocks


class Run(NamedTuple):
    """A node that is one product, or a gate: of its arguments, x and then `parameters` stand for all rows.

    inputs, outputs: columns of x and of what it makes; nbytes: of its packed weights; ends: whether it writes where it
    is told (`into`); told: its row in the report.
    """

    inputs: int
    outputs: int
    nbytes: int
    parameters: int
    ends: bool
    told: NodeReport


def join(graph: fx.Graph, runs: dict[fx.Node, Run], is_calm: Callable[[fx.Node, fx.Node], bool]) -> None:
    """Makes one node of each product and the one that alone reads it. is_calm: whether nothing between two nodes writes
    to a tensor."""
    for last in list(graph.nodes):
        first = last.args[0] if last in runs and runs[last].ends else None
        if not isinstance(first, fx.Node) or first not in runs or list(first.users) != [last] or first in last.args[1:]:
            continue
        head, tail = _cut(first, runs[first]), _cut(last, runs[last])
        between, y = example(first), example(last)
        if head is None or tail is None or between is None or y is None or not is_calm(first, last):
            continue
        if not row_blocks.fit(runs[first].nbytes + runs[last].nbytes, torch.get_num_threads()):
            continue
        calls: Any = (first.target, last.target)
        made = function(calls, (runs[first], runs[last]), (head, tail), between.element_size(), y.dtype)
        with graph.inserting_before(last):
            node = graph.call_function(made, (*first.args, *last.args[1:]))
        node.meta = dict(last.meta)
        last.replace_all_uses_with(node)
        graph.erase_node(last)
        graph.erase_node(first)
        runs[last].told.why += f", of many rows block by block with {runs[first].told.name}"


def _cut(node: fx.Node, run: Run) -> list[bool] | None:
    """Which of the tensors after x have a row for each of its rows; None where one of them has neither such nor one for
    all."""
    x, cut = example(node.args[0]), [False] * run.parameters
    for operand in node.args[1 + run.parameters :]:
        tensor = example(operand)
        if x is None or tensor is None:
            return None
        same = tensor.dim() == x.dim() and same_shape(tensor.shape[:-1], x.shape[:-1])
        if not same and not all(same_size(size, 1) for size in tensor.shape[:-1]):
            return None
        cut.append(same)
    return cut


def function(
    calls: tuple[Callable[..., Tensor], Callable[..., Tensor]],
    runs: tuple[Run, Run],
    cut: tuple[list[bool], list[bool]],
    itemsize: int,
    dtype: torch.dtype,
) -> Callable[..., Tensor]:
    """in_blocks(x, *tensors): the answer of the second call, whose x is that of the first; tensors: those of both, of
    which those that are cut have a row for each of x. itemsize: of what lies between; dtype: of the answer."""
    (first, last), at, cuts = calls, len(cut[0]), (True, *cut[0], *cut[1])
    inputs, outputs, nbytes = runs[0].inputs, runs[1].outputs, runs[0].nbytes + runs[1].nbytes
    row_bytes = max(1, runs[0].outputs * itemsize)
    few = caches.l2() // row_bytes * inputs  # numbers of x that are never cut, on whatever threads

    def in_blocks(x: Tensor, *tensors: Any) -> Tensor:
        flat = None
        if x.numel() > few and not torch.is_grad_enabled() and not watched():
            m = x.numel() // inputs
            rows = row_blocks.rows(m, row_bytes, nbytes, torch.get_num_threads())
            flat = _flat((x, *tensors), cuts, m) if rows < m else None
        if flat is None:
            return last(first(x, *tensors[:at]), *tensors[at:])
        y = x.new_empty((*x.shape[:-1], outputs), dtype=dtype)
        matrix = y.view(m, outputs)
        for begin in range(0, m, rows):
            block = slice(begin, begin + rows)
            part, *rest = (t[block] if each else t for t, each in zip(flat, cuts, strict=True))
            last(first(part, *rest[:at]), *rest[at:], into=matrix[block])
        return y

    return in_blocks


def _flat(tensors: Sequence[Any], cut: Sequence[bool], m: int) -> list[Any] | None:
    """The tensors, those that are cut as matrices of m rows; None where that takes a copy."""
    if not all(t.is_contiguous() for t, each in zip(tensors, cut, strict=True) if each):
        return None
    return [t.view(m, t.shape[-1]) if each else t for t, each in zip(tensors, cut, strict=True)]
