"""The experts of a mixture, as transformers spells them out in a graph.

The pairs of a token and one of its experts are the rows of two products, in one of two ways:

    grouped_mm    sorted by expert: grouped_mm(rows, weight, where each expert's end), and put back as they were
    batched_mm    as they are: bmm of each row and a copy of its expert's weight

What stands between the products is found by trying it, as of a module's (`layer/mixture.py`). The eager loop over
experts breaks graphs, so that none holds it.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx

from fastlinear.graph.capture import Capture, changes, example, op_of, same_shape, same_size
from fastlinear.graph.tidying import computed
from fastlinear.layer import mixture
from fastlinear.spec.activations import Activation
from fastlinear.spec.experts import Form

GROUPED = ("_grouped_mm", "grouped_mm", "grouped_mm_fallback")
_PRODUCTS = (*GROUPED, "squeeze")  # the last nodes of one
_TURNS = {(-2, -1), (-1, -2), (1, 2), (2, 1)}


class Found(NamedTuple):
    """y[t] = sum_j weights[t, j] * second_e(program(first_e(x[t]))), e = ids[t, j]: the value of `root`.

    tensors: both weights and both biases; products: the nodes of both; nodes: all that compute it, the root among them.
    """

    root: fx.Node
    x: fx.Node
    ids: fx.Node
    weights: fx.Node
    tensors: tuple[fx.Node, fx.Node, fx.Node | None, fx.Node | None]
    form: Form
    products: tuple[fx.Node, ...]
    nodes: set[fx.Node]


def found(capture: Capture) -> Iterator[Found]:
    """The mixtures of a graph of which nothing is read elsewhere, and meanwhile nothing else is written to."""
    order = {node: i for i, node in enumerate(capture.graph.nodes)}
    for node in order:
        if op_of(node) == "sum":
            try:
                each = _Reader(capture, order).mixture(node)
            except _Other:
                continue
            if _is_alone(each, order):
                yield each


def _is_alone(each: Found, order: dict[fx.Node, int]) -> bool:
    first, last = min(order[node] for node in each.nodes), order[each.root]
    inside = all(user in each.nodes for node in each.nodes if node is not each.root for user in node.users)
    return inside and not any(changes(node) for node, i in order.items() if first < i < last and node not in each.nodes)


class _Other(Exception):
    """What is read is no mixture."""


def _hold(is_so: bool) -> None:
    if not is_so:
        raise _Other


class _Projection(NamedTuple):
    """One of the two products, of rows [pairs, K]."""

    rows: Any
    weight: fx.Node
    bias: fx.Node | None
    transposed: bool


class _Reader:
    """Reads a mixture from its end. nodes: those that were read; products: of these, the last one first; numbers: the
    node of each row's expert; permutation: that of the pair that each row is, None where rows are the pairs in their
    order."""

    def __init__(self, capture: Capture, order: dict[fx.Node, int]) -> None:
        self.capture, self.order, self.nodes = capture, order, set[fx.Node]()
        self.products: list[fx.Node] = []
        self.numbers: Any = None
        self.permutation: Any = None

    def read(self, node: Any, *ops: str) -> tuple[Any, ...]:
        """What a node that does one of these things is called with."""
        _hold(isinstance(node, fx.Node) and op_of(node) in ops)
        self.nodes.add(node)
        return (*node.args, *node.kwargs.values())

    def flat(self, node: Any) -> Any:
        """What a node has all elements of, in one dimension."""
        of, *sizes = self.read(node, "reshape", "view")
        _hold(sizes in ([-1], [(-1,)]))
        return of

    def mixture(self, total: fx.Node) -> Found:
        by_token, *dims = self.read(total, "sum")
        rows, *_ = self.read(by_token, "view", "reshape")
        inverse: Any = None
        if op_of(rows) == "getitem":
            rows, inverse = self.read(rows, "getitem")
        made, beside = self.read(rows, "mul")
        share, axis = self.read(beside, "unsqueeze")
        _hold(dims == [1] and axis in (-1, 1))
        if inverse is not None:
            share, self.permutation = self.read(share, "getitem")
        pairs = None if inverse is None else self.sorted_pairs(inverse)
        second = self.projection(made)
        gate, product = self.between(second.rows)
        first = self.projection(product)
        x, ids, weights = self.tokens(first.rows), self.flat(pairs or self.numbers), self.flat(share)
        _hold(first.transposed is second.transposed and _fit(x, ids, weights, by_token))
        program, interleaved = _tried(gate, product, second.rows)
        form = Form(program, transposed=first.transposed, interleaved=interleaved)
        tensors = (first.weight, second.weight, first.bias, second.bias)
        root, products = self.cast(total, x), tuple(reversed(self.products))
        return Found(root, x, ids, weights, tensors, form, products, self.nodes)

    def cast(self, total: fx.Node, x: fx.Node) -> fx.Node:
        """The sum, or what casts it to the dtype of x."""
        y, given = example(total), example(x)
        if y is not None and given is not None and y.dtype is given.dtype:
            return total
        _hold(len(total.users) == 1 and given is not None)
        (root,) = total.users
        _hold(self.read(root, "to") == (total, given.dtype))  # type: ignore[union-attr]
        return root

    def sorted_pairs(self, inverse: Any) -> Any:
        """The experts' numbers before they were sorted, where `inverse` undoes that."""
        order, which = self.read(self.permutation, "getitem")
        pairs, *more = self.read(order, "sort")
        self.numbers = next((user for user in order.users if user.args[1:] == (0,)), None)
        self.read(self.numbers, "getitem")
        puts = [user for user in inverse.users if op_of(user) == "setitem"]
        _hold(which == 1 and not more and len(puts) == 1)
        of, at, places = self.read(puts[0], "setitem")
        self.read(places, "arange")
        counted, whole = example(places), example(inverse)
        _hold(self.read(inverse, "empty_like") == (self.permutation,) == (at,) and of is inverse)
        _hold(len(places.args) == 1 and counted is not None and whole is not None)
        _hold(same_shape(counted.shape, whole.shape))  # type: ignore[union-attr]
        return pairs

    def projection(self, node: fx.Node) -> _Projection:
        made = self.batched(node) if self.permutation is None else self.grouped(node)
        weight = self.capture.values.get(made.weight)
        _hold(weight is not None and weight.dim() == 3)
        added = [user for user in node.users if op_of(user) == "add_"]
        if not added:
            return made
        y, beside = self.read(added[0], "add_")
        bias, at = self.read(beside, "getitem")
        later = all(self.order[user] > self.order[added[0]] for user in node.users if user is not added[0])
        _hold(len(added) == 1 and y is node and at is self.numbers and later and bias in self.capture.values)
        return made._replace(bias=bias)

    def batched(self, node: Any) -> _Projection:
        product, axis = self.read(node, "squeeze")
        a, b = self.read(product, "bmm")
        self.products.append(product)
        _hold(axis in (1, -1))
        selected, raised = (b, a) if axis == 1 else (a, b)
        weight, numbers = self.read(selected, "getitem")
        rows, at = self.read(raised, "unsqueeze")
        self.numbers = numbers if self.numbers is None else self.numbers
        _hold(numbers is self.numbers and (at == axis or (axis, at) == (-1, 2)))
        return _Projection(rows, weight, None, axis == 1)

    def grouped(self, node: Any) -> _Projection:
        rows, weight, ends, *rest = self.read(node, *GROUPED)
        self.products.append(node)
        transposed = op_of(weight) != "transpose"
        if not transposed:
            weight, *dims = self.read(weight, "transpose")
            _hold(tuple(dims) in _TURNS)
        counts, *how = self.read(ends, "cumsum")
        ordered, *bins = self.read(counts, "histc")
        count = example(weight)
        _hold(how == [0, torch.int32] and not any(each is not None for each in rest) and count is not None)
        _hold(bins == [len(count), 0, len(count) - 1])  # type: ignore[arg-type]
        _hold(self.read(ordered, "float", "int") == (self.numbers,))
        return _Projection(rows, weight, None, transposed)

    def between(self, end: Any) -> tuple[list[fx.Node], fx.Node]:
        """The nodes that make `end` of the first product, in their order, and that."""
        nodes, products, left = set[fx.Node](), set[fx.Node](), [end]
        while left:
            node = left.pop()
            _hold(isinstance(node, fx.Node) and node.op in ("call_function", "call_method"))
            if op_of(node) in _PRODUCTS:
                products.add(node)
            elif node not in nodes:
                _hold(not changes(node) and bool(node.all_input_nodes))
                nodes.add(node)
                left += node.all_input_nodes
        _hold(len(products) == 1 and end in nodes)
        self.nodes |= nodes
        return sorted(nodes, key=self.order.__getitem__), products.pop()

    def tokens(self, rows: Any) -> Any:
        """x [tokens, K] of which each row is repeated for its pairs."""
        if self.permutation is None:
            x, times, dim = self.read(rows, "repeat_interleave")
            _hold(dim == 0)
        else:
            x, at = self.read(rows, "getitem")
            permutation, times = self.read(at, "floordiv")
            _hold(permutation is self.permutation)
        y, known = example(rows), example(x)
        count: Any = times.meta.get("example_value") if isinstance(times, fx.Node) else times
        _hold(y is not None and known is not None and isinstance(count, (int, torch.SymInt)))
        _hold(same_size(y.shape[0], known.shape[0] * count))  # type: ignore[union-attr]
        return x


def _fit(x: Any, ids: Any, weights: Any, by_token: Any) -> bool:
    """Whether these are [T, K], twice [T, top_k] and [T, top_k, N]. Of weights that are an input of their own no graph
    proves T: it is asked in each call."""
    found = [each for node in (x, ids, weights, by_token) if (each := example(node)) is not None]
    if [each.dim() for each in found] != [2, 2, 2, 3]:
        return False
    rows, numbers, shares, pairs = found
    alike = same_size(numbers.shape[1], shares.shape[1]) and same_shape(numbers.shape, pairs.shape[:2])
    return alike and same_size(rows.shape[0], numbers.shape[0]) and numbers.dtype is torch.int64


def _tried(gate: list[fx.Node], product: fx.Node, end: fx.Node) -> tuple[Activation, bool]:
    """What these nodes compute, and whether gates and what goes through them take turns."""
    numbers = [arg for node in gate for arg in (*node.args, *node.kwargs.values()) if isinstance(arg, (int, float))]

    def compute(y: Tensor) -> Tensor:
        values: dict[fx.Node, Any] = {product: y}
        for node in gate:
            values[node] = computed(node, values)
        result: Tensor = values[end]
        return result

    for interleaved in (False, True):
        program = mixture.tried(compute, interleaved, numbers)
        if program is not None:
            return program, interleaved
    raise _Other
