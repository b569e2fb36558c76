"""torch's fused encoder kernels, spelled out: they hide linear layers, and run those unpacked.

Each row is the torch op and the same in plain torch, for the arguments for which it is the same.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import operator
from collections.abc import Callable
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import fx

import fastlinear._torch as _torch
from fastlinear.graph.capture import example, turn_of
from fastlinear.spec import attention


class Expansion(NamedTuple):
    """plain: takes the op's arguments. why_not: why these nodes and numbers are another thing, None if they are not.
    outputs: how many tensors it returns, in a tuple if several."""

    plain: Callable[..., Any]
    why_not: Callable[..., str | None]
    outputs: int


def _attention(
    query: Any,
    key: Any,
    value: Any,
    embed_dim: int,
    num_head: int,
    qkv_weight: Any,
    qkv_bias: Any,
    proj_weight: Any,
    proj_bias: Any,
    mask: Any = None,
    need_weights: bool = True,
    average_attn_weights: bool = True,
    mask_type: int | None = None,
) -> Any:
    """Self-attention of x [B, L, E]. The mask is true where nothing is to be looked at: [L, L], by mask_type 1 [B, L]
    of keys, by 2 [B, H, L, L]."""
    heads = F.linear(query, qkv_weight, qkv_bias).unflatten(-1, (3, num_head, embed_dim // num_head))
    q, k, v = (heads.select(2, i).transpose(1, 2) for i in range(3))
    if mask is not None:
        mask = mask.to(torch.bool).logical_not()
        mask = mask.unsqueeze(1).unsqueeze(1) if mask_type == 1 else mask
    y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    return F.linear(y.transpose(1, 2).flatten(-2), proj_weight, proj_bias)


def _attention_and_no_weights(*args: Any, **kwargs: Any) -> Any:
    return _attention(*args, **kwargs), None


def _why_not_attention(
    query: Any, key: Any, value: Any, embed_dim: int, num_head: int, *rest: Any, need_weights: bool = True, **_: Any
) -> str | None:
    if query is not key or query is not value:
        return "its query, key and value are not one tensor"
    if rest[5] if len(rest) > 5 else need_weights:
        return "its weights are wanted"
    return _why_not_dense(query)


def _why_not_dense(x: Any, *_: Any, **__: Any) -> str | None:
    tensor = example(x)
    return "its input is no dense tensor [B, L, E]" if tensor is None or tensor.is_nested or tensor.dim() != 3 else None


def _encoder_layer(
    src: Any,
    embed_dim: int,
    num_heads: int,
    qkv_weight: Any,
    qkv_bias: Any,
    proj_weight: Any,
    proj_bias: Any,
    use_gelu: bool,
    norm_first: bool,
    eps: float,
    norm_weight_1: Any,
    norm_bias_1: Any,
    norm_weight_2: Any,
    norm_bias_2: Any,
    ffn_weight_1: Any,
    ffn_bias_1: Any,
    ffn_weight_2: Any,
    ffn_bias_2: Any,
    mask: Any = None,
    mask_type: int | None = None,
) -> Any:
    def norm(x: Any, weight: Any, bias: Any) -> Any:
        return F.layer_norm(x, (embed_dim,), weight, bias, eps)

    x = norm(src, norm_weight_1, norm_bias_1) if norm_first else src
    projections = (qkv_weight, qkv_bias, proj_weight, proj_bias, mask)
    x = src + _attention(x, x, x, embed_dim, num_heads, *projections, mask_type=mask_type)
    x = x if norm_first else norm(x, norm_weight_1, norm_bias_1)
    y = norm(x, norm_weight_2, norm_bias_2) if norm_first else x
    y = F.linear(y, ffn_weight_1, ffn_bias_1)
    y = F.linear(F.gelu(y) if use_gelu else F.relu(y), ffn_weight_2, ffn_bias_2)
    return x + y if norm_first else norm(x + y, norm_weight_2, norm_bias_2)


def _forward(
    query: Any,
    key: Any,
    value: Any,
    embed_dim_to_check: int,
    num_heads: int,
    in_proj_weight: Any,
    in_proj_bias: Any,
    bias_k: Any,
    bias_v: Any,
    add_zero_attn: bool,
    dropout_p: float,
    out_proj_weight: Any,
    out_proj_bias: Any,
    training: bool = True,
    key_padding_mask: Any = None,
    need_weights: bool = True,
    attn_mask: Any = None,
    use_separate_proj_weight: bool = False,
    q_proj_weight: Any = None,
    k_proj_weight: Any = None,
    v_proj_weight: Any = None,
    static_k: Any = None,
    static_v: Any = None,
    average_attn_weights: bool = True,
    is_causal: bool = False,
) -> Any:
    """Attention of x [L, B, E], or [L, E], to [S, B, ...]; masks are bool, true where nothing is to be looked at, or
    are added. What is [B, L, E] turned stays as it was, so that rows need no copy."""
    size, alone = embed_dim_to_check // num_heads, _dim(query) == 2
    own = (q_proj_weight, k_proj_weight, v_proj_weight) if use_separate_proj_weight else None
    batch_first = all(_is_turned(x.node) for x in (query, key, value))
    length, order = (1, (0, 2, 1, 3)) if batch_first else (0, (1, 2, 0, 3))
    inputs = _same_again((query, key, value), batch_first)
    if alone:
        with_batch = {x.node: x.unsqueeze(1) for x in inputs}
        inputs = [with_batch[x.node] for x in inputs]
    q, k, v = _projected(inputs, in_proj_weight, in_proj_bias, own)
    further = 0
    if bias_k is not None:
        k, v = (torch.cat([x, b.expand_as(x.narrow(length, 0, 1))], length) for x, b in ((k, bias_k), (v, bias_v)))
        further += 1
    q, k, v = (x.unflatten(-1, (num_heads, size)).permute(order) for x in (q, k, v))  # [B, H, L, D]
    if add_zero_attn:
        k, v = (torch.cat([x, torch.zeros_like(x[:, :, :1])], 2) for x in (k, v))
        further += 1
    causal = is_causal and key_padding_mask is None and not need_weights
    mask = None
    if attn_mask is not None and not causal:
        mask = _added(attn_mask, query)
        mask = mask.unflatten(0, (-1, num_heads)) if _dim(attn_mask) == 3 else mask
    if key_padding_mask is not None:
        padding = _added(key_padding_mask, query)
        padding = padding if alone else padding.unsqueeze(1).unsqueeze(1)
        mask = padding if mask is None else mask + padding
    mask = F.pad(mask, (0, further)) if mask is not None and further else mask
    if need_weights:
        y, weights = attention.with_weights(q, k, v, mask, size, average_attn_weights)
        weights = weights.squeeze(0) if alone else weights
    else:
        y, weights = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal), None
    y = F.linear(y.permute((0, 2, 1, 3) if batch_first else (2, 0, 1, 3)).flatten(-2), out_proj_weight, out_proj_bias)
    return y.squeeze(1) if alone else y.transpose(0, 1) if batch_first else y, weights


def _is_turned(node: fx.Node) -> bool:
    """Whether a node is [L, B, E] of what lies as [B, L, E]."""
    return turn_of(node) == (1, 0, 2)


def _same_again(inputs: tuple[Any, ...], turned: bool) -> list[Any]:
    """The inputs, or what they are the transpose of where `turned`, one object for each node, so that what is the same
    looks the same."""
    nodes = [x.node.args[0] if turned else x.node for x in inputs]
    first = {node: fx.Proxy(node, inputs[0].tracer) for node in nodes}
    return [first[node] for node in nodes]


def _projected(inputs: list[Any], weight: Any, bias: Any, own: tuple[Any, ...] | None) -> list[Any]:
    """Query, key and value [L, B, E]: by one product where they are of one x and have one weight."""
    if own is None and len({x.node for x in inputs}) == 1:
        y = F.linear(inputs[0], weight, bias).chunk(3, -1)
        return [y[i] for i in range(3)]
    weights = weight.chunk(3) if own is None else own
    biases = [None] * 3 if bias is None else bias.chunk(3)
    return [F.linear(x, weights[i], biases[i]) for i, x in enumerate(inputs)]


def _dim(x: Any) -> int:
    known = example(x.node)
    assert known is not None
    return known.dim()


def _added(mask: Any, x: Any) -> Any:
    """A mask as what is added to the scores, in the dtype of x."""
    known, dtype = example(mask.node), example(x.node)
    assert known is not None and dtype is not None
    return attention.additive(mask, known.dtype is torch.bool, dtype.dtype)


def _why_not_forward(query: Any, key: Any, value: Any, *args: Any, **kwargs: Any) -> str | None:
    given = dict(zip(_FORWARD[3:], args, strict=False)) | kwargs
    masks = (given.get("attn_mask"), given.get("key_padding_mask"))
    if given.get("training") is not False and given["dropout_p"] != 0:
        return "the model is in training mode"
    if any(given.get(name) is not None for name in ("static_k", "static_v")):
        return "its key and value are given as heads"
    if any(mask is not None and example(mask) is None for mask in masks):
        return "it attends by a mask that is no tensor"
    known = [example(x) for x in (query, key, value)]
    if any(x is None or x.is_nested or x.dim() not in (2, 3) for x in known):
        return "its input is no dense tensor [L, B, E] or [L, E]"
    if any(isinstance(size, int) and size == 0 for x in known if x is not None for size in x.shape):
        return "its input is empty"
    return None


_FORWARD = list(inspect.signature(F.multi_head_attention_forward).parameters)

EXPANSIONS: dict[Any, Expansion] = {
    F.multi_head_attention_forward: Expansion(_forward, _why_not_forward, 2),
    _torch.encoder_layer: Expansion(_encoder_layer, _why_not_dense, 1),
    _torch.native_attention: Expansion(_attention_and_no_weights, _why_not_attention, 2),
}


def expand(graph: fx.Graph, node: fx.Node) -> list[fx.Node] | str | None:
    """Spells out a node in its place, and returns what stands there now, or why it cannot; None for any other node."""
    row = EXPANSIONS.get(node.target) if node.op == "call_function" else None
    if row is None:
        return None
    if (reason := row.why_not(*node.args, **node.kwargs)) is not None:
        return reason
    if any(user.target is not operator.getitem for user in node.users) and row.outputs > 1:
        return "its outputs are not taken apart"
    result, parts = spelled_out(graph, node, row.plain, node.args, node.kwargs)
    for user in list(node.users) if row.outputs > 1 else ():  # operator.getitem
        _replace(graph, user, result[user.args[1]])
    if row.outputs == 1:
        _replace(graph, node, result)
    else:
        graph.erase_node(node)
    return parts


def spelled_out(
    graph: fx.Graph, node: fx.Node, plain: Callable[..., Any], args: Any, kwargs: Any = MappingProxyType({})
) -> tuple[Any, list[fx.Node]]:
    """plain(*args, **kwargs) of nodes, put before a node, as what that module runs: what it returns, and its nodes."""
    before = set(graph.nodes)
    proxy: Any = functools.partial(fx.Proxy, tracer=fx.proxy.GraphAppendingTracer(graph))
    with graph.inserting_before(node):
        given, named = fx.map_arg((args, dict(kwargs)), proxy)
        result = plain(*given, **named)
    parts = [each for each in graph.nodes if each not in before]
    for part in parts:  # so that layers are still chosen by the classes that they lie in
        part.meta["nn_module_stack"] = node.meta.get("nn_module_stack")
        _trace(part)
    return result, parts


def _trace(node: fx.Node) -> None:
    """Gives a node the fake value that Dynamo would have traced it with, as patterns ask for that."""
    if "example_value" in node.meta or any("example_value" not in each.meta for each in node.all_input_nodes):
        return
    args, kwargs = fx.map_arg((node.args, node.kwargs), lambda each: each.meta["example_value"])
    function: Any = node.target
    fakes = (each.meta["example_value"] for each in node.all_input_nodes)
    mode: Any = next(
        (fake.fake_mode for fake in fakes if isinstance(fake, _torch.FakeTensor)), contextlib.nullcontext()
    )
    with torch.no_grad(), mode:
        if node.op == "call_method":
            node.meta["example_value"] = getattr(args[0], str(node.target))(*args[1:], **kwargs)
        elif node.op == "call_function":
            node.meta["example_value"] = function(*args, **kwargs)


def _replace(graph: fx.Graph, node: fx.Node, value: fx.Proxy | None) -> None:
    """None stands for what is never read."""
    if value is not None:
        value.node.meta = dict(node.meta)
        node.replace_all_uses_with(value.node)
    graph.erase_node(node)
