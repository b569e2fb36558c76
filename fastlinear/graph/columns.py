"""Products whose columns are not all read as one: these become products of rows of their weight.

Gates stand behind what they open, as diffusers' do: x, gate = linear(...).chunk(2, -1); x * activation(gate). Such a
product becomes two of its halves, and these one product with a gate, as any two do. Where a third alone is read, as in
converted attention to another sequence, nothing but that third is computed.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import torch.nn.functional as F
from torch import fx

from fastlinear.graph.capture import Capture
from fastlinear.graph.expansions import spelled_out
from fastlinear.graph.patterns import Product, halves_of, opened_by, pieces_of, product_at
from fastlinear.graph.story import Story


def part(capture: Capture, story: Story) -> None:
    """Makes two products of each one whose second half is the gate of the first."""
    for node in list(capture.graph.nodes):
        halves = halves_of(node)
        product = None if halves is None or opened_by(*reversed(halves)) is None else product_at(node.args[0])
        if halves is not None and product is not None and product.form is None and _is_parted(capture, product):
            n = capture.values[product.weight].shape[0] // 2
            pieces = dict(zip(halves, (slice(None, n), slice(n, None)), strict=True))
            why = "two products of its halves stand in its place, a gate and what it opens"
            _replace(capture, story, product, node, pieces, why)


def drop_unread(capture: Capture, story: Story) -> None:
    """Takes the columns out of products of which nobody reads the pieces that they are cut into, where others read
    those of the same weight: what then runs is all of it."""
    found = defaultdict[fx.Node, list[tuple[fx.Node, Product, dict[fx.Node, range]]]](list)
    for node in capture.graph.nodes:
        pieces = pieces_of(node)
        product = product_at(node.args[0]) if pieces else None
        if product is None or not _is_parted(capture, product) or (product.form is not None and product.form.layout):
            continue
        if sum(map(len, pieces.values())) < len(capture.values[product.weight]):
            found[product.weight].append((node, product, pieces))
    for weight, products in found.items():
        read = {column for *_, pieces in products for rows in pieces.values() for column in rows}
        if len(read) == len(capture.values[weight]):
            for node, product, pieces in products:
                slices = {piece: slice(rows.start, rows.stop) for piece, rows in pieces.items()}
                _replace(capture, story, product, node, slices, "nobody reads the rest of its columns")


def _is_parted(capture: Capture, product: Product) -> bool:
    """Whether columns of a product are rows of its weight, which are as good as a weight of their own."""
    known = product.weight in capture.values and (product.bias is None or product.bias in capture.values)
    alone = len(product.nodes) == 1 and len(product.root.users) == 1 and not product.operands
    return known and alone and not product.transposed


def _replace(
    capture: Capture, story: Story, product: Product, cut: fx.Node, pieces: dict[fx.Node, slice], why: str
) -> None:
    """Puts products of these rows of the weight in the place of the pieces that `cut` makes of one."""
    whole, graph = product.root, capture.graph

    def products(x: Any, weight: Any, bias: Any) -> Sequence[Any]:
        parts = [(weight[rows], None if bias is None else bias[rows]) for rows in pieces.values()]
        if product.form is None:
            return [F.linear(x, *part) for part in parts]
        return [whole.target(x, *part, *whole.args[3:], **whole.kwargs) for part in parts]  # type: ignore[operator]

    values, parts = spelled_out(graph, whole, products, (product.x, product.weight, product.bias))
    story.add(whole, parts)
    for piece, value in zip(pieces, values, strict=True):
        piece.replace_all_uses_with(value.node)
    for gone in (*pieces, cut, whole):
        story.tell(gone, "dropped", why)
        graph.erase_node(gone)
