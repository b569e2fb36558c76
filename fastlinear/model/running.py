"""What computes each linear layer of a model: itself, or one product of several in a compiled graph or a group, or a
third of it in attention to another sequence."""

from __future__ import annotations

import weakref
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from torch import nn

from fastlinear.layer.attention import FastMultiheadAttention
from fastlinear.layer.frozen import known_by
from fastlinear.layer.group import FastLinearGroup
from fastlinear.model.rows import Graph
from fastlinear.model.selection import linear_layers

graphs: weakref.WeakSet[Graph] = weakref.WeakSet()  # all that there are


class Running(NamedTuple):
    """layer: what computes; name: in the model, or made of the names of those that it computes; parts: these names,
    none for a third of a layer; joined: whether it is one product of several; cut: of the parts that are rows of a
    parameter, the parameters by name and these rows."""

    layer: Any
    name: str
    parts: tuple[str, ...]
    joined: bool = False
    cut: tuple[tuple[str, range], ...] = ()


def original(model: nn.Module) -> nn.Module:
    """The model in what torch.compile returns, or the model itself."""
    found: nn.Module = getattr(model, "_orig_mod", model)
    return found


def graphs_of(model: nn.Module) -> tuple[Graph, ...]:
    """What torch.compile(model, backend="fastlinear") has made of it so far."""
    return tuple(graph for graph in graphs if graph.is_of(model))


def running(model: nn.Module, compiled: Iterable[Graph]) -> list[Running]:
    """In the model's order. Each linear layer is in `parts` of one, or is one. A weight of no linear layer that a graph
    multiplies by, a router's or the in_proj_weight of attention, comes behind them, by its own name, and so do rows of
    one, "in_proj_weight[0:512]"."""
    placed: dict[int, Any] = {}
    cut: dict[int, dict[range, Any]] = defaultdict(dict)
    for layer, weights in (each for graph in compiled for each in graph.layers):
        for weight, rows in weights:
            if rows is None:
                placed[id(weight)] = layer, weights
            else:
                cut[id(weight)][rows] = layer, weights
    grouped, apart = dict(_of_groups(model)), dict(_of_attention(model))
    found: dict[Any, Running] = {}
    places: dict[str, int] = {}  # of layers in the product of several that they are computed by
    for layer, (name, *_) in linear_layers(model).items():
        known, weights = placed.get(id(known_by(layer)), (None, ()))
        pieces = {} if known is not None else cut.get(id(known_by(layer)), {})
        if pieces and sum(map(len, pieces)) == len(known_by(layer)):  # the halves of a gate
            of_pieces = [each for each, _ in pieces.values()]
            if any(each is not of_pieces[0] for each in of_pieces):
                continue  # they come below
            found[of_pieces[0]] = Running(of_pieces[0], name, (name,), True)
            del cut[id(known_by(layer))]
            continue
        if layer in apart and known is None:
            found.update({each.layer: each for each in apart[layer]})
            if not layer.plans:
                continue
        joined = len(weights) > 1
        running = Running(layer, name, ())
        if known is not None:
            running = Running(known, known._name if joined else name, (), joined)
            places[name] = [id(weight) for weight, _ in weights].index(id(known_by(layer)))
        else:
            running = grouped.get(layer, running)
        running = found.get(running.layer, running)
        found[running.layer] = running._replace(parts=(*running.parts, name))
    layers = {id(known_by(layer)) for layer in linear_layers(model)}
    for name, weight in model.named_parameters():
        known, weights = placed.get(id(weight), (None, ()))
        if known is not None and id(weight) not in layers:
            _add(found, known, weights, name)
        for rows, (known, weights) in cut.get(id(weight), {}).items():
            running = _add(found, known, weights, f"{name}[{rows.start}:{rows.stop}]")
            found[known] = running._replace(cut=(*running.cut, (name, rows)))
    return [_with_whole_name(each, places) for each in found.values()]


def name_together(names: Sequence[str]) -> str:
    """attention.self.query, attention.self.key -> attention.self.(query, key)"""
    split = [name.rpartition(".") for name in names]
    if len({front for front, *_ in split}) > 1:
        return ", ".join(names)
    front, dot, _ = split[0]
    return f"{front}{dot}({', '.join(last for *_, last in split)})"


def _with_whole_name(running: Running, places: Mapping[str, int]) -> Running:
    """By the names that the model has for its layers: where Dynamo has broken a graph, a product of several knows those
    within the module that the piece is of."""
    if len(running.parts) < 2 or not places.keys() >= {*running.parts}:
        return running
    return running._replace(name=name_together(sorted(running.parts, key=places.__getitem__)))


def _add(found: dict[Any, Running], layer: Any, weights: tuple[Any, ...], part: str) -> Running:
    """Adds a part that is no linear layer to what computes it, which may be new."""
    joined = len(weights) > 1
    running = found.get(layer, Running(layer, layer._name if joined else part, (), joined))
    found[layer] = running._replace(parts=(*running.parts, part))
    return found[layer]


def _of_groups(model: nn.Module) -> Iterator[tuple[nn.Module, Running]]:
    """The layers of groups that have answered as one product."""
    for name, module in model.named_modules():
        if isinstance(module, FastLinearGroup) and module._stack.whole.plans:
            for layer in module.layers:
                yield layer, Running(module._stack.whole, name or "(the model)", (), True)


def _of_attention(model: nn.Module) -> Iterator[tuple[nn.Module, list[Running]]]:
    """The projections of attention to another sequence, which were called as three layers of their own."""
    for name, module in model.named_modules():
        if isinstance(module, FastMultiheadAttention):
            layers, within = module.apart(), f"{name}.in_proj" if name else "in_proj"
            own = [
                Running(layer, f"{within} ({part})", ())
                for layer, part in zip(layers, ("query", "key", "value"), strict=False)
                if layer.plans
            ]
            if own:
                yield module.in_proj, own
