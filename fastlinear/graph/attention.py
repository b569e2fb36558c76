"""Attention of a graph, on kernels of our own where these are faster for the shapes of a call."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import torch
from torch import fx

from fastlinear.graph.capture import ALL, example, is_contiguous, op_of, same_shape, same_size, turn_of
from fastlinear.graph.story import Story
from fastlinear.layer import sdpa
from fastlinear.model.rows import NodeReport
from fastlinear.plan.attention import Answer

_ARGUMENTS = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal")


def absorb(graph: fx.Graph, story: Story, tune: str, rounds: bool) -> None:
    """Puts ours, which decides in each call, in the place of torch's. rounds: whether fp32 is multiplied in bf16."""
    for node in list(graph.nodes):
        if node.op != "call_function" or op_of(node) != "scaled_dot_product_attention":
            continue
        given = arguments(node)
        if (reason := _why_not(node, given)) is not None:
            story.tell(node, "torch", f"attention: torch: {reason}")
            continue
        causal, scale, grouped = given.get("is_causal", False), given.get("scale"), given.get("enable_gqa", False)
        told = story.row(node)
        story.tell(node, "fast", "attention: fastlinear, or torch where that is faster")
        heads, repeats = _narrow([given[name] for name in _ARGUMENTS[:3]])
        grouped = grouped or bool(repeats)
        whole = whole_of(node, heads)
        rows = None if whole is None else whole.rows
        how = (causal, scale, grouped, tune != "off", functools.partial(tell, told))
        run = sdpa.function(*how, rows, rounds, given.get("cap"))
        last = node if whole is None else whole.after[0]
        with graph.inserting_before(node):
            sources = heads if whole is None else whole.sources
            made = graph.call_function(run, (*sources, given.get("attn_mask"), given.get("sinks")))
        made.meta = dict(last.meta)
        last.replace_all_uses_with(made)
        for gone in [node, *repeats] if whole is None else [*whole.after, node, *repeats, *whole.before]:
            if not gone.users:
                graph.erase_node(gone)
                if gone is not node:
                    what = "repeats heads" if gone in repeats else "cuts rows into heads"
                    story.tell(gone, "fused", f"into the attention, which {what} itself", made)


def _narrow(heads: list[Any]) -> tuple[list[Any], list[fx.Node]]:
    """q, k and v, of k and v those whose heads are repeated, if both are, and the nodes that do so."""
    found = [repeated(each) for each in heads[1:]]
    if not all(nodes for _, nodes in found):
        return heads, []
    return [heads[0], *(source for source, _ in found)], list(
        dict.fromkeys(each for _, nodes in found for each in nodes)
    )


class Whole(NamedTuple):
    """Attention of rows that are cut into heads for it alone. sources: the rows of q, k and v; before, after: the nodes
    that cut them and that join the heads again, last ones first."""

    sources: list[fx.Node]
    before: list[fx.Node]
    after: list[fx.Node]
    rows: sdpa.Rows


class _Cut(NamedTuple):
    """nodes: those that cut `source` into heads, last one first; order: where B, H, L and D are in what they turn."""

    nodes: list[fx.Node]
    source: fx.Node
    order: tuple[int, ...]


def whole_of(node: fx.Node, heads: list[Any]) -> Whole | None:
    """What is around attention, if that is nothing but cutting and joining."""
    cuts = [_cut(each) for each in heads]
    together = joined(node)
    sizes = [example(each) for each in heads]
    if together is None or any(each is None for each in cuts):
        return None
    counts = [t.shape[1] for t in sizes if t is not None]
    if not all(isinstance(count, int) for count in counts) or counts[1] != counts[2]:
        return None
    after, length_first = together
    found = [cut for cut in cuts if cut is not None]
    if {cut.order for cut in found} != {(1, 2, 0, 3) if length_first else (0, 2, 1, 3)}:
        return None
    before = list(dict.fromkeys(each for cut in found for each in cut.nodes))
    return Whole([cut.source for cut in found], before, after, sdpa.Rows(counts[0], counts[1], length_first))


def _cut(node: Any) -> _Cut | None:
    """How [B, H, L, D] comes from rows, [B, L, H * D] or [L, B, H * D]."""
    nodes, order = list[fx.Node](), tuple(range(4))
    while isinstance(node, fx.Node) and len(turn := turn_of(node)) == 4:
        nodes, order, node = [*nodes, node], tuple(turn[i] for i in order), node.args[0]
    if not isinstance(node, fx.Node) or op_of(node) not in ("view", "reshape", "unflatten"):
        return None
    source = node.args[0]
    x, y = example(source), example(node)
    if not isinstance(source, fx.Node) or x is None or y is None or x.dim() != 3 or y.dim() != 4:
        return None
    fits = same_shape(x.shape[:2], y.shape[:2]) and same_size(x.shape[2], y.shape[2] * y.shape[3])
    return _Cut([*nodes, node], source, order) if fits else None


def repeated(node: Any) -> tuple[Any, list[fx.Node]]:
    """The keys or values whose heads are repeated for groups of those of q, and the nodes that do so, last ones first;
    the node itself where none are."""
    x = example(node)
    if x is None:
        return None, []
    if op_of(node) not in ("reshape", "view"):
        return node, []
    wide = node.args[0]
    narrow = wide.args[0] if op_of(wide) == "expand" else None
    if narrow is None or op_of(narrow) != "getitem" or narrow.args[1] != (ALL, ALL, None, ALL, ALL):
        return None, []
    source, expanded = example(narrow.args[0]), example(wide)
    if source is None or expanded is None or source.dim() != 4:
        return None, []
    b, heads, rows, size = source.shape
    group = expanded.shape[2]
    fits = same_shape(expanded.shape, (b, heads, group, rows, size)) and same_shape(
        x.shape, (b, heads * group, rows, size)
    )
    return (narrow.args[0], [node, wide, narrow]) if fits else (None, [])


# How heads are turned before they are joined: whether L comes first then.
_JOINS: dict[tuple[int, ...], bool] = {(0, 2, 1, 3): False, (2, 0, 1, 3): True}


def joined(node: fx.Node) -> tuple[list[fx.Node], bool] | None:
    """The nodes that make rows of attention's output and are all that read it, the last one first, and whether these
    are [L, B, H * D]."""
    y, chain, order = example(node), [node], tuple(range(4))
    if y is None or y.dim() != 4:
        return None
    while len(chain[-1].users) == 1 and len(chain) < 5:
        (user,) = chain[-1].users
        turn, z = turn_of(user), example(user)
        follows = order not in _JOINS if len(turn) == 4 else op_of(user) in ("contiguous", "reshape", "view", "flatten")
        if not follows or user.args[0] is not chain[-1] or z is None:
            return None
        order = tuple(order[i] for i in turn) if turn else order
        chain.append(user)
        if z.dim() == 3:
            outer, inner, h, size = (y.shape[i] for i in order)
            fits = order in _JOINS and same_shape(z.shape, (outer, inner, h * size))
            return (chain[:0:-1], _JOINS[order]) if fits else None
    return None


def arguments(node: fx.Node) -> dict[str, Any]:
    """Those of torch's attention, by name, with sinks and cap of our own."""
    return {**dict(zip(_ARGUMENTS, node.args, strict=False)), **node.kwargs}


def tell(told: NodeReport, found: Answer) -> None:
    """What the last call of another kind ran."""
    told.outcome, told.why = "fast" if found.ours else "torch", f"attention: {found.why}"


def _why_not(node: fx.Node, given: dict[str, Any]) -> str | None:
    """Why ours never stands in the place of a node."""
    y, mask = example(node), example(given.get("attn_mask"))
    tensors = [example(given.get(name)) for name in _ARGUMENTS[:3]]
    q, k, v = tensors
    if y is None or q is None or k is None or v is None or (mask is None and given.get("attn_mask") is not None):
        return "its input is no tensor"
    if given.get("dropout_p", 0.0) != 0.0:
        return "it drops out"
    if not isinstance(given.get("is_causal", False), bool) or not isinstance(given.get("enable_gqa", False), bool):
        return "its flags are no constants"
    if not isinstance(given.get("scale"), (float, int, type(None))):
        return "its scale is no number"
    if (reason := sdpa.why_not(q, k, v, mask)) is not None:
        return reason
    # Where heads are joined at once, the order that they lie in shows nowhere.
    if y.dim() != 4 or not (is_contiguous(y.transpose(1, 2)) or joined(node)):
        return "its output lies in another order than ours"
    return "gradients are wanted" if torch.is_grad_enabled() and y.requires_grad else None
