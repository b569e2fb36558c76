"""What a graph of Dynamo's says: which op a node is, in one spelling, what it may change, which tensors are weights.

Dynamo hands over torch's own functions and Tensor's methods as the model's code spelled them: x + y, torch.add(x, y),
x.add(y). A pattern is written once, over the names given here.
"""

from __future__ import annotations

import inspect
import operator
import re
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

import fastlinear._torch as _torch
from fastlinear.layer import sdpa
from fastlinear.spec import activations
from fastlinear.spec.activations import Activation

ALL = slice(None, None, None)  # [:], as graphs have it

# Spellings of what patterns ask for that do not carry the name of their Tensor method.
_SPELLINGS: dict[Any, str] = {
    operator.truediv: "div",
    _torch.nn_gelu: "gelu",
    _torch.nn_linear: "linear",
    torch.ops.fastlinear.linear.default: "fastlinear",
    sdpa.OP: "scaled_dot_product_attention",  # with sinks and a cap
}

# What changes how the nodes after it run, so that nothing may be moved over it.
_MODES = {
    _torch.set_grad_enabled,
    _torch.enter_autocast,
    _torch.exit_autocast,
}

_IN_PLACE = {operator.setitem, operator.delitem} | {
    getattr(operator, "i" + name.rstrip("_")) for name in dir(operator) if hasattr(operator, "i" + name.rstrip("_"))
}


def op_of(node: fx.Node) -> str:
    """The name of what a node does, the same for a function, an operator and a method: "add", "linear"; "" for nodes
    that do nothing (inputs, the output)."""
    if node.op == "call_method":
        return str(node.target)
    if node.op != "call_function":
        return ""
    found = _SPELLINGS.get(node.target)
    if found is None:
        found = str(getattr(node.target, "__name__", node.target))
    return found.removesuffix(".default")


def is_part(node: fx.Node) -> bool:
    """Whether a node is rows of a parameter, which `parts` has cut."""
    return op_of(node) == "getitem" and isinstance(node.args[0], fx.Node) and op_of(node.args[0]) == "cut"


def parameter_of(node: fx.Node) -> fx.Node:
    """The parameter that a node is, or is rows of."""
    return node.args[0].args[0] if is_part(node) else node  # type: ignore[union-attr, return-value]


def activation_of(node: fx.Node) -> Activation | None:
    """The activation that a node applies to its first argument; None for anything else."""
    target = getattr(Tensor, node.target, None) if isinstance(node.target, str) else node.target
    if node.op not in ("call_function", "call_method") or not node.args or not isinstance(node.args[0], fx.Node):
        return None
    return activations.called(target, node.args[1:], node.kwargs)


def changes(node: fx.Node) -> bool:
    """Whether a node may write to its arguments, or change how later nodes run: nothing is moved over it."""
    if node.op in ("placeholder", "get_attr", "output"):
        return False
    if node.op == "call_method":
        return _is_in_place(str(node.target))
    if node.op != "call_function" or node.target in _MODES:
        return True
    if node.target is getattr:  # x.mT, x.shape
        return False
    target: Any = node.target
    if isinstance(target, _torch.OpOverload):
        return bool(target._schema.is_mutable)
    if getattr(target, "__module__", "") == "_operator":
        return target in _IN_PLACE
    module = str(getattr(target, "__module__", None) or "torch")
    if module.startswith(("fastlinear.graph.", "fastlinear.spec.")):
        return False  # ours write to what nobody else reads
    if not module.startswith("torch"):
        return True  # nobody knows
    return _is_in_place(target.__name__) or node.kwargs.get("out") is not None or _argument(node, "inplace") is True


def written(node: fx.Node) -> fx.Node | None:
    """The one tensor that a node writes to, of those that `changes` is true of; None where nobody knows that."""
    alone = node.op == "call_method" or node.target in _IN_PLACE or _argument(node, "inplace") is True
    given = node.args[0] if alone and node.args and node.kwargs.get("out") is None else None
    return given if isinstance(given, fx.Node) else None


def _is_in_place(name: str) -> bool:
    return (name.endswith("_") and not name.endswith("__")) or name == "__setitem__"


def _argument(node: fx.Node, name: str) -> Any:
    """What a torch function written in Python is given as the argument of this name; None where it has none."""
    if name in node.kwargs:
        return node.kwargs[name]
    if inspect.isfunction(node.target):
        names = list(inspect.signature(node.target).parameters)
        if name in names and names.index(name) < len(node.args):
            return node.args[names.index(name)]
    return None


def is_training(node: fx.Node) -> bool:
    """Whether a node does what only a model in training mode does: drop out, or normalize by the batch it sees."""
    return op_of(node) in ("dropout", "batch_norm") and _argument(node, "training") is True


def wants_grad(node: fx.Node) -> bool:
    """Whether the graph turns gradients on by this node."""
    return node.target is _torch.set_grad_enabled and node.args[:1] == (True,)


def same_as(node: fx.Node) -> Any:
    """What a node returns as it is, by its own contract; None where it makes something else."""
    if node.op not in ("call_function", "call_method"):
        return None
    return node.args[0] if _is_idle(node) else _undone(node)


def _is_idle(node: fx.Node) -> bool:
    """Whether a node returns its first argument."""
    if not node.args or not isinstance(node.args[0], fx.Node):
        return False
    name = op_of(node)
    if name == "dropout":
        return node.target is F.dropout and _argument(node, "training") is False
    x, y = example(node.args[0]), example(node)
    if x is None or y is None or x.dtype is not y.dtype or x.device != y.device:
        return False
    if name in ("to", "float", "half", "bfloat16", "type_as"):
        copies = node.kwargs.get("copy") or node.kwargs.get("memory_format")
        return not (copies or any(arg is True for arg in node.args[2:]))
    if name == "contiguous":
        return len(node.args) == 1 and not node.kwargs and is_contiguous(x)
    if name in ("view", "reshape", "expand"):  # an alias of the same sizes, of which nobody may ask whether it is x
        return same_shape(x.shape, y.shape) and all(user.op != "output" for user in node.users)
    return False


def _undone(node: fx.Node) -> fx.Node | None:
    """What a node that is the transpose of a transpose is; None for any other node."""
    turn, inner = turn_of(node), node.args[0] if node.args else None
    before: Any = turn_of(inner) if turn and isinstance(inner, fx.Node) else ()
    if not before or any(before[i] != at for at, i in enumerate(turn)):
        return None
    source: Any = inner.args[0]  # type: ignore[union-attr]
    # Of an input an alias is returned, as the model does.
    kept = source.op != "placeholder" or all(user.op != "output" for user in node.users)
    return source if kept else None


def turn_of(node: fx.Node) -> tuple[int, ...]:
    """Where the dimensions of what transposes a tensor come from; empty for any other node."""
    given: list[Any] = [*node.args[1:]]
    x = example(node.args[0]) if node.args else None
    if op_of(node) not in ("permute", "transpose") or node.kwargs or x is None or x.dim() == 0:
        return ()
    order: Any = given[0] if len(given) == 1 else given
    if not isinstance(order, (tuple, list)) or not all(isinstance(d, int) for d in order):
        return ()
    places = [d % x.dim() for d in order]
    if op_of(node) == "permute":
        return tuple(places)
    a, b = places
    return tuple({a: b, b: a}.get(d, d) for d in range(x.dim()))


def letters_of(node: fx.Node) -> tuple[str, str, str] | None:
    """What an einsum of two tensors calls its dimensions."""
    if op_of(node) != "einsum" or node.kwargs or len(node.args) != 3 or not isinstance(node.args[0], str):
        return None
    given, arrow, out = node.args[0].replace(" ", "").partition("->")
    a, comma, b = given.partition(",")
    fit = all(each.isalpha() and len({*each}) == len(each) for each in (a, b, out))
    return (a, b, out) if arrow and comma and fit else None


def is_contiguous(x: Tensor) -> bool:
    """Whether a fake tensor is, for every input that the graph is run on."""
    expected: Any = 1
    for size, stride in zip(reversed(x.shape), reversed(x.stride()), strict=True):
        if not same_size(size, 1):
            if not same_size(stride, expected):
                return False
            expected = expected * size
    return True


def example(node: Any) -> Tensor | None:
    """The fake tensor that Dynamo traced a node with; None where there is none, or it is no tensor."""
    value = node.meta.get("example_value") if isinstance(node, fx.Node) else None
    return value if isinstance(value, Tensor) else None


def same_size(a: Any, b: Any) -> bool:
    """Whether two sizes are equal for every input that the graph is run on."""
    return bool(torch.fx.experimental.symbolic_shapes.statically_known_true(a == b))


def same_shape(a: Sequence[Any], b: Sequence[Any]) -> bool:
    return len(a) == len(b) and all(map(same_size, a, b))


class Capture:
    """A graph, and the tensors behind those of its nodes that stand for parameters.

    values: of the nodes that are Parameters, rows of these, or packed bytes of frozen layers, the real tensors; rows:
    which, of nodes that are rows.
    """

    def __init__(self, module: fx.GraphModule, inputs: Sequence[Any]) -> None:
        self.module, self.graph = module, module.graph
        placeholders = [node for node in module.graph.nodes if node.op == "placeholder"]
        self.inputs = dict(zip(placeholders, inputs, strict=True))
        self.values: dict[fx.Node, Tensor] = {}
        self.rows: dict[fx.Node, range] = {}
        for node in module.graph.nodes:
            value = self.inputs.get(node) if node.op != "get_attr" else _attribute(module, str(node.target))
            frozen = name_of_source(node).endswith("_frozen.panels")
            if type(value) is nn.Parameter or (type(value) is Tensor and frozen):
                self.values[node] = value

    def is_of_a_module(self, node: fx.Node) -> bool:
        """Whether a node stands for a parameter or a buffer."""
        return node in self.values or (node.op == "placeholder" and "._buffers[" in name_of_source(node))

    def label_of(self, node: fx.Node, weight: fx.Node) -> str:
        """The same for people: a parameter of the model itself, and rows of any, by the parameter's name."""
        whole, (path, cls) = parameter_of(weight), _innermost(node)
        if _is_linear(cls) and whole is weight:
            return path
        holder = _holder(whole)
        if whole is weight and holder:
            return holder
        own = ".".join(filter(None, (holder, _own_name(whole))))
        rows = self.rows.get(weight)
        return own if rows is None else f"{own}[{rows.start}:{rows.stop}]"

    def name_of(self, node: fx.Node, weight: fx.Node) -> str:
        """What the model calls the linear layer that a node is the call of: "encoder.layer.0.output.dense"; that which
        holds the weight, where the node is no layer's own; "" where either is the model itself."""
        path, cls = _innermost(node)
        return path if _is_linear(cls) else _holder(parameter_of(weight))

    def other_holder(self, node: fx.Node, weight: fx.Node) -> str | None:
        """The class of the module that runs a node on a weight of its own, where that is no layer that convert knows,
        as a router of experts is none."""
        path, cls = _innermost(node)
        if cls is None or _is_linear(cls) or issubclass(cls, nn.MultiheadAttention):
            return None
        return cls.__name__ if path == _holder(parameter_of(weight)) else None

    def classes_of(self, node: fx.Node) -> Iterator[type]:
        """The classes of the modules within whose forward a node runs, the innermost last."""
        for _, cls in (node.meta.get("nn_module_stack") or {}).values():
            if isinstance(cls, type):
                yield cls


def _innermost(node: fx.Node) -> tuple[str, type | None]:
    """The name and the class of the module whose forward a node runs in."""
    path, cls = next(reversed((node.meta.get("nn_module_stack") or {"": ("", None)}).values()))
    return re.sub(r"^\w\['[^']*'\]\.?", "", path), cls if isinstance(cls, type) else None


def _is_linear(cls: type | None) -> bool:
    return cls is not None and (issubclass(cls, nn.Linear) or cls.__name__ in ("Conv1D", "FastConv1D"))


def _holder(weight: fx.Node) -> str:
    """What the model calls the module that holds a weight."""
    if weight.op == "get_attr":
        return ".".join(str(weight.target).split(".")[:-1])
    return ".".join(re.findall(r"\._modules\['([^']*)'\]", name_of_source(weight)))


def _own_name(weight: fx.Node) -> str:
    """What the module that holds a weight calls it; the node's name where no module does."""
    if weight.op == "get_attr":
        return str(weight.target).split(".")[-1]
    found = re.search(r"\._parameters\['([^']*)'\]$", name_of_source(weight))
    return weight.name if found is None else found[1]


def source_of(node: fx.Node) -> Any:
    """Where Dynamo found an input; None where it does not say."""
    return getattr(node.meta.get("grapharg"), "source", None)


def name_of_source(node: fx.Node) -> str:
    """The same as an expression of Python's; empty where it does not say."""
    name = getattr(source_of(node), "name", "")
    return str(name() if callable(name) else name)


def _attribute(module: Any, path: str) -> Any:
    for name in path.split("."):
        module = getattr(module, name, None)
    return module
