"""Attention over a preallocated cache: rotary embedding, the write of keys and values, their repetition for groups of
heads and attention itself, some forty nodes of transformers' models, as one call of `layer/cached.py`.

What is looked for starts at scaled_dot_product_attention and goes back:

    query = q cos + h(q) sin                  h(x) = cat((-x[..., D / 2:], x[..., :D / 2]), -1)
    key   = the cache, its heads repeated     its last write being index_copy_(2, arange(L) + length, k cos + h(k) sin);
    value = likewise, of v                    or of a full one: roll(-1, 2), its last row replaced, copied back

or, where attention is causal, of the first rows of a cache, as many as query has.

A step of another kind, or anything else that reads or writes a cache in between, leaves all to torch's own ops.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx

import fastlinear._tensors as _tensors
from fastlinear.graph.attention import Whole, arguments, repeated, tell, whole_of
from fastlinear.graph.capture import ALL, changes, example, op_of, same_shape, same_size
from fastlinear.graph.story import Story
from fastlinear.layer import cached


class Rotation(NamedTuple):
    """x cos + h(x) sin, with cos and sin [B or 1, L, D]; nodes: all that compute it."""

    x: fx.Node
    cos: fx.Node
    sin: fx.Node
    nodes: list[fx.Node]


class Write(NamedTuple):
    """Of rows of a cache. position: the node of their indices; None for the last one of a full cache."""

    rows: fx.Node
    position: fx.Node | None
    nodes: list[fx.Node]


class Found(NamedTuple):
    """tensors: what `cached.function` takes; nodes: what it stands for, beside attention; whole: what cuts q, k and v
    into heads before all that, and joins these again."""

    tensors: tuple[fx.Node | None, ...]
    causal: bool
    scale: float | None
    cap: float | None
    nodes: set[fx.Node]
    whole: Whole | None


def absorb(graph: fx.Graph, story: Story, tune: str) -> None:
    """Puts ours in the place of all that a graph has of it."""
    for node in list(graph.nodes):
        if node.op == "call_function" and op_of(node) == "scaled_dot_product_attention":
            order = {each: i for i, each in enumerate(graph.nodes)}
            found = _found(node, order)
            if found is not None and _is_alone(node, found, order):
                _place(graph, story, node, found, tune)


def _place(graph: fx.Graph, story: Story, node: fx.Node, found: Found, tune: str) -> None:
    told = story.row(node)
    story.tell(node, "fast", "attention over a cache: fastlinear")
    sources, before, after, rows = found.whole or (found.tensors[:3], [], [], None)
    run = cached.function(found.causal, found.scale, tune != "off", functools.partial(tell, told), rows, found.cap)
    last = after[0] if after else node
    with graph.inserting_before(node):
        made = graph.call_function(run, (*sources, *found.tensors[3:]))
    made.meta = dict(last.meta)
    last.replace_all_uses_with(made)
    for each in (*after, node):
        graph.erase_node(each)
    for each in reversed(list(graph.nodes)):
        if each in found.nodes and (changes(each) or not each.users):
            story.tell(each, "fused", f"into {node.name}")
            if each.users:  # of a write, which returns what it wrote to
                each.replace_all_uses_with(each.args[0])
            graph.erase_node(each)
    for each in (*after, *before):
        if not each.users:
            story.tell(each, "fused", f"into {node.name}")
            if each in before:
                graph.erase_node(each)


def _found(node: fx.Node, order: dict[fx.Node, int]) -> Found | None:
    given = arguments(node)
    scale, mask, causal = given.get("scale"), given.get("attn_mask"), given.get("is_causal", False)
    if given.get("dropout_p", 0.0) != 0.0 or not isinstance(causal, bool) or (causal and mask is not None):
        return None
    if not isinstance(scale, (float, int, type(None))) or (mask is not None and example(mask) is None):
        return None
    query = _rotation(given["query"])
    cache_of = functools.partial(_begun, given["query"]) if causal else repeated
    (keys, between), (values, more) = (cache_of(given[name]) for name in ("key", "value"))
    if query is None or keys is None or values is None or keys is values:
        return None
    stored, own = (_write(cache, node, order) for cache in (keys, values))
    if stored is None or own is None or stored.position is not own.position:
        return None
    key = _rotation(stored.rows)
    if key is None or (key.cos, key.sin) != (query.cos, query.sin) or not _fits(query, key, own.rows, keys, values):
        return None
    nodes = {*query.nodes, *key.nodes, *between, *more, *stored.nodes, *own.nodes}
    length = None
    if stored.position is not None:
        grown = _length(stored.position, query.x, node, order)
        if grown is None:
            return None
        length = grown[0]
        nodes.update(grown[1])
    tensors = (query.x, key.x, own.rows, query.cos, query.sin, keys, values, length, mask, given.get("sinks"))
    whole = whole_of(node, [query.x, key.x, own.rows])
    whole = None if whole is None or whole.rows.length_first else whole
    return Found(tensors, causal, scale, given.get("cap"), nodes, whole)


def _is_alone(node: fx.Node, found: Found, order: dict[fx.Node, int]) -> bool:
    """Whether nothing but what is found writes anything after its first node, or reads a cache or its length after its
    first write, up to `node`."""
    end, first = order[node], min(order[each] for each in found.nodes)
    between = {each for each in order if first <= order[each] < end and each not in found.nodes}
    written = min(order[each] for each in found.nodes if changes(each))
    caches = [each for each in found.tensors[5:8] if each is not None]
    readers = {user for cache in caches for user in cache.users if order[user] > written}
    fetched = all(order[each] < end for each in found.tensors if each is not None)
    return fetched and not any(changes(each) for each in between) and between.isdisjoint(readers)


def _fits(query: Rotation, key: Rotation, v: fx.Node, keys: fx.Node, values: fx.Node) -> bool:
    """Whether these are tensors of one dtype that the kernels know, in the shapes of a cache."""
    nodes = (query.x, key.x, v, query.cos, query.sin, keys, values)
    found = [each for node in nodes if (each := example(node)) is not None]
    if len(found) < len(nodes) or any(t.dtype is not found[0].dtype or t.device.type != "cpu" for t in found):
        return False
    q, k, v_, cos, sin, cache, _ = found
    if found[0].dtype not in _tensors.FORMATS or not _is_dense(q, k, v_, cache, found[6]):
        return False
    angles = all(t.dim() == 3 and same_shape(t.shape[1:], (q.shape[2], q.shape[3])) for t in (cos, sin))
    # Dynamo gives the lengths of keys and values a symbol each, which attention holds against each other in each call.
    sizes = [[*t.shape[:2], t.shape[3]] for t in (cache, found[6])]
    alike = same_shape(k.shape, v_.shape) and same_shape(*sizes)
    return angles and alike and same_size(k.shape[2], q.shape[2]) and same_size(cache.shape[1], k.shape[1])


def _is_dense(*tensors: Tensor) -> bool:
    return all(t.layout is torch.strided and not t.is_nested and t.dim() == 4 for t in tensors)


def _rotation(node: Any) -> Rotation | None:
    for straight, turned in _pair(node, "add"):
        for half, sin in _pair(turned, "mul"):
            x, nodes = _turned(half)
            for other, cos in _pair(straight, "mul"):
                angles = [_squeezed(each) for each in (cos, sin)]
                if x is not None and other is x and all(angles):
                    return Rotation(x, angles[0], angles[1], [node, straight, turned, half, *nodes, cos, sin])
    return None


def _pair(node: Any, name: str) -> Iterator[tuple[Any, Any]]:
    """The arguments of a sum or a product of two nodes, in both orders."""
    if isinstance(node, fx.Node) and op_of(node) == name and not node.kwargs and len(node.args) == 2:
        a, b = node.args
        if isinstance(a, fx.Node) and isinstance(b, fx.Node):
            yield from ((a, b), (b, a))


def _turned(node: Any) -> tuple[Any, list[fx.Node]]:
    """x of h(x), and the other nodes that compute it."""
    parts, dim = node.args[0] if node.args else None, node.kwargs.get("dim", (*node.args, None, None)[1])
    y = example(node)
    if op_of(node) != "cat" or not isinstance(parts, (tuple, list)) or len(parts) != 2 or y is None or dim != -1:
        return None, []
    negated, low = parts
    if not all(isinstance(part, fx.Node) for part in parts) or op_of(negated) != "neg":
        return None, []
    high, half = negated.args[0], y.shape[-1] // 2
    cuts = (high, slice(half, None, None)), (low, slice(None, half, None))
    for part, cut in cuts:
        if op_of(part) != "getitem" or part.args[1] != (Ellipsis, cut) or part.args[0] is not low.args[0]:
            return None, []
    x = low.args[0]
    same = example(x)
    return (x, [negated, high, low]) if same is not None and same_shape(same.shape, y.shape) else (None, [])


def _squeezed(node: Any) -> Any:
    """[B, L, D] of a node [B, 1, L, D]."""
    return node.args[0] if op_of(node) == "unsqueeze" and node.args[1:] == (1,) and not node.kwargs else None


def _begun(q: fx.Node, node: Any) -> tuple[Any, list[fx.Node]]:
    """The cache of which as many rows are read as q has, and the node that does so."""
    x, y = example(q), example(node)
    index = node.args[1] if op_of(node) == "getitem" else None
    if x is None or y is None or not isinstance(index, tuple) or len(index) != 4:
        return None, []
    rows, others = index[2], (*index[:2], index[3])
    begins = isinstance(rows, slice) and rows.start is rows.step is None and others == (ALL, ALL, ALL)
    return (node.args[0], [node]) if begins and same_size(x.shape[2], y.shape[2]) else (None, [])


def _write(cache: Any, before: fx.Node, order: dict[fx.Node, int]) -> Write | None:
    """The last write to a cache."""
    writes = [user for user in cache.users if changes(user) and user.args[0] is cache and order[user] < order[before]]
    last: Any = max(writes, key=order.__getitem__, default=None)
    if last is None:
        return None
    if op_of(last) == "index_copy_":
        dim, position, rows = (*last.args[1:], None, None, None)[:3]
        return Write(rows, position, [last]) if dim == 2 and len(last.args) == 4 else None
    return _shifted(last, cache) if op_of(last) == "copy_" and len(last.args) == 2 else None


def _shifted(copied: Any, cache: Any) -> Write | None:
    """new = cache.roll(-1, dims=-2); new[:, :, tensor([-1])] = rows; cache.copy_(new)"""
    new: Any = copied.args[1]
    if op_of(new) != "roll" or new.args != (cache, -1) or new.kwargs != {"dims": -2} or len(new.users) != 2:
        return None
    (put,) = (user for user in new.users if user is not copied)
    if op_of(put) not in ("setitem", "__setitem__") or put.args[0] is not new:
        return None
    where, rows = put.args[1:]
    if not isinstance(where, tuple) or where[:2] != (ALL, ALL) or len(where) != 3 or op_of(where[2]) != "tensor":
        return None
    x = example(rows)
    last = where[2].args == ([-1],) and x is not None and x.dim() == 4 and same_size(x.shape[2], 1)
    return Write(rows, None, [copied, put, new, where[2]]) if last else None


def _length(
    position: Any, q: fx.Node, before: fx.Node, order: dict[fx.Node, int]
) -> tuple[fx.Node, list[fx.Node]] | None:
    """How far a cache is filled, which grows by the rows of q, of the positions arange(rows) + length."""
    x = example(q)
    for counted, length in _pair(position, "add"):
        filled = example(length)
        if op_of(counted) != "arange" or filled is None or filled.dim() != 0 or filled.dtype is not torch.int64:
            continue
        grown = [user for user in length.users if changes(user) and order[position] < order[user] < order[before]]
        if len(grown) != 1 or op_of(grown[0]) != "add_" or x is None:
            return None
        steps = (counted.args, grown[0].args)
        if all(len(each) == wanted for each, wanted in zip(steps, (1, 2), strict=True)):
            rows = [_number(each[-1]) for each in steps]
            if all(each is not None and same_size(each, x.shape[2]) for each in rows):
                return length, [counted, position, *grown]
    return None


def _number(value: Any) -> Any:
    """A number, or the symbol that a node stands for."""
    return value.meta.get("example_value") if isinstance(value, fx.Node) else value
