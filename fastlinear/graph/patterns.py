"""The table of what products of a graph may absorb.

A product is a linear layer in any spelling; an absorption is a node that may follow it, and what the product then is.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx

import fastlinear._tensors as _tensors
from fastlinear.graph.capture import (
    Capture,
    activation_of,
    example,
    is_part,
    op_of,
    same_shape,
    same_size,
)
from fastlinear.layer.form import Form
from fastlinear.spec import programs
from fastlinear.spec.activations import Activation
from fastlinear.spec.programs import Step


@dataclass
class Product:
    """One linear layer of the graph and what it has absorbed: `root` is the node whose value it computes.

    activation: the whole epilogue program, of which `operands` are the tensors. form: that of the op
    fastlinear::linear, where the model was converted; None where it is torch's own linear.
    """

    root: fx.Node
    x: fx.Node
    weight: fx.Node
    bias: fx.Node | None
    transposed: bool = False
    activation: Activation | None = None
    form: Form | None = None
    nodes: list[fx.Node] = field(default_factory=list)  # all that it stands for, the root last
    operands: tuple[fx.Node, ...] = ()

    def with_bias_added(self) -> Product | None:
        """The product without a bias, whose first step adds it as an operand, for one that is computed in each call;
        None where that is another thing."""
        y, bias = example(self.root), example(self.bias)
        fit = y is not None and bias is not None and bias.dtype is y.dtype and bias.dim() == 1 and _is_dense(bias)
        if not fit or self.form is not None or self.operands or self.activation is not None:
            return None
        grown = replace(self, bias=None).absorbed(self.root, Step("add"), self.bias)
        return None if grown is None else replace(grown, nodes=self.nodes)

    def absorbed(self, node: fx.Node, step: Step, operand: fx.Node | None = None) -> Product | None:
        """The product with one step more, whose operand is the value of a node; None where a program has no room, or
        ends in integers."""
        steps = () if self.activation is None else programs.steps_of(self.activation)
        if len(steps) == programs.MAX_STEPS or (self.form is not None and self.form.out is not None):
            return None
        more = () if operand is None else (operand,)
        step = step if operand is None else step._replace(operand=len(self.operands))
        program, operands = programs.spelled([*steps, step]), (*self.operands, *more)
        return replace(self, root=node, activation=program, operands=operands, nodes=[*self.nodes, node])


def product_at(node: fx.Node) -> Product | None:
    """The linear layer that starts with this node; None where none does."""
    reader = _READERS.get(op_of(node))
    return None if reader is None else reader(node)


def is_multiplied(user: fx.Node) -> bool:
    """Whether a node that reads a weight is a linear layer, or cuts or turns the weight for such alone."""
    passes = op_of(user) == "cut" or is_part(user) or _turned(user) is not None
    return product_at(user) is not None or (passes and all(map(is_multiplied, user.users)))


def _linear(node: fx.Node) -> Product | None:
    given: dict[str, Any] = dict(zip(("input", "weight", "bias"), node.args, strict=False)) | node.kwargs
    return _checked(Product(node, given["input"], given["weight"], given.get("bias"), nodes=[node]))


def _addmm(node: fx.Node) -> Product | None:
    """addmm(bias, x, weight.t()), and that of transformers' Conv1D, whose weight is turned already: x.view(-1, K),
    addmm(bias, x, weight), .view of its rows as they were."""
    if node.kwargs or len(node.args) != 3:
        return None
    bias, x, weight = _any(node.args)
    turned = _turned(weight)
    whole = weight if turned is None else turned
    found = _checked(Product(node, x, whole, bias, transposed=turned is None, nodes=[node]))
    users = list(node.users)
    if found is None or op_of(found.x) != "view" or len(users) != 1 or op_of(users[0]) != "view":
        return found
    source, (back,) = _any(found.x.args)[0], users
    before, rows, after = example(source), example(found.x), example(back)
    if before is None or rows is None or after is None or rows.dim() != 2:
        return found
    kept = same_size(before.shape[-1], rows.shape[-1]) and same_shape(before.shape[:-1], after.shape[:-1])
    return replace(found, root=back, x=source, nodes=[node, back]) if kept else found


def _matmul(node: fx.Node) -> Product | None:
    """x @ weight.T, or x @ weight of a parameter [K, N]; a bias is an operand of the next step."""
    if node.kwargs or len(node.args) != 2:
        return None
    x, given = _any(node.args)
    turned = _turned(given)
    if turned is None and not _is_given(given):
        return None
    weight = given if turned is None else turned
    return _checked(Product(node, x, weight, None, transposed=turned is None, nodes=[node]))


def _is_given(node: Any) -> bool:
    """Whether a node is a matrix that the graph is given, or rows of one, and nothing that it computes."""
    if not isinstance(node, fx.Node) or not (is_given(node) or is_part(node) or _is_flat(node)):
        return False
    shape = example(node)
    return shape is not None and shape.dim() == 2


def is_given(node: Any) -> bool:
    """Whether a node is what the graph is called with, or holds."""
    return isinstance(node, fx.Node) and node.op in ("placeholder", "get_attr")


def _is_flat(node: fx.Node) -> bool:
    """Whether a node is what the graph is given, all dimensions but the first as one."""
    return op_of(node) == "flatten" and node.args[1:] == (1,) and is_given(node.args[0])


def _turned(node: Any) -> fx.Node | None:
    """What a node is the transpose of, if that has two dimensions."""
    if not isinstance(node, fx.Node) or node.kwargs or node.args[1:] not in _TURNS.get(op_of(node), ()):
        return None
    (source, *_), shape = node.args, example(node)
    return source if shape is not None and shape.dim() == 2 else None  # type: ignore[return-value]


_TURNS: dict[str, Any] = {  # op -> what may follow its first argument
    "getattr": (("T",), ("mT",)),
    "t": ((),),
    "transpose": ((0, 1), (1, 0), (-1, -2), (-2, -1)),
}


def _converted(node: fx.Node) -> Product | None:
    x, weight, bias, *rest = _any(node.args)
    form = Form(*rest)
    operands, form = form.operands, form._replace(tensors=None)
    return _checked(Product(node, x, weight, bias, form.transposed, form.fused(), form, [node], _any(operands)))


def _any(args: Any) -> Any:
    """The arguments of a node; what they are is looked at later."""
    return args


def _checked(product: Product) -> Product | None:
    x, weight, bias = product.x, product.weight, product.bias
    fit = isinstance(x, fx.Node) and isinstance(weight, fx.Node) and (bias is None or isinstance(bias, fx.Node))
    return product if fit else None


_READERS: dict[str, Callable[[fx.Node], Product | None]] = {
    "linear": _linear,
    "addmm": _addmm,
    "matmul": _matmul,
    "mm": _matmul,
    "fastlinear": _converted,
}


class Absorption(NamedTuple):
    """What a product may absorb. take: the product with the node that reads it; None where that is another thing."""

    name: str
    take: Callable[[Capture, Product, fx.Node], Product | None]


def _activation(capture: Capture, product: Product, node: fx.Node) -> Product | None:
    found = activation_of(node) if node.args[:1] == (product.root,) else None
    return None if found is None else product.absorbed(node, Step(*found))


# Of two tensors, or of a tensor and a number.
_BINARY = {"add": "add", "sub": "sub", "mul": "mul", "div": "div", "minimum": "min", "maximum": "max"}


def _binary(capture: Capture, product: Product, node: fx.Node) -> Product | None:
    """A residual, a mask, a scale: what makes a tensor of the dtype and shape of the product's, so that the other
    operand is broadcast to it and casts nothing."""
    name, y, z = _BINARY.get(op_of(node), ""), example(product.root), example(node)
    if not name or node.kwargs or len(node.args) != 2 or y is None or z is None:
        return None
    if y.dtype is not z.dtype or not same_shape(y.shape, z.shape):
        return None
    others = [arg for arg in node.args if arg is not product.root]
    if len(others) != 1 or (name in ("sub", "div") and node.args[0] is not product.root):
        return None
    (other,) = others
    if isinstance(other, (int, float)) and not isinstance(other, bool):
        # Siblings are one product without programs, which is worth more than a number.
        return None if _has_sibling(product) else product.absorbed(node, Step(name, (float(other),)))
    beside = example(other)
    fit = beside is not None and beside.dtype in _tensors.FORMATS and beside.device.type == "cpu" and _is_dense(beside)
    return product.absorbed(node, Step(name), _any(other)) if fit else None


_BOUNDS = "min", "max"


def _clamp(capture: Capture, product: Product, node: fx.Node) -> Product | None:
    if op_of(node) not in ("clamp", "clip") or node.args[:1] != (product.root,):
        return None
    low, high = (node.kwargs.get(name, arg) for name, arg in zip(_BOUNDS, (*node.args[1:], None, None), strict=False))
    try:
        program = programs.resolve((("clamp", low, high),))
    except ValueError:  # of tensors, or of bounds that have changed places
        return None
    return None if program is None else product.absorbed(node, Step(*program))


def _is_dense(t: Tensor) -> bool:
    return t.layout is torch.strided and not t.is_nested


def _has_sibling(product: Product) -> bool:
    return any(product_at(user) is not None for user in product.x.users if user is not product.nodes[0])


_GATES = {activation: gate for gate, activation in programs.GATES.items()}


def pieces_of(node: fx.Node) -> dict[fx.Node, range]:
    """The readers of y.chunk(count, -1) that take a piece each, and its columns; none where there are others."""
    y = example(node.args[0]) if node.args else None
    given: dict[str, Any] = dict(zip(("input", "chunks", "dim"), node.args, strict=False)) | node.kwargs
    count, dim = given.get("chunks"), given.get("dim", 0)
    if op_of(node) != "chunk" or y is None or not isinstance(count, int) or dim not in (-1, y.dim() - 1):
        return {}
    indices: dict[fx.Node, Any] = {user: user.args[1] for user in node.users if op_of(user) == "getitem"}
    if len(indices) != len(node.users) or not all(isinstance(at, int) for at in indices.values()):
        return {}
    width = y.shape[-1]
    if not isinstance(width, int) or width % count != 0:  # a symbolic one is not asked for its value
        return {}
    columns, size = range(width), width // count
    return {user: columns[at * size :][:size] for user, at in indices.items()}


def halves_of(node: fx.Node) -> tuple[fx.Node, fx.Node] | None:
    """Both halves of y.chunk(2, -1), of which each is read once."""
    halves = sorted(pieces_of(node).items(), key=lambda each: each[1].start)
    if len(halves) != 2 or any(len(half.users) != 1 for half, _ in halves):
        return None
    (first, left), (second, right) = halves
    y = example(node.args[0])
    whole = y is not None and same_size(y.shape[-1], right.stop) and left.start == 0 and left.stop == right.start
    return (first, second) if whole else None


def opened_by(gate: fx.Node, through: fx.Node) -> tuple[str, list[fx.Node]] | None:
    """The gate that two nodes, which are read once, are: its name, and the activation and the product that it is made
    of; None where they are none."""
    (opened,) = gate.users
    activation = activation_of(opened) if opened.args[:1] == (gate,) else None
    (last,) = opened.users if len(opened.users) == 1 else (None,)
    if activation not in _GATES or last is None or op_of(last) != "mul" or last.kwargs:
        return None
    return (_GATES[activation], [opened, last]) if {*last.args} == {opened, through} else None


def _gate(capture: Capture, product: Product, node: fx.Node) -> Product | None:
    """gate, up = y.chunk(2, -1); activation(gate) * up, each read there alone."""
    halves = halves_of(node) if product.activation is None and not product.transposed else None
    found = None if halves is None else opened_by(*halves)
    if halves is None or found is None or (product.form is not None and product.form.layout):
        return None  # a frozen weight has its channels in another order
    gate, (opened, last) = found
    grown = product.absorbed(last, Step(gate))
    return None if grown is None else replace(grown, nodes=[*product.nodes, node, *halves, opened, last])


class Gate(NamedTuple):
    """Two products that are one with this program. opens_inner: whether the inner one is what the activation is of."""

    program: Activation
    opens_inner: bool


def gate_of(outer: Product, inner: Product) -> Gate | None:
    """activation(gate(x)) * up(x), where `inner` is the operand of `outer`'s multiplication; None for other pairs."""
    if outer.x is not inner.x or (outer.bias is None) is not (inner.bias is None) or inner.operands:
        return None
    steps, opened = (() if p.activation is None else programs.steps_of(p.activation) for p in (outer, inner))
    if len(steps) + len(opened) != 2 or not steps or steps[-1].name != "mul" or steps[-1].operand is None:
        return None
    program = _GATES.get(Activation(*(*steps[:-1], *opened)[0][:2]))
    return None if program is None else Gate(Activation(program), bool(opened))


ABSORPTIONS = (
    Absorption("activation", _activation),
    Absorption("binary", _binary),
    Absorption("clamp", _clamp),
    Absorption("gate", _gate),
)
