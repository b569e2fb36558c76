"""Gates that stand behind what they open, as diffusers' do: x, gate = linear(...).chunk(2, -1); x * activation(gate).

Such a product becomes two of the halves of its weight, and these one product with a gate, as any two do.
"""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F

from fastlinear.graph.capture import Capture
from fastlinear.graph.expansions import spelled_out
from fastlinear.graph.patterns import Product, halves_of, opened_by, product_at
from fastlinear.graph.story import Story


def part(capture: Capture, story: Story) -> None:
    """Makes two products of each one whose second half is the gate of the first."""
    graph = capture.graph
    for node in list(graph.nodes):
        halves = halves_of(node)
        product = None if halves is None or opened_by(*reversed(halves)) is None else product_at(node.args[0])
        if halves is None or product is None or not _is_parted(capture, product):
            continue
        whole, n = product.root, capture.values[product.weight].shape[0] // 2
        values, parts = spelled_out(graph, whole, _linears, (product.x, product.weight, product.bias, n))
        story.add(whole, parts)
        for half, value in zip(halves, values, strict=True):
            half.replace_all_uses_with(value.node)
        for gone in (*halves, node, whole):
            story.tell(gone, "dropped", "two products of its halves stand in its place, a gate and what it opens")
            graph.erase_node(gone)


def _is_parted(capture: Capture, product: Product) -> bool:
    """Whether the halves of a weight are its rows, which are as good as a weight of their own."""
    known = product.weight in capture.values and (product.bias is None or product.bias in capture.values)
    alone = len(product.nodes) == 1 and len(product.root.users) == 1
    return known and alone and not product.transposed and product.form is None


def _linears(x: Any, weight: Any, bias: Any, n: int) -> tuple[Any, Any]:
    rows = (slice(None, n), slice(n, None))
    through, gate = (F.linear(x, weight[half], None if bias is None else bias[half]) for half in rows)
    return through, gate
