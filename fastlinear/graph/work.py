"""How much a graph multiplies activations with one another, as attention does: of that no weight tells."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from torch import Tensor, fx

from fastlinear.graph.capture import example, op_of
from fastlinear.graph.patterns import is_given, product_at


def work_of(node: fx.Node) -> int:
    """The multiply-adds of a node that multiplies activations, sizes that are dynamic counted as 1; 0 of any other."""
    count = _COUNTS.get(op_of(node))
    if count is None or product_at(node) is not None or any(map(is_given, node.all_input_nodes)):
        return 0
    known = [each for node in node.all_input_nodes if (each := example(node)) is not None]
    return count(node, *known[:3]) if len(known) > 1 else 0


def _of(*sizes: Any) -> int:
    return math.prod(size for size in sizes if isinstance(size, int))


def _attention(node: fx.Node, q: Tensor, k: Tensor, *rest: Tensor) -> int:
    v = rest[0] if rest else k  # of a tensor that is all three, torch's graphs have one node
    return _of(*q.shape[:-1], k.shape[-2]) * (_of(q.shape[-1]) + _of(v.shape[-1]))


def _product(node: fx.Node, x: Tensor, y: Tensor, *_: Tensor) -> int:
    return _of(*x.shape, y.shape[-1]) if x.dim() > 2 and y.dim() > 2 else 0  # of a matrix it is like a linear layer


def _sum_and_product(node: fx.Node, added: Tensor, x: Tensor, *rest: Tensor) -> int:
    return _product(node, x, *rest) if rest else 0


def _letters(node: fx.Node, x: Tensor, y: Tensor, *_: Tensor) -> int:
    given = str(node.args[0]).replace(" ", "").partition("->")[0].split(",")
    if len(given) != 2 or len(given[0]) != x.dim() or len(given[1]) != y.dim():
        return 0
    sizes = dict(zip(given[0], x.shape, strict=True)) | dict(zip(given[1], y.shape, strict=True))
    return _of(*sizes.values())


_COUNTS: dict[str, Callable[..., int]] = {
    "scaled_dot_product_attention": _attention,
    "matmul": _product,
    "bmm": _product,
    "baddbmm": _sum_and_product,
    "einsum": _letters,
}
