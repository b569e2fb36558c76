"""Values that weights, buffers and sizes alone decide, such as embeddings of positions: each is kept from call to call,
and computed again when one of these is not what it was.

Of a weight its fingerprint tells (see _fingerprints), of a buffer of integers torch's count of its changes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any
from weakref import ref

import torch
from torch import Tensor, fx

from fastlinear._fingerprints import Fingerprint
from fastlinear._modes import watched
from fastlinear.graph.capture import Capture, changes, example, op_of
from fastlinear.graph.story import Story
from fastlinear.graph.tidying import COMPUTED, MADE, MOST, VIEWS, leave_what_is_shared

_SIZES = 8  # combinations of sizes that a value is kept for
_ELEMENTWISE = {"abs", "cos", "div", "exp", "float", "log", "max", "maximum", "min", "minimum", "neg", "pow", "sin"}
_WORK = MADE | COMPUTED | _ELEMENTWISE | {"cat", "embedding", "gather", "masked_fill", "stack", "where"}
_WHY = "it is kept as long as the weights, buffers and sizes that decide it stay"

Holds = Callable[[Tensor], bool]


def remember(capture: Capture, story: Story) -> None:
    """Puts values that are kept in the place of what computes them in each call. Those that the graph writes to, or
    that others may write to, are not."""
    graph = capture.graph
    tensors = {node for node in graph.nodes if capture.is_of_a_module(node) and not _is_written(node)}
    sizes = {node for node in graph.nodes if type(node.meta.get("example_value")) in (int, torch.SymInt)}
    known = tensors | sizes | {node for node in graph.nodes if node.op == "get_attr" and node not in capture.values}
    decided: dict[fx.Node, Any] = {}  # in the order of the graph
    for node in graph.nodes:
        if _is_decided(node) and all(each in known or each in decided for each in node.all_input_nodes):
            decided[node] = True
    leave_what_is_shared(decided)
    roots = [node for node in decided if any(user not in decided for user in node.users)]
    gone: set[fx.Node] = set()
    for root in roots:
        chain = _before(root, decided)
        leaves = list(dict.fromkeys(each for node in chain for each in node.all_input_nodes if each not in decided))
        given = [*filter(tensors.__contains__, leaves), *filter(sizes.__contains__, leaves)]
        if not given or not any(op_of(node) in _WORK for node in chain):
            continue
        compute = _compute(capture.module, given, leaves, chain)
        with graph.inserting_before(root):
            kept = graph.call_function(function(compute, sum(each in tensors for each in given)), tuple(given))
        kept.meta = dict(root.meta)
        root.replace_all_uses_with(kept, delete_user_cb=lambda user: user not in decided)
        gone.update(chain)
    for node in reversed(decided):
        if node in gone and not node.users:
            story.tell(node, "dropped", _WHY)
            graph.erase_node(node)


def function(compute: Callable[..., Tensor], tensors: int) -> Callable[..., Tensor]:
    """What stands in a graph for a value of so many tensors, and of sizes after them."""
    known: dict[tuple[int, ...], tuple[list[Holds], Tensor]] = {}

    def kept(*given: Any) -> Tensor:
        decisive, sizes = given[:tensors], given[tensors:]
        found = known.get(sizes)
        if found is not None and all(holds(tensor) for holds, tensor in zip(found[0], decisive, strict=True)):
            return found[1]
        if watched():
            return compute(*given)
        known.pop(sizes, None)
        holds = [_held(tensor) for tensor in decisive]  # before it is read, so that no change in between is missed
        with torch.inference_mode(False), torch.no_grad():
            value = compute(*given)
        if None not in holds and value.numel() <= MOST:
            while len(known) >= _SIZES:
                known.pop(next(iter(known)), None)
            known[sizes] = ([each for each in holds if each is not None], value)
        return value

    return kept


def _held(tensor: Tensor) -> Holds | None:
    """Tells of a tensor whether it still is what this one is now; None where nothing can."""
    if tensor.is_floating_point():
        try:
            return Fingerprint(tensor).fits
        except TypeError:
            return None
    if tensor.is_inference():
        return None
    known, version = ref(tensor), tensor._version
    return lambda now: now is known() and now._version == version


def _is_decided(node: fx.Node) -> bool:
    """Whether a node's value is decided by what it is called with, and is made by nothing else."""
    if op_of(node) not in _WORK | VIEWS or changes(node) or node.op not in ("call_function", "call_method"):
        return False
    made = example(node)
    if made is None or made.device.type != "cpu":
        return False
    scales = op_of(node) == "embedding" and ((len(node.args) > 3 and node.args[3]) or node.kwargs.get("max_norm"))
    return not scales  # which would write to its weight


def _is_written(node: fx.Node) -> bool:
    """Whether the graph may write to the memory of a node's value."""
    reached = [node]
    for each in reached:
        if any(changes(user) for user in each.users):
            return True
        reached += [user for user in each.users if op_of(user) in VIEWS | {"to", "contiguous"} and user not in reached]
    return False


def _before(root: fx.Node, decided: Iterable[fx.Node]) -> list[fx.Node]:
    """The nodes that compute a root, in their order."""
    needed = {root}
    among = list(decided)
    for node in reversed(among):
        if node in needed:
            needed.update(node.all_input_nodes)
    return [node for node in among if node in needed]


def _compute(
    module: fx.GraphModule, given: Iterable[fx.Node], leaves: Iterable[fx.Node], chain: list[fx.Node]
) -> Callable[..., Tensor]:
    """The last node's value as a function of these."""
    graph = fx.Graph()
    copies = {node: graph.placeholder(node.name) for node in given}
    for node in (*(leaf for leaf in leaves if leaf not in copies), *chain):
        copies[node] = graph.node_copy(node, copies.__getitem__)
    graph.output(copies[chain[-1]])
    return fx.GraphModule(module, graph).forward
