"""Attention of a graph, on kernels of our own where these are faster for the shapes of a call."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import torch
from torch import fx

from fastlinear.graph.capture import example, is_contiguous, op_of, same_shape, same_size
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
        heads = [given[name] for name in _ARGUMENTS[:3]]
        whole = whole_of(node, heads)
        rows = (0, 0) if whole is None else whole.rows
        run = sdpa.function(causal, scale, grouped, tune != "off", functools.partial(tell, told), rows, rounds)
        last = node if whole is None else whole.after[0]
        with graph.inserting_before(node):
            made = graph.call_function(run, (*(heads if whole is None else whole.sources), given.get("attn_mask")))
        made.meta = dict(last.meta)
        last.replace_all_uses_with(made)
        for gone in [node] if whole is None else [*whole.after, node, *whole.before]:
            if not gone.users:
                graph.erase_node(gone)
                if gone is not node:
                    story.tell(gone, "fused", "into the attention, which cuts rows into heads itself", made)


class Whole(NamedTuple):
    """Attention of rows that are cut into heads for it alone. sources: the rows of q, k and v; before, after: the nodes
    that cut them and that join the heads again, last ones first; rows: how many heads these are."""

    sources: list[fx.Node]
    before: list[fx.Node]
    after: list[fx.Node]
    rows: tuple[int, int]


def whole_of(node: fx.Node, heads: list[Any]) -> Whole | None:
    """What is around attention, if that is nothing but cutting and joining."""
    cuts = [_cut(each) for each in heads]
    joined = _joined(node)
    sizes = [example(each) for each in heads]
    if joined is None or any(each is None for each in cuts):
        return None
    counts = [t.shape[1] for t in sizes if t is not None]
    if not all(isinstance(count, int) for count in counts) or counts[1] != counts[2]:
        return None
    found = [cut for cut in cuts if cut is not None]
    before = list(dict.fromkeys(each for cut in found for each in cut[:2]))
    return Whole([cut[2] for cut in found], before, joined, (counts[0], counts[1]))


def _cut(node: Any) -> tuple[fx.Node, fx.Node, fx.Node] | None:
    """(the transposition, the view, x [B, L, H * D]) that [B, H, L, D] comes from."""
    view = node.args[0] if isinstance(node, fx.Node) and _swaps_middle(node) else None
    if not isinstance(view, fx.Node) or op_of(view) not in ("view", "reshape", "unflatten"):
        return None
    source = view.args[0]
    x, y = example(source), example(view)
    if not isinstance(source, fx.Node) or x is None or y is None or x.dim() != 3 or y.dim() != 4:
        return None
    fits = same_shape(x.shape[:2], y.shape[:2]) and same_size(x.shape[2], y.shape[2] * y.shape[3])
    return (node, view, source) if fits else None


def _joined(node: fx.Node) -> list[fx.Node] | None:
    """The nodes that make [B, L, H * D] of attention's output and are all that read it, the last one first."""
    y, chain = example(node), [node]
    while len(chain[-1].users) == 1 and len(chain) < 4:
        (user,) = chain[-1].users
        follows = (
            _swaps_middle(user) if len(chain) == 1 else op_of(user) in ("contiguous", "reshape", "view", "flatten")
        )
        z = example(user)
        if not follows or user.args[0] is not chain[-1] or z is None or y is None:
            return None
        chain.append(user)
        if z.dim() == 3:
            b, h, rows, size = y.shape
            return chain[:0:-1] if same_shape(z.shape, (b, rows, h * size)) else None
    return None


def _swaps_middle(node: fx.Node) -> bool:
    given = [*node.args[1:]]
    if node.kwargs:
        return False
    if op_of(node) == "permute":
        order = given[0] if len(given) == 1 else given
        return isinstance(order, (tuple, list)) and [*order] == [0, 2, 1, 3]
    return op_of(node) == "transpose" and sorted(d % 4 for d in given if isinstance(d, int)) == [1, 2]


def arguments(node: fx.Node) -> dict[str, Any]:
    """Those of torch's attention, by name."""
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
    if y.dim() != 4 or not (is_contiguous(y.transpose(1, 2)) or _joined(node)):
        return "its output lies in another order than ours"
    return "gradients are wanted" if torch.is_grad_enabled() and y.requires_grad else None
