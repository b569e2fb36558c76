"""What runs in the place of a mixture of experts that a graph spells out: fast experts without a place in a model.

As products have it (see operators), a function has experts for each weight that it is called with, and graphs that want
the same of a weight share them.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from torch import Tensor, fx, nn

import fastlinear.graph.experts as experts
import fastlinear.graph.operators as operators
import fastlinear.layer.experts as fast
from fastlinear.graph.capture import Capture, op_of
from fastlinear.graph.options import Options
from fastlinear.graph.story import Story
from fastlinear.layer import mixture
from fastlinear.layer.experts_module import ExpertsModule
from fastlinear.spec import programs
from fastlinear.spec.experts import Form, computed
from fastlinear.spec.precision import AS_HELD, Wanted


class Mixture(ExpertsModule, nn.Module):
    """Experts of a graph, on both weights and both biases of theirs."""

    def __init__(self, spec: Spec, tensors: Sequence[Tensor | None]) -> None:
        super().__init__()
        names = mixture.FIRST[not programs.is_gated(spec.form.program)], mixture.SECOND
        own: dict[str, Any] = dict(zip((*names, *(f"{name}_bias" for name in names)), tensors, strict=True))
        self._parameters.update({name: each for name, each in own.items() if each is not None})
        vars(self).update(_form=spec.form, _tune=spec.tune, _name=spec.name, training=False)
        self._reset()

    def in_training(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        """Where kernels are switched off."""
        return computed(self._form._replace(precision=AS_HELD), x, ids, weights, *self.tensors())


class Spec(NamedTuple):
    """What a graph wants of the weights of experts."""

    name: str
    form: Form
    tune: str
    asked: Wanted


_known: weakref.WeakValueDictionary[Any, Mixture] = weakref.WeakValueDictionary()


def mixture_for(spec: Spec, tensors: Sequence[Tensor | None]) -> Mixture:
    """The experts of these parameters, which may be those of another graph."""
    key = (*map(id, tensors), spec.form.spelled(), spec.tune)
    found = _known.get(key)
    if found is None or not _is_of(found, tensors):
        found = _known[key] = Mixture(spec, tensors)
    return found


def _is_of(found: Mixture, tensors: Sequence[Tensor | None]) -> bool:
    return all(own is given for own, given in zip(found.tensors(), tensors, strict=True))


def function(spec: Spec, first: Mixture) -> tuple[Callable[..., Tensor], operators.Layers]:
    """mixture(x, ids, weights, both weights, both biases); and what runs, `first` for the parameters that the graph was
    made with."""
    known: operators.Layers = {id(first.tensors()[0]): first}

    def run(x: Tensor, ids: Tensor, weights: Tensor, *tensors: Any) -> Tensor:
        found: Mixture | None = known.get(id(tensors[0]))
        if found is None or not _is_of(found, tensors):
            found = mixture_for(spec, tensors) if operators.is_for_any(spec.asked) else None
            if found is None or fast.why_not(found, spec.asked, spec.name) is not None:
                return computed(spec.form._replace(precision=AS_HELD), x, ids, weights, *tensors)
            operators.remember(known, tensors[0], found)
        return found.forward(x, ids, weights)

    return run, known


def place(capture: Capture, options: Options, story: Story) -> dict[fx.Node, operators.Layers]:
    """Puts fast experts in the place of what a graph spells out of mixtures: the nodes that stand for these, and what
    each of them then runs."""
    placed = {}
    for node in capture.graph.nodes:
        if op_of(node) in experts.GROUPED:
            story.tell(node, "torch", "its experts are not spelled out as transformers does it")
    for found in experts.found(capture):
        taken = _taken(capture, options, found)
        if isinstance(taken, str):
            for node in found.products:
                story.tell(node, "torch", taken)
            continue
        run, layers = function(*taken)
        with capture.graph.inserting_before(found.root):
            node = capture.graph.call_function(run, (found.x, found.ids, found.weights, *found.tensors))
        node.meta = dict(found.root.meta)
        placed[node] = layers
        _finish(capture.graph, story, found, node, taken[0])
    return placed


def _taken(capture: Capture, options: Options, found: experts.Found) -> tuple[Spec, Mixture] | str:
    """What the graph wants of experts and what is to run them, or why torch runs them."""
    tensors = [None if each is None else capture.values[each] for each in found.tensors]
    first, node, asked = found.tensors[0], found.products[0], options.asked
    name = capture.name_of(node, first)
    if (reason := options.why_left(name, capture.classes_of(node))) is not None:
        return reason
    spec = Spec(name, found.form, options.tune, asked)
    if (reason := fast.why_not(mixture_for(spec, tensors), asked, name)) is not None:
        return reason
    precision = fast.own(asked.of(name, capture.values[first].dtype))
    spec = spec._replace(form=found.form._replace(precision=precision))
    made = mixture_for(spec, tensors)
    if options.filter_fn is not None and not options.filter_fn(made, name):
        return "it is refused by filter_fn"
    return spec, made


def _finish(graph: fx.Graph, story: Story, found: experts.Found, node: fx.Node, spec: Spec) -> None:
    """Puts `node` in the place of a mixture."""
    program = spec.form.program
    for each in found.nodes:
        story.tell(each, "fused", f"into {found.products[0].name}")
    for each in found.products:
        story.tell(each, "fast", f"FastExperts {spec.name!r}" + (f" with {program.name}" if program else ""))
    found.root.replace_all_uses_with(node)
    for each in reversed(list(graph.nodes)):
        if each in found.nodes:
            graph.erase_node(each)
