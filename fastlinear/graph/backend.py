"""The way of a graph through the backend, and the record of it that the report finds."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, fx, nn

import fastlinear.graph.parts as parts
import fastlinear.graph.premises as premises
from fastlinear.graph.capture import Capture, is_training, wants_grad
from fastlinear.graph.operators import Layers, running
from fastlinear.graph.options import Options
from fastlinear.graph.options import options as checked
from fastlinear.graph.rewrite import Rewriter
from fastlinear.graph.story import Story
from fastlinear.graph.tables import tables_of
from fastlinear.layer.frozen import record_of
from fastlinear.model.rows import NodeReport, Weight
from fastlinear.model.running import graphs

_log = logging.getLogger("fastlinear")


class Graph:
    """One compiled graph, as the report has it."""

    def __init__(
        self,
        story: Story,
        capture: Capture,
        reason: str | None,
        products: Sequence[Layers] = (),
        mixtures: Sequence[Layers] = (),
        tables: Mapping[int, bool] = MappingProxyType({}),
    ) -> None:
        self.nodes: tuple[NodeReport, ...] = tuple(story.nodes)
        self.reason, self.tables = reason, tables
        self._products, self._mixtures = products, mixtures
        self._made_with = {id(parts.weight_of(each).tensor) for each in capture.values.values()}

    @property
    def layers(self) -> tuple[tuple[Any, tuple[Weight, ...]], ...]:
        found = (each for layers in self._products for each in running(layers))
        return tuple((layer, tuple(map(parts.weight_of, weights))) for layer, weights in found)

    @property
    def mixtures(self) -> tuple[Any, ...]:
        return tuple(mixture for layers in self._mixtures for mixture in list(layers.values()))

    def is_of(self, model: nn.Module) -> bool:
        """Whether the graph was made of a part of this model, or has run one."""
        own = {id(tensor) for tensor in model.parameters()}
        records = (record_of(module) for module in model.modules())
        own |= {id(frozen.panels) for frozen in records if frozen is not None}
        run = {id(weight.tensor) for _, weights in self.layers for weight in weights}
        run |= {id(tensor) for mixture in self.mixtures for tensor in mixture.parameters()}
        return not own.isdisjoint(self._made_with | run)


def backend(
    module: fx.GraphModule,
    inputs: Sequence[Any],
    *,
    options: Mapping[str, Any] | None = None,
    mode: str | None = None,
) -> Callable[..., Any]:
    """What torch.compile(..., backend="fastlinear", options=...) runs instead of Dynamo's graph: the same graph with
    its linear layers on packed weights, and what follows them fused. See `Options` for the options.

    Raises TypeError or ValueError for an option that it does not know, or of a wrong kind.
    """
    graph, capture = rewritten(module, inputs, checked(options, mode))
    run = traced = function_of(module)
    if graph.reason is None and premises.hold(module, [node for node in capture.values if node.op == "placeholder"]):
        run = function_of(module)
    count = len(capture.inputs)

    def compiled(*args: Any) -> Any:
        return traced(*args) if len(args) == count else run(*args)  # the former of whoever keeps to what he has traced

    compiled.graph = graph  # type: ignore[attr-defined]
    return compiled


def rewritten(module: fx.GraphModule, inputs: Sequence[Any], wanted: Options) -> tuple[Graph, Capture]:
    """The record of a graph, which is rewritten in place, unless it is to run as it is."""
    story, capture = Story(module.graph.nodes), Capture(module, inputs)
    reason = _why_plain(module, inputs)
    rewriter, tables = Rewriter(capture, wanted, story), tables_of(capture)
    products = rewriter.run() if reason is None else []
    graph = Graph(story, capture, reason, products, rewriter.mixtures, tables)
    graphs.add(graph)
    count = len(products) + 2 * len(rewriter.mixtures)
    _log.info("a graph of %d nodes has %d fast products: %s", len(story.nodes), count, reason or "rewritten")
    return graph, capture


def function_of(module: fx.GraphModule) -> Callable[..., Any]:
    """The graph as a function of Python's."""
    module.recompile()
    _ = module.code  # Dynamo's modules put that off, and make their function anew in each call until somebody asks
    return module.forward


def _why_plain(module: fx.GraphModule, inputs: Sequence[Any]) -> str | None:
    """Why a graph is to run as it is; None where it may be rewritten."""
    if torch.is_grad_enabled() and any(isinstance(t, Tensor) and t.requires_grad for t in inputs):
        return "gradients are wanted: call the model under torch.no_grad()"
    for node in module.graph.nodes:
        if wants_grad(node):
            return "it turns gradients on"
        if is_training(node):
            return "the model is in training mode"
    return None
