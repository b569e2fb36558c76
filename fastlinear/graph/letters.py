"""Products by a parameter that a model spells in letters are linear layers, also where it has three dimensions or more:

einsum("ibh,hnd->ibnd", x, weight)    x @ weight.flatten(1), its columns taken apart
einsum("ibnd,hnd->ibh", x, weight)    linear(x.flatten(-2), weight.flatten(1))
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import fx

from fastlinear.graph.capture import Capture, example, is_contiguous, letters_of
from fastlinear.graph.expansions import spelled_out
from fastlinear.graph.patterns import product_at
from fastlinear.graph.story import Story


def spell_out(capture: Capture, story: Story) -> None:
    """Puts linear layers in the place of all that a graph has of it."""
    for root in list(capture.graph.nodes):
        summed = _summed(capture, root)
        if summed is None:
            continue
        result, parts = spelled_out(capture.graph, root, _plain(*summed), root.args[1:])
        node = next(each for each in parts if product_at(each) is not None)
        root.replace_all_uses_with(result.node)
        story.rename(root, node, "")
        story.add(node, (each for each in parts if each is not node))
        capture.graph.erase_node(root)


def _summed(capture: Capture, node: fx.Node) -> tuple[int, bool] | None:
    """How many dimensions are summed over, and whether they are the first ones of the parameter; None of others."""
    letters = letters_of(node)
    if letters is None or node.args[2] not in capture.values:
        return None
    (a, b, out), y = letters, example(node)
    x, weight = (example(each) for each in node.args[1:])
    summed = [c for c in b if c in a and c not in out]
    kept, outer, count = [c for c in b if c not in a], [*a[: len(a) - len(summed)]], len(summed)
    if x is None or weight is None or y is None or not x.dtype is weight.dtype is y.dtype or not is_contiguous(y):
        return None
    if not kept or not summed or [*a] != [*outer, *summed] or [*out] != [*outer, *kept]:
        return None
    first = [*b] == [*summed, *kept]
    alone = len(summed) == 1 if first else len(kept) == 1 and [*b] == [*kept, *summed]
    return (count, first) if alone else None


def _plain(count: int, first: bool) -> Any:
    def product(x: Any, weight: Any) -> Any:
        shape = example(weight.node)
        assert shape is not None
        rows = x.flatten(-count) if count > 1 else x
        matrix = weight.flatten(1) if shape.dim() > 2 else weight
        if not first:
            return F.linear(rows, matrix)
        y = torch.matmul(rows, matrix)
        return y.unflatten(-1, tuple(shape.shape[1:])) if shape.dim() > 2 else y

    return product
