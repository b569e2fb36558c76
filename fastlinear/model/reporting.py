"""What convert and the tuner decided, layer by layer, as data; `table` makes text of it, and `page` a page."""

from __future__ import annotations

import os
import platform
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from importlib.metadata import version
from typing import Any

import torch
from torch import nn

import fastlinear._kernels as _kernels
import fastlinear._products as _products
from fastlinear.layer import experts, linear, takeover
from fastlinear.layer.fitness import features_of
from fastlinear.layer.frozen import Frozen, record_of
from fastlinear.layer.quality import UNKNOWN, quality_of, quality_of_experts, quality_of_pack
from fastlinear.layer.shard import local
from fastlinear.model import page, splits, table
from fastlinear.model.arguments import check_module
from fastlinear.model.rows import REASONS, SOURCES, Graph, LayerReport
from fastlinear.model.running import Running, graphs_of, original, running
from fastlinear.model.selection import expert_layers, why_skipped
from fastlinear.model.shares import Fast, Share, share_of
from fastlinear.model.vocabulary import packed_embeddings
from fastlinear.plan import roofline
from fastlinear.plan.candidates import Chosen
from fastlinear.plan.decide import spell
from fastlinear.plan.roofline import Spot
from fastlinear.spec.formats import DTYPES, long_name, name_of

_UNTOUCHED = "convert was not called on it"
_UNCALLED = "the example multiplies by its weight without calling it"


class Report(tuple[LayerReport, ...]):
    """The linear layers of a model, in its order; str() is a table that gives layers alike but in number one row.

    graphs: what torch.compile(model, backend="fastlinear") made of it so far: `nodes` has a NodeReport of every node.
    """

    graphs: tuple[Graph, ...] = ()
    share: Share | None = None  # of the model's weights, and of its multiply-adds, that run fast

    @property
    def pack_mib(self) -> float:
        """MiB of all packed weights together."""
        return sum(layer.pack_mib for layer in self)

    def __str__(self) -> str:
        return table.text_of(self.parts())

    def parts(self) -> table.Parts:
        """What str() is made of: the lines above the table, its rows with their head, the lines below."""
        share = "" if self.share is None else self.share.text()
        return table.parts_of(self, share, self.summary(), self.graphs)

    def _repr_html_(self) -> str:
        lines = [] if self.share is None else [self.share.text()]
        return page.fragment_of(self, [*lines, *self.summary()])

    def to_dict(self) -> dict[str, Any]:
        """The report as data that JSON can hold: "share", "summary", "layers", "graphs" and "environment"."""
        return {
            "share": None if self.share is None else self.share.to_dict(),
            "summary": [*self.summary()],
            "layers": [layer.to_dict() for layer in self],
            "graphs": [
                {"reason": graph.reason, "nodes": [vars(node) for node in graph.nodes]} for graph in self.graphs
            ],
            "environment": environment(),
        }

    def to_html(self, path: str | os.PathLike[str]) -> None:
        """Writes a page that needs nothing else: the summary, a table to sort and filter, the roofline, the layers'
        speed-ups and this machine. OSError where the file cannot be written."""
        with open(path, "w", encoding="utf-8") as file:
            share = "" if self.share is None else self.share.text()
            file.write(page.page_of(self, share, [*self.summary()], environment()))

    def summary(self) -> Iterator[str]:
        """The lines below the table."""
        decisions = Counter(layer.decision for layer in self)
        sources = Counter(plan.source for layer in self for plan in layer.buckets)
        info = _kernels.cpu_info()
        yield f"layers: {', '.join(f'{n} {decision}' for decision, n in decisions.items()) or 'no linear ones'}"
        yield f"plans: {', '.join(f'{n} {SOURCES[source]}' for source, n in sources.items()) or 'none yet'}"
        waiting = Counter(plan.provisional for layer in self for plan in layer.buckets if plan.provisional)
        for reason, n in waiting.items():
            yield f"provisional, marked ?: {n} of these, {REASONS[reason]}"
        silent = Counter(layer.why_no_speedup(plan) for layer in self for plan in layer.buckets if plan.table)
        for reason in filter(None, silent):
            yield f"no speed-up for {silent[reason]} of these: {reason}"
        if any(spot is not None for layer in self for spot in layer.roofline):
            yield "roof: share of what the fastest kernel and memory of this CPU allow for the product"
        instead = sum(layer.pack_mib for layer in self if layer.frozen)
        yield f"extra memory: {self.pack_mib - instead:.1f} MiB of packed weights"
        if any(layer.quality != UNKNOWN for layer in self):
            yield "dB: signal to noise of the quantized weight / of the output on inputs of the calibration"
        if frozen := [layer for layer in self if layer.frozen]:
            origins = Counter(layer.origin for layer in frozen if layer.origin)
            notes = "".join(f"; {n} {origin}" for origin, n in origins.items())
            yield f"frozen: {len(frozen)} layers, {instead:.1f} MiB of packed weights instead of parameters{notes}"
        yield f"CPU: {info['model'] or platform.machine()}, {' '.join(info['isas'])}, {_products.num_threads()} threads"


def report(model: nn.Module, example: Any = None) -> Report:
    """What became of each linear layer of `model`: kernel and speed-up for each batch size met so far, memory, or why
    it was skipped; and, where it was compiled with backend="fastlinear", of each node of its graphs.

    example: what to call the model with, as for `tune`. With it, all multiply-adds of one call of a stock copy are
        counted, those of attention and experts included, and the report tells what share of them runs fast. Attention's
        is that of the graphs' attentions that our kernel answered when they were last called in another shape.

    Where plans were measured, their part of the roofline is told, which the first report of a process measures in some
    0.2 s a format, unless others have the CPUs. Raises TypeError for anything but an nn.Module.
    """
    check_module("report", model)
    whole = original(model)
    otherwise = "no compiled graph runs it fast" if whole is not model else _UNTOUCHED
    own = graphs_of(whole)
    rows, fast, idle, cut = dict[Any, LayerReport](), set[str](), set[str](), defaultdict[str, set[int]](set)
    for each in running(whole, own):
        row = rows[each.layer] = describe_running(each, otherwise)
        if row.decision not in ("skipped", "elsewhere"):
            names = {*each.parts} or {each.name.partition(" (")[0]}  # a third of a layer
            fast |= names
            idle |= names if row.decision == "untuned" else set()
            for name, part in each.cut:
                cut[name].update(part)
    whole_ones = {name for name, part in cut.items() if len(part) == len(whole.get_parameter(name))}
    fast |= whole_ones | {name.removesuffix(".weight") for name in whole_ones}
    others = [*describe_others(whole, own, otherwise)]
    fast |= {row.name for row in others if row.experts and row.decision not in ("skipped", "elsewhere")}
    known = Fast(fast, idle, {*_tables(whole, own)}, _attended(own))
    share, told = share_of(whole, known, example), splits.notes(rows.items())
    for layer, row in rows.items():
        told[layer] = (*told.get(layer, ()), *[_UNCALLED] * (row.name in share.uncalled))
    found = Report([*(replace(row, notes=told[layer]) for layer, row in rows.items()), *others])
    found.graphs, found.share = own, share
    return found


def _tables(model: nn.Module, compiled: tuple[Graph, ...]) -> Iterator[str]:
    """The names of parameters that graphs read, and that none multiplies by."""
    for name, parameter in model.named_parameters():
        told = [graph.tables[id(parameter)] for graph in compiled if id(parameter) in graph.tables]
        if told and all(told):
            yield name


def _attended(compiled: Iterable[Graph]) -> float:
    """Which part of what graphs multiply activations with one another, as attention does, runs fast."""
    nodes = [node for graph in compiled if graph.reason is None for node in graph.nodes if node.work]
    fast = sum(node.work for node in nodes if node.outcome != "torch")
    return fast / sum(node.work for node in nodes) if fast else 0.0


def describe_others(
    model: nn.Module, compiled: Iterable[Graph] = (), otherwise: str = _UNTOUCHED
) -> Iterator[LayerReport]:
    """The rows of what is no linear layer: mixtures of experts, and embeddings over packs."""
    placed = {id(each.tensors()[0]): each for graph in compiled for each in graph.mixtures}
    for mixture, names in expert_layers(model).items():
        first = mixture._parameters.get(experts.names_of(mixture)[0])
        yield from describe_experts(names[0], placed.get(id(first), mixture), otherwise)
    for name, _, frozen in packed_embeddings(model):
        yield describe_embedding(name, frozen)


def environment() -> dict[str, Any]:
    """Where a report was made."""
    info = _kernels.cpu_info()
    return {
        "cpu": info["model"] or platform.machine(),
        "isas": [*info["isas"]],
        "threads": _products.num_threads(),
        "torch": torch.__version__,
        "fastlinear": version("fastlinear"),
        "python": platform.python_version(),
    }


def describe_running(run: Running, otherwise: str = _UNTOUCHED) -> LayerReport:
    """As `describe`; the pack of several layers is beside their weights, though what computes has none of its own."""
    row = describe(run.name, run.layer, otherwise)
    return replace(row, frozen=False, joined=True) if run.joined else row


def describe(name: str, layer: Any, otherwise: str = _UNTOUCHED) -> LayerReport:
    """otherwise: why it is not fast, if nothing else is."""
    fast = linear.is_fast(layer)
    buckets, frozen = layer.plans if fast else (), record_of(layer)
    elsewhere = dict(vars(layer)["_elsewhere"]) if fast else {}
    features = features_of(layer)
    return LayerReport(
        name=name,
        in_features=features[0],
        out_features=features[1],
        dtype=layer.dtypes if fast else takeover.text_of(layer),
        activation=layer.activation if fast else None,
        decision=_decision(buckets, elsewhere) if fast else "skipped",
        buckets=buckets,
        pack_mib=layer.pack_nbytes / 2**20 if fast else 0.0,
        reason=None if fast else why_skipped(layer) or otherwise,
        frozen=frozen is not None,
        origin="" if frozen is None else frozen.origin,
        quality=quality_of(layer) if fast else UNKNOWN,
        elsewhere=elsewhere,
        weight_mib=_weight_bytes(layer) / 2**20,
        roofline=tuple(_spot(layer, plan) for plan in buckets),
    )


def describe_embedding(name: str, frozen: Frozen) -> LayerReport:
    """An embedding over a pack, whose memory counts for a layer that has it, too."""
    n, k = frozen.packed.n, frozen.packed.k
    return LayerReport(
        name=name,
        in_features=n,
        out_features=k,
        dtype=f"{str(frozen.dtype).removeprefix('torch.')} as {long_name(frozen.packed.format)} rows",
        activation=None,
        decision="looked up",
        buckets=(),
        pack_mib=0.0 if frozen.layers else frozen.packed.nbytes / 2**20,
        frozen=True,
        origin=frozen.origin,
        quality=quality_of_pack(frozen.packed),
        weight_mib=0.0 if frozen.layers else n * k * frozen.dtype.itemsize / 2**20,
    )


def describe_experts(name: str, module: Any, otherwise: str = _UNTOUCHED) -> Iterator[LayerReport]:
    """A row for each of the two products of a mixture."""
    fast, reason = experts.is_fast_experts(module), None
    if not fast:
        reason = why_skipped(module) or otherwise
    for which, own in enumerate(experts.names_of(module)):
        count, n, k = experts.sizes_of(module)[which]
        buckets = module.plans[which] if fast else ()
        elsewhere = dict(module._elsewhere) if fast else {}
        frozen = module._frozen_experts if fast else None
        yield LayerReport(
            name=f"{name}.{own}" if name else own,
            in_features=k,
            out_features=n,
            dtype=module.dtypes if fast else str(experts.dtype_of(module)).removeprefix("torch."),
            activation=module._form.program if fast and which == 0 else None,
            decision=_decision(buckets, elsewhere) if fast else "skipped",
            buckets=buckets,
            pack_mib=module.pack_nbytes[which] / 2**20 if fast else 0.0,
            reason=reason,
            frozen=frozen is not None,
            origin="" if frozen is None else frozen.origin,
            quality=quality_of_experts(module, which) if fast else UNKNOWN,
            elsewhere=elsewhere,
            weight_mib=count * n * k * experts.dtype_of(module).itemsize / 2**20,
            experts=count,
        )


def _weight_bytes(layer: Any) -> int:
    frozen = record_of(layer)
    if frozen is not None:
        return int(frozen.packed.n * frozen.packed.k * frozen.dtype.itemsize)
    return takeover.nbytes_of(layer) if takeover.is_foreign(layer) else int(local(layer.weight).nbytes)


def _spot(layer: Any, plan: Chosen) -> Spot | None:
    """Where a plan stands below the roofline whose time is known."""
    name = plan.name if plan.name.startswith("torch/") else spell(plan)
    milliseconds = dict(plan.table).get(name)
    if milliseconds is None or plan.measured == (0, 0):
        return None
    held = name_of(layer.weight.dtype) if record_of(layer) is None else ""
    packed = held if plan.refused or name == plan.name else layer.packed_as
    roof = roofline.measure(plan.x, packed, plan.plan_threads if name != plan.name else plan.threads)
    n, k = plan.measured[1], layer._columns()
    itemsize = (
        DTYPES[packed].itemsize if packed in DTYPES else layer._engine.packed.nbytes / (layer._engine.packed.n * k)
    )
    return None if roof is None else roof.spot(plan, k, milliseconds, itemsize * n * k)


def _decision(buckets: tuple[Chosen, ...], elsewhere: Mapping[str, int]) -> str:
    if not buckets:
        return "elsewhere" if elsewhere else "untuned"
    return "torch" if all(plan.name.startswith("torch/") for plan in buckets) else "fast"
