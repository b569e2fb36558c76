"""Attention that a model spells out: softmax(q k^T * scale + mask) v, as products and a softmax, becomes torch's
scaled_dot_product_attention, or, with what that has not, sinks and a cap of the scores, the op fastlinear::attention.

The products are matmul, bmm or einsum of [B, H, L, D] or [N, L, D]; nothing else reads the scores and weights. A query
of which masks of -inf leave nothing gets 0, as torch's own attention has it, where the softmax gives NaN.
"""

from __future__ import annotations

import functools
import math
import operator
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import fx

import fastlinear._tensors as _tensors
from fastlinear.graph.attention import joined
from fastlinear.graph.capture import changes, example, letters_of, op_of, same_shape, same_size, written
from fastlinear.graph.expansions import spelled_out
from fastlinear.graph.sinks import drops_last, sinks_beside
from fastlinear.graph.story import Story
from fastlinear.graph.tidying import VIEWS, only_reads
from fastlinear.layer import sdpa
from fastlinear.spec import attention

_NEVER = -1e9  # so much below others, a score has no weight, and scores that all are lowered by it are one number
_CASTS = {"to", "type", "float", "type_as", "half", "bfloat16"}
_FOLDS = {"view", "reshape"}
_ADDS, _MULTIPLIES, _DIVIDES = {"add", "iadd", "add_"}, {"mul", "imul", "mul_"}, {"div", "itruediv", "div_"}


class _Dot(NamedTuple):
    """x by y, turned to [..., I, E] and [..., J, E] by their orders; their product [..., I, J] is turned by `order`."""

    x: Any
    y: Any
    x_order: tuple[int, ...]
    y_order: tuple[int, ...]
    order: tuple[int, ...]


class _Mask(NamedTuple):
    """fill: the score of what is hidden, None where the mask is added. shows: whether it is true where there are scores
    left. outer, sizes: of scores that are viewed with other dimensions before their last two, these as the view is
    given them, and as they are."""

    node: fx.Node
    fill: float | None = None
    shows: bool = False
    outer: tuple[Any, ...] = ()
    sizes: tuple[Any, ...] = ()

    def of(self, view: fx.Node) -> _Mask | None:
        """The mask as one of what is viewed, by its last two dimensions alone; None where nothing tells the others."""
        y, own, (_, *sizes) = example(view), example(self.node), view.args
        given: Any = sizes[0] if len(sizes) == 1 else sizes
        if self.outer or y is None or own is None:
            return self
        outer = tuple(given[:-2])
        kept = [own.dim() == y.dim() and same_size(own.shape[i], y.shape[i]) for i, n in enumerate(outer) if n == -1]
        told = len(given) == y.dim() and all(kept)
        return self._replace(outer=outer, sizes=tuple(y.shape[:-2])) if told else None

    def fits(self, outer: Sequence[Any]) -> bool:
        """Whether its sizes become these, the first ones as one."""
        first = len(self.sizes) - len(outer) + 1
        if not self.outer or first < 1:
            return not self.outer
        return same_shape([math.prod(self.sizes[:first]), *self.sizes[first:]], outer)

    def viewed(self, mask: Any, outer: Any, dims: int) -> Any:
        """The mask of scores of so many dimensions; outer: what `outer` stands for."""
        known = example(self.node)
        mask = mask.unsqueeze(0) if known is not None and known.dim() == 1 else mask
        return mask.expand(*outer, -1, -1).flatten(0, len(outer) - dims + 2) if outer else mask

    def read(self, mask: Any, dtype: torch.dtype, is_only: bool) -> Any:
        """As attention takes the mask: to be added, in this dtype; or true where something is to be looked at, if there
        is no other one and what it hides has no score at all."""
        if self.fill is None:
            return mask
        hidden = mask.logical_not() if self.shows else mask
        if self.fill > -math.inf:
            return hidden.to(dtype) * self.fill
        return hidden.logical_not() if is_only else attention.additive(hidden, True, dtype)


class _Scores(NamedTuple):
    """nodes: all that make the scores, the last one first; factors: tensors that they are multiplied by before they are
    capped and masked, one number for each head; cap: of the scores, before they are masked; sinks: one for each
    head."""

    dot: _Dot
    scale: float
    masks: tuple[_Mask, ...]
    nodes: tuple[fx.Node, ...]
    factors: tuple[fx.Node, ...] = ()
    cap: float | None = None
    sinks: fx.Node | None = None


def join(graph: fx.Graph, story: Story) -> None:
    """Puts torch's attention in the place of all that a graph spells out."""
    dense: dict[fx.Node, fx.Node] = {}
    for root in list(graph.nodes):
        values = _by_values(root)
        found = None if values is None else _weights(values.x)
        if values is None or found is None or not _is_alone(root, found) or not _fits(root, found, values):
            continue
        masks = [(_dense(mask.node, dense, root), mask.outer) for mask in found.masks]
        given = (found.dot.x, found.dot.y, values.y, masks, found.factors, found.sinks)
        result, parts = spelled_out(graph, root, _plain(found, values, joined(root) is not None), given)
        node = next(each for each in parts if op_of(each) == "scaled_dot_product_attention")
        root.replace_all_uses_with(result.node)
        story.rename(root, node, "")
        story.add(node, (each for each in parts if each is not node))
        for each in (root, *found.nodes):
            if each is not root:
                story.tell(each, "fused", f"into {node.name}", node)
            graph.erase_node(each)


def _dense(mask: fx.Node, known: dict[fx.Node, fx.Node], root: fx.Node) -> fx.Node:
    """A mask whose last dimension lies side by side, as a bias of positions does not that is turned from [L, S, H]: one
    copy for all layers that read it, unless somebody writes to it; then one for `root`."""
    t = example(mask)
    if t is None or t.stride(-1) == 1 or t.shape[-1] == 1:
        return mask
    shared = not any(map(changes, mask.users))
    if not shared or mask not in known:
        with mask.graph.inserting_after(mask) if shared else mask.graph.inserting_before(root):
            known[mask] = mask.graph.call_method("contiguous", (mask,))
        known[mask].meta = {**mask.meta, "example_value": t.contiguous()}
    return known[mask]


def _plain(found: _Scores, values: _Dot, is_joined: bool) -> Any:
    """attend(q, k, v, masks, factors, sinks): the same in one function. is_joined: whether what reads it joins heads,
    so that it shows nowhere in which order they lie."""

    def attend(q: Any, k: Any, v: Any, masks: Any, factors: Any, sinks: Any) -> Any:
        heads = [t.permute(order) for t, order in ((q, found.dot.x_order), (k, found.dot.y_order), (v, values.y_order))]
        alone = len(values.order) == 3
        mask = _mask(list(zip(masks, found.masks, strict=True)), alone, example(q.node))
        heads[0] = functools.reduce(operator.mul, factors, heads[0])
        q, k, v = (t.unsqueeze(1) for t in heads) if alone else heads
        if found.cap is not None or sinks is not None:
            y = sdpa.OP(q, k, v, mask, scale=found.scale, sinks=sinks, cap=found.cap)
        else:
            y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=found.scale)
        y = (y.squeeze(1) if alone else y).permute(values.order)
        return y if is_joined else y.contiguous()

    return attend


def _mask(given: list[tuple[Any, _Mask]], alone: bool, query: Any) -> Any:
    """All masks as one: bool, true where something is to be looked at, or added in the dtype of query."""
    masks = []
    for (mask, outer), how in given:
        known = example(how.node)
        assert known is not None
        mask = how.viewed(mask, outer, 3 if alone else 4)
        mask = mask.unsqueeze(1) if alone and (outer or known.dim() == 3) else mask
        masks.append(how.read(mask, query.dtype, is_only=len(given) == 1))
    return sum(masks[1:], masks[0]) if masks else None


def _by_values(node: fx.Node) -> _Dot | None:
    """Weights by v."""
    if (letters := letters_of(node)) is None:
        return _matmul(node, keys=False)
    a, b, out = letters
    summed = [c for c in a if c in b and c not in out]
    rows, columns = [c for c in a if c not in b], [c for c in b if c not in a]
    if not all(len(each) == 1 for each in (summed, rows, columns)):
        return None
    outer = [c for c in a if c in b and c in out]
    whole = [*outer, *rows, *columns]
    if [*a] != [*outer, *rows, *summed] or sorted(out) != sorted(whole) or len(b) != len(whole):
        return None
    orders = [_order(b, [*outer, *summed, *columns]), _order(whole, out)]
    return _Dot(node.args[1], node.args[2], tuple(range(len(a))), *orders)


def _by_keys(node: fx.Node) -> _Dot | None:
    """q by k."""
    if (letters := letters_of(node)) is None:
        return _matmul(node, keys=True)
    a, b, out = letters
    summed = [c for c in a if c in b and c not in out]
    outer, ends = [*out[:-2]], [*out[-2:]]
    x, y = [*outer, *ends[:1], *summed], [*outer, *ends[1:], *summed]
    if len(summed) != 1 or sorted(x) != sorted(a) or sorted(y) != sorted(b):
        return None
    return _Dot(node.args[1], node.args[2], _order(a, x), _order(b, y), tuple(range(len(out))))


def _matmul(node: fx.Node, keys: bool) -> _Dot | None:
    """Of a matmul. keys: whether the right one lies as [..., E, J]."""
    if op_of(node) not in ("matmul", "bmm") or node.kwargs or len(node.args) != 2:
        return None
    x, y = (example(each) for each in node.args)
    if x is None or y is None or x.dim() != y.dim():
        return None
    same = tuple(range(x.dim()))
    turned = (*same[:-2], same[-1], same[-2])
    return _Dot(*node.args, same, turned if keys else same, same)


def _order(letters: Any, wanted: Any) -> tuple[int, ...]:
    return tuple([*letters].index(c) for c in wanted)


def _weights(node: Any) -> _Scores | None:
    """What weights of the last dimension come from."""
    before, beside = [], False
    while isinstance(node, fx.Node) and (op_of(node) in _CASTS or _is_fold(node) or (drops_last(node) and not beside)):
        before.append(node)
        beside = beside or drops_last(node)
        node = node.args[0]
    if not isinstance(node, fx.Node) or op_of(node) != "softmax":
        return None
    dim, made = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim"), example(node)
    if made is None or dim not in (-1, made.dim() - 1):
        return None
    before, x = [*before, node], node.args[0] if node.args else node.kwargs.get("input")
    if not beside:
        return _scores(x, 1.0, (), tuple(before))
    if (sinks := sinks_beside(x)) is None:
        return None
    found = _scores(sinks.scores, 1.0, (), (*before, *sinks.nodes))
    return None if found is None else found._replace(sinks=sinks.numbers)


def _scores(
    node: Any,
    scale: float,
    masks: tuple[_Mask, ...],
    nodes: tuple[fx.Node, ...],
    factors: tuple[fx.Node, ...] = (),
    cap: float | None = None,
) -> _Scores | None:
    """nodes, masks, scale, factors, cap: what was found behind this node; masks are not multiplied, nor capped."""
    if not isinstance(node, fx.Node):
        return None
    dot, nodes = _by_keys(node), (*nodes, node)
    may_mask = scale == 1.0 and not factors and cap is None
    if dot is None and may_mask and (added := _added_to(node)) is not None:
        dot, scale, more = added
        masks = (*masks, *more)
    if dot is not None:
        (x, of_x), (y, of_y) = _scaled(dot.x), _scaled(dot.y)
        passed = [each for each in (dot.x, dot.y) if each not in (x, y)]
        scale *= of_x * of_y * (cap or 1.0)
        return _Scores(dot._replace(x=x, y=y), scale, masks, (*nodes, *passed), factors, cap)
    if op_of(node) in _CASTS:
        return _scores(node.args[0], scale, masks, nodes, factors, cap)
    if op_of(node) == "tanh":  # of what the cap divides, which it multiplies
        return None if factors or cap is not None else _scores(node.args[0], 1.0, masks, nodes, (), scale)
    if _is_fold(node):
        viewed = [known for mask in masks if (known := mask.of(node)) is not None]
        fits = not factors and len(viewed) == len(masks)
        return _scores(node.args[0], scale, tuple(viewed), nodes, (), cap) if fits else None
    if (found := _scaling(node)) is not None:
        return _scores(found[0], scale * found[1], masks, nodes, factors, cap)
    for inner, factor in _multiplied(node):
        if (whole := _scores(inner, scale, masks, nodes, (*factors, factor), cap)) is not None:
            return whole
    for inner, mask in _masked(node) if may_mask else ():
        if (whole := _scores(inner, scale, (*masks, mask), nodes)) is not None:
            return whole
    return None


def _is_fold(node: fx.Node) -> bool:
    """Whether a node views scores with other dimensions before the last two."""
    x, y = example(node.args[0]) if node.args else None, example(node)
    if op_of(node) not in _FOLDS or x is None or y is None or min(x.dim(), y.dim()) < 3:
        return False
    return same_shape(x.shape[-2:], y.shape[-2:])


def _added_to(node: fx.Node) -> tuple[_Dot, float, list[_Mask]] | None:
    """The products that baddbmm adds to something, by which number they are multiplied, and what that is."""
    given: dict[str, Any] = {"beta": 1, "alpha": 1, **dict(zip(_BADDBMM, node.args, strict=False)), **node.kwargs}
    if op_of(node) != "baddbmm" or not {*_BADDBMM} <= {*given} or given["beta"] not in (0, 1):
        return None
    x, y = given["batch1"], given["batch2"]
    if not isinstance(given["alpha"], (int, float)) or not given["alpha"] > 0:
        return None
    masks = [_Mask(given["input"])] if given["beta"] == 1 else []
    return _Dot(x, y, (0, 1, 2), (0, 2, 1), (0, 1, 2)), float(given["alpha"]), masks


_BADDBMM = ("input", "batch1", "batch2")


def _multiplied(node: fx.Node) -> Iterator[tuple[Any, fx.Node]]:
    """What may be scores that a node multiplies by a tensor of a number for each head, with that."""
    if op_of(node) not in _MULTIPLIES or node.kwargs or len(node.args) != 2:
        return
    for scores, factor in (node.args, node.args[::-1]) if op_of(node) == "mul" else (node.args,):
        s, f, y = (example(each) for each in (scores, factor, node))
        if s is None or f is None or y is None or not same_shape(s.shape, y.shape) or f.dtype is not s.dtype:
            continue
        if f.dim() in range(2, s.dim() + 1) and f.shape[-2:] == (1, 1):
            yield scores, factor  # type: ignore[misc]


def _scaling(node: Any) -> tuple[Any, float] | None:
    """What a node multiplies, and by which number; None where it does something else."""
    op = op_of(node)
    if op not in _MULTIPLIES | _DIVIDES or node.kwargs or len(node.args) != 2:
        return None
    x, number = node.args if isinstance(node.args[0], fx.Node) or op != "mul" else reversed(node.args)
    if not isinstance(number, (int, float)) or isinstance(number, bool) or not number > 0:
        return None
    return x, float(number) if op in _MULTIPLIES else 1 / number


def _scaled(node: Any) -> tuple[Any, float]:
    """What a factor of a product is multiplied from for it alone, and by which number."""
    found = _scaling(node) if isinstance(node, fx.Node) and len(node.users) == 1 and not changes(node) else None
    return (node, 1.0) if found is None else found


def _masked(node: fx.Node) -> Iterator[tuple[Any, _Mask]]:
    """What may be the scores that a node hides some of, with the mask."""
    args: tuple[Any, ...] = node.args
    op, given = op_of(node), list[tuple[Any, Any, float | None, bool]]()
    if op in _ADDS and len(args) == 2:
        given = [(scores, mask, None, False) for scores, mask in ((args, args[::-1]) if op == "add" else (args,))]
    elif op in ("masked_fill", "masked_fill_") and len(args) == 3 and _hides(args[2]):
        given = [(args[0], args[1], float(args[2]), False)]
    elif op == "where" and len(args) == 3 and _hides(args[2]):
        given = [(args[1], args[0], float(args[2]), True)]
    for scores, mask, fill, shows in given if not node.kwargs else ():
        s, m, y = (example(each) for each in (scores, mask, node))
        if s is None or m is None or y is None or m.dim() == 0 or not same_shape(s.shape, y.shape):
            continue
        if (m.dtype is torch.bool) == (fill is not None):
            yield scores, _Mask(mask, fill, shows)


def _hides(number: Any) -> bool:
    return isinstance(number, (int, float)) and number <= _NEVER


def _is_alone(root: fx.Node, found: _Scores) -> bool:
    """Whether nothing but these nodes reads what is between, and none but these writes meanwhile to what was read."""
    inside = {root, *found.nodes}
    if any(user not in inside for node in found.nodes for user in node.users):
        return False
    left, node = set(found.nodes), root
    while left:
        node = node.prev
        if node not in inside and changes(node):
            touched = _touched(node)
            if touched is None or not touched.isdisjoint(each for before in left for each in before.all_input_nodes):
                return False
        left.discard(node)
    return True


def _touched(write: fx.Node) -> set[fx.Node] | None:
    """The nodes whose values may lie where a node writes; None where these may be any."""
    base = written(write)
    while base is not None and op_of(base) in VIEWS:
        base = base.args[0] if isinstance(base.args[0], fx.Node) else None
    if base is None or base.op not in ("call_function", "call_method"):
        return None
    if not all(only_reads(base, each) for each in base.all_input_nodes):
        return None
    reached = [base]
    for node in reached:
        reached += [user for user in node.users if user not in reached and not only_reads(user, node)]
    return set(reached)


def _fits(root: fx.Node, found: _Scores, values: _Dot) -> bool:
    """Whether torch's attention takes all tensors, and none is broadcast that it would not."""
    dot, masks = found.dot, [example(mask.node) for mask in found.masks]
    q, k, v, y, s = (example(each) for each in (dot.x, dot.y, values.y, root, values.x))
    if q is None or k is None or v is None or y is None or s is None or y.dim() not in (3, 4):
        return False
    floating = q.dtype in _tensors.FORMATS and q.dtype is k.dtype is v.dtype is y.dtype
    if not floating or any(t.device.type != "cpu" or t.is_nested or t.dim() != y.dim() for t in (q, k, v)):
        return False
    if any(m is None or m.dtype not in (torch.bool, torch.float32, q.dtype) for m in masks):
        return False
    orders = ((q, dot.x_order), (k, dot.y_order), (v, values.y_order))
    (*outer, rows, size), keys, kept = ([t.shape[i] for i in order] for t, order in orders)
    viewed = all(mask.fits(outer) for mask in found.masks)
    if (found.sinks is not None or found.cap is not None) and not same_size(kept[-1], size):
        return False  # other sizes are torch's alone
    return viewed and (
        same_shape(keys[:-2], outer) and same_shape(kept[:-2], outer) and same_shape(keys[-2:-1], kept[-2:-1])
        and same_shape(s.shape, (*outer, rows, keys[-2])) and same_shape([size], keys[-1:])
    )  # fmt: skip
