"""What runs in a rewritten graph: functions of x and of the parameters, as Dynamo passes them in each call.

One compiled graph serves every module whose guards hold, be it the blocks of a model that are compiled one by one or
two models of one class. So a function has a layer for each weight it is called with, and a layer is shared by all
graphs that want the same of its weight: it is packed and planned once.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple, TypeAlias

from torch import Tensor, nn

import fastlinear._tensors as _tensors
import fastlinear._weights as _weights
from fastlinear._engine import Engine
from fastlinear._siblings import FrozenGroup
from fastlinear.layer import fitness, packs
from fastlinear.layer.form import Form
from fastlinear.layer.frozen import Frozen, hold, known_by, record_of
from fastlinear.layer.module import FastModule
from fastlinear.layer.stack import Stack, why_not_together
from fastlinear.spec import programs
from fastlinear.spec.activations import Activation
from fastlinear.spec.precision import Precision, Wanted

_MOST = 128  # weights that one function of a graph remembers; a model of more blocks than that packs again


class Operator(FastModule, nn.Module):
    """A linear layer of a graph: a fast layer without a place in a model."""

    def __init__(self, spec: Spec, weight: Tensor, bias: Tensor | None) -> None:
        super().__init__()
        form = spec.form or Form("", [], spec.transposed)
        n, k = (form.n, form.k) if form.layout else reversed(weight.shape) if spec.transposed else weight.shape
        columns = n // 2 if programs.is_gated(spec.activation) else n
        vars(self).update(in_features=k, out_features=columns, activation=spec.activation, _transposed=spec.transposed)
        vars(self).update(_precision=spec.precision, _tune=spec.tune, _name=spec.name, training=False)
        own: dict[str, Any] = {"weight": None if form.layout else weight, "bias": bias}
        self._parameters.update(own)
        self._reset()
        if form.layout:
            packed = packs.kind_of(self._gated).over(weight.numpy(), form.layout, n, k)
            frozen = Frozen(packed, spec.dtype_of(packed), smooth=form.smooth)
            frozen.panels = weight
            hold(self, frozen)

    def _new_engine(self, precision: Precision, bare: bool = False) -> Engine:
        engine = super()._new_engine(precision, bare)
        if record_of(self) is not None:  # what is frozen serves, mostly a language model
            engine.follow_others()
        return engine


class Spec(NamedTuple):
    """What a graph wants of a weight. form: of the op fastlinear::linear that stood there, if one did."""

    name: str
    activation: Activation | None
    transposed: bool
    precision: Precision
    tune: str
    asked: Wanted
    form: Form | None = None

    def dtype_of(self, packed: _weights.Packed) -> Any:
        return packed.dtype if packed.dtype in _tensors.FORMATS else next(iter(_tensors.FORMATS))

    def key(self) -> tuple[Any, ...]:
        """Equal for what one layer may answer."""
        precision = self.precision._replace(sample=None)
        rows = precision.rows and precision.rows._replace(smooth=None)
        smooth = id(self.precision.smooth) if self.precision.smooth is not None else None
        return self.activation, self.transposed, self.tune, precision._replace(rows=rows), smooth


_known: weakref.WeakValueDictionary[Any, Operator] = weakref.WeakValueDictionary()
_stacks: weakref.WeakValueDictionary[Any, Stack] = weakref.WeakValueDictionary()


def operator_for(spec: Spec, weight: Tensor, bias: Tensor | None) -> Operator:
    """The layer of these parameters, which may be that of another graph."""
    key = (id(weight), id(bias), spec.key())
    layer = _known.get(key)
    if layer is None or known_by(layer) is not weight or layer._parameters["bias"] is not bias:
        layer = _known[key] = Operator(spec, weight, bias)
    return layer


def packed_bytes(layer: Operator) -> int:
    """Of its weight, in panels."""
    if layer._frozen is not None:
        return int(layer._frozen.packed.nbytes)
    columns = layer.out_features * (2 if layer._gated else 1)
    return _weights.packed_nbytes(packs.layout_of(layer.precision), columns, layer.in_features)


def why_not(spec: Spec, layer: Operator) -> str | None:
    """Why the kernels cannot run a layer as the graph wants it, in a few words; None if they can."""
    return None if spec.form is not None else fitness.why_not(layer, spec.asked, spec.name)


# What a function runs, Operators, Stacks or FrozenGroups, by the id of the first weight.
Layers: TypeAlias = dict[int, Any]


def running(layers: Layers) -> Iterator[tuple[Any, tuple[Any, ...]]]:
    """The layers, each with the weights that it is packed of."""
    for each in list(layers.values()):
        if isinstance(each, Stack):
            yield each.whole, tuple(layer.weight for layer in each.layers)
        elif isinstance(each, FrozenGroup):
            yield from ((layer, (panels,)) for layer, panels in zip(each.layers, each.panels, strict=True))
        else:
            yield each, (known_by(each),)


def product(spec: Spec, first: Operator) -> tuple[Callable[..., Tensor], Layers]:
    """linear(x, weight, bias, *operands, into): the product, in the memory of `into` if that is given; and its layers,
    `first` for the parameters that the graph was made with."""
    layers: Layers = {id(known_by(first)): first}

    def linear(x: Tensor, weight: Tensor, bias: Tensor | None, *operands: Tensor, into: Tensor | None = None) -> Tensor:
        layer = layers.get(id(weight))  # which holds the weight, so that nothing else has its id
        if layer is None:
            layer = _adopt(layers, spec, weight, bias)
            if layer is None:
                y = _in_torch(spec, x, weight, bias, operands)
                return y if into is None else into.copy_(y)
        layer._parameters["bias"] = bias  # type: ignore[assignment]
        y = layer._engine.forward(layer, x, operands, into)
        return y

    return linear, layers


def _adopt(layers: Layers, spec: Spec, weight: Tensor, bias: Tensor | None) -> Operator | None:
    """A layer for parameters that the graph was not made with; None where torch has to compute them."""
    layer = operator_for(spec, weight, bias) if is_for_any(spec.asked) else None
    return None if layer is None or why_not(spec, layer) is not None else remember(layers, weight, layer)


def is_for_any(asked: Wanted) -> bool:
    """Whether other weights are to be packed like those the graph was made with: not by what was seen of the latter."""
    return asked.scheme is None or asked.scheme.calibration is None


def remember(known: dict[int, Any], weight: Tensor, value: Any) -> Any:
    """`value`, which is from now on known by the weight, in the place of the oldest if there are many."""
    while len(known) >= _MOST:
        known.pop(next(iter(known)))
    known[id(weight)] = value
    return value


def _in_torch(spec: Spec, x: Tensor, weight: Tensor, bias: Tensor | None, operands: tuple[Tensor, ...]) -> Tensor:
    if spec.form is not None:
        return spec.form.reference()._replace(activation=spec.activation).floats(x, weight, bias, operands)
    return programs.linear(x, weight.t() if spec.transposed else weight, bias, spec.activation, operands)


def group(spec: Spec, layers: Sequence[Operator]) -> tuple[Callable[..., tuple[Tensor, ...]], Layers]:
    """linears(x, weight, ..., bias, ...): the products as one; and its stacks, the first one for the parameters that
    the graph was made with."""
    singles = [product(spec, layer)[0] for layer in layers]
    stacks: Layers = {id(layers[0].weight): _stack_for(spec, layers)}
    half = len(layers)

    def linears(x: Tensor, *tensors: Any) -> tuple[Tensor, ...]:
        stack: Stack | None = stacks.get(id(tensors[0])) or _adopt_all(stacks, spec, tensors)
        ys: tuple[Tensor, ...] | None = None if stack is None else stack(x, tensors)
        if ys is not None:
            return ys
        return tuple(single(x, w, b) for single, w, b in zip(singles, tensors[:half], tensors[half:], strict=True))

    return linears, stacks


def gated(
    spec: Spec, layers: Sequence[Operator], gate: Activation, alone: Callable[..., Tensor]
) -> tuple[Callable[..., Tensor], Layers]:
    """gate(x, weight of the gate, of what it lets through, their biases): both products and the gate as one; and its
    stacks, as of `group`. alone: the same, where they have to be two."""
    stacks: Layers = {id(layers[0].weight): _stack_for(spec, layers, gate)}

    def opened(x: Tensor, *tensors: Any) -> Tensor:
        stack: Stack | None = stacks.get(id(tensors[0])) or _adopt_all(stacks, spec, tensors, gate)
        y: Tensor | None = None if stack is None else stack(x, tensors)
        return alone(x, *tensors) if y is None else y

    return opened, stacks


def frozen_group(members: Sequence[tuple[Spec, Operator]], chained: bool) -> tuple[Callable[..., Any], Layers]:
    """linears(x, weight, ..., bias, ...): the products of frozen layers in one call, each on its own pack; if they are
    chained, the last one's alone, each having the value of the one before it as its operand. And what runs, as of
    `group`."""
    specs, half = [spec for spec, _ in members], len(members)
    singles = [product(spec, layer)[0] for spec, layer in members]
    groups: Layers = {id(known_by(members[0][1])): _frozen_group_of([layer for _, layer in members], chained)}

    def linears(x: Tensor, *tensors: Any) -> Any:
        known: FrozenGroup | None = groups.get(id(tensors[0]))
        if known is None:
            layers = [operator_for(spec, *pair) for spec, *pair in zip(specs, tensors, tensors[half:], strict=False)]
            known = remember(groups, tensors[0], _frozen_group_of(layers, chained))
        ys = known.answer(x, tensors)
        if ys is not None:
            return ys
        made: list[Tensor] = []
        for single, weight, bias in zip(singles, tensors, tensors[half:], strict=False):
            made.append(single(x, weight, bias, *made[-1:] if chained else ()))
        return made[-1] if chained else tuple(made)

    return linears, groups


def _frozen_group_of(layers: Sequence[Operator], chained: bool) -> FrozenGroup:
    panels = [panels for layer in layers if (panels := known_by(layer)) is not None]
    return FrozenGroup(layers, panels, chained)


def _adopt_all(stacks: Layers, spec: Spec, tensors: tuple[Any, ...], gate: Activation | None = None) -> Any:
    """A stack for parameters that the graph was not made with; None where they have to be alone."""
    half, layers = len(tensors) // 2, []
    for weight, bias in zip(tensors[:half], tensors[half:], strict=True):
        layer = operator_for(spec, weight, bias) if is_for_any(spec.asked) else None
        if layer is None or why_not(spec, layer) is not None:
            return None
        layers.append(layer)
    if why_not_together(layers, gate is not None) is not None:
        return None
    return remember(stacks, tensors[0], _stack_for(spec, layers, gate))


def _stack_for(spec: Spec, layers: Sequence[Operator], gate: Activation | None = None) -> Stack:
    key = (*map(id, layers), spec.key(), gate)
    stack = _stacks.get(key)
    if stack is None or any(a is not b for a, b in zip(stack.layers, layers, strict=True)):
        stack = _stacks[key] = Stack(layers, spec.tune, spec.name, gate)
    return stack
