"""Attention of a graph, on kernels of our own where these are faster for the shapes of a call."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import fx

from fastlinear.graph.capture import example, is_contiguous, op_of
from fastlinear.graph.story import Story
from fastlinear.layer import sdpa
from fastlinear.model.rows import NodeReport
from fastlinear.plan.attention import Answer

_ARGUMENTS = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal")


def absorb(graph: fx.Graph, story: Story, tune: str) -> None:
    """Puts ours, which decides in each call, in the place of torch's."""
    for node in list(graph.nodes):
        if node.op != "call_function" or op_of(node) != "scaled_dot_product_attention":
            continue
        given: dict[str, Any] = {**dict(zip(_ARGUMENTS, node.args, strict=False)), **node.kwargs}
        if (reason := _why_not(node, given)) is not None:
            story.tell(node, "torch", f"attention: torch: {reason}")
            continue
        causal, scale, grouped = given.get("is_causal", False), given.get("scale"), given.get("enable_gqa", False)
        told = story.row(node)
        story.tell(node, "fast", "attention: fastlinear, or torch where that is faster")
        run = sdpa.function(causal, scale, grouped, tune != "off", functools.partial(_tell, told))
        tensors = (given["query"], given["key"], given["value"], given.get("attn_mask"))
        with graph.inserting_before(node):
            made = graph.call_function(run, tensors)
        made.meta = dict(node.meta)
        node.replace_all_uses_with(made)
        graph.erase_node(node)


def _tell(told: NodeReport, found: Answer) -> None:
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
    if y.dim() != 4 or not is_contiguous(y.transpose(1, 2)):
        return "its output lies in another order than ours"
    return "gradients are wanted" if torch.is_grad_enabled() and y.requires_grad else None
