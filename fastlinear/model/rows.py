"""What a report has of each layer, and of each node of a compiled graph."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

from torch import nn

from fastlinear.layer.quality import UNKNOWN, Quality
from fastlinear.plan import measuring
from fastlinear.plan.candidates import Chosen
from fastlinear.plan.decide import spell
from fastlinear.plan.roofline import Spot
from fastlinear.spec.activations import Activation

SOURCES = {
    "tuned": "measured in this process",
    "equal": "measured for an equal layer",
    "cache": "from the tuning cache",
    "neighbor": "as for a batch size nearby",
    "heuristic": "by rule, not measured",
    "override": "fixed by FASTLINEAR_KERNEL",
    "forced": "fixed by fastlinear.force",
}

REASONS = {
    measuring.BUSY: "since others had the CPUs: a later call measures again, a few times, and tune() at once",
    measuring.ELSEWHERE: "since another thread was measuring: a later call asks again",
}


@dataclass(frozen=True)
class LayerReport:
    """One linear layer by its first name in the model, or one product of all experts of a mixture by its weight's."""

    name: str
    in_features: int
    out_features: int
    dtype: str  # of the parameter and, where it is another one, of its pack: "float32 as bfloat16"
    activation: Activation | None
    # "fast": a native kernel runs; "torch": torch's own was faster for every M so far; "elsewhere": all calls so far
    # went round the kernels; "untuned": there were none; "skipped"
    decision: str
    buckets: tuple[Chosen, ...]  # what runs for each format of x and bucket of M so far, smallest first
    pack_mib: float  # what the packed weight takes: beyond the weight itself, or instead of it where `frozen`
    reason: str | None = None  # why it was skipped
    frozen: bool = False
    joined: bool = False  # one product of several layers, with a pack beside their weights
    origin: str = ""  # where the pack of a frozen layer comes from, unless it was packed here
    quality: Quality = UNKNOWN  # of a quantized layer: signal to noise in dB
    elsewhere: Mapping[str, int] = field(default_factory=dict)  # calls that the kernels did not answer, by reason
    weight_mib: float = 0.0  # what the weight takes, or took before it was frozen
    notes: tuple[str, ...] = ()  # of a layer that processes share: this one's part, and where it is too small for that
    roofline: tuple[Spot | None, ...] = ()  # of each bucket: where it stands below the roofline, if measured
    experts: int = 0  # how many weights of this size there are, where the layer is one product of a mixture of experts

    @property
    def shape(self) -> str:
        """ "768x3072", or of 8 experts "8x768x3072"."""
        sizes = [self.experts] * bool(self.experts) + [self.in_features, self.out_features]
        return "x".join(map(str, sizes))

    @property
    def memory_mib(self) -> float:
        """What weight and packs take now."""
        return self.pack_mib + (0.0 if self.frozen else self.weight_mib)

    def why_no_speedup(self, plan: Chosen) -> str:
        """Why nothing is known of how much faster than nn.Linear a plan is; "" where it is known."""
        if plan.speedup is not None:
            return ""
        if plan.source in ("heuristic", "neighbor", "override", "forced"):
            return SOURCES[plan.source]
        if self.experts:
            return "it was measured for the rows of one expert"
        if self.joined:
            return "it is one product of several layers, and nn.Linear would be several"
        if self.frozen:
            return "the weight is frozen: there is no nn.Linear to compare with"
        return "x is not of the weight's dtype, which nn.Linear refuses"

    def to_dict(self) -> dict[str, Any]:
        """All of it in what JSON can hold. Memory in MiB, times in milliseconds, quality in dB."""
        spots = self.roofline or (None,) * len(self.buckets)
        return {
            "name": self.name,
            "in_features": self.in_features,
            "out_features": self.out_features,
            "experts": self.experts,
            "dtype": self.dtype,
            "activation": None if self.activation is None else [self.activation.name, *self.activation.params],
            "decision": self.decision,
            "reason": self.reason,
            "frozen": self.frozen,
            "origin": self.origin,
            "memory": {"before": self.weight_mib, "after": self.memory_mib, "packed": self.pack_mib},
            "quality": {"weight": self.quality.weight, "output": self.quality.output},
            "elsewhere": dict(self.elsewhere),
            "notes": [*self.notes],
            "plans": [self._of_plan(plan, spot) for plan, spot in zip(self.buckets, spots, strict=True)],
        }

    def _of_plan(self, plan: Chosen, spot: Spot | None) -> dict[str, Any]:
        return {
            "rows": plan.bucket,
            "x": plan.x,
            "threads": plan.threads,
            "runs_on": plan.name,
            "plan_threads": plan.plan_threads,
            "k_slices": plan.k_slices,
            "source": SOURCES[plan.source],
            "refused": plan.refused,
            "provisional": REASONS.get(plan.provisional, ""),
            "speedup": plan.speedup,
            "spread": plan.spread,
            "no_speedup": self.why_no_speedup(plan),
            "roofline": None if spot is None else spot.share,
            "gflops": None if spot is None else spot.operations / 1e9,
            "intensity": None if spot is None else spot.intensity,
            "milliseconds": dict(plan.table).get(spell(plan), dict(plan.table).get(plan.name)),
            "measured": [*plan.measured],
        }


@dataclass
class NodeReport:
    """One node of a graph that torch.compile made of the model.

    outcome: "fast": a product on packed weights; "fused": done by the node that `why` names; "dropped"; "torch":
    torch's own op. why: into what, or why not, in a few words; "" where nothing spoke for another outcome. work: the
    multiply-adds of activations with one another, dynamic sizes counted as 1.
    """

    name: str
    op: str
    outcome: str = "torch"
    why: str = ""
    work: int = 0


class Weight(NamedTuple):
    """What a graph multiplies by: the parameter, or panels, of a module. rows: those of it, None for all."""

    tensor: Any
    rows: range | None


class Graph(Protocol):
    """What the Dynamo backend has compiled. reason: why all of it is torch's own, None where it is not; layers: those
    it runs, each with the modules' weights that it is packed from; mixtures: experts that it runs, on these weights;
    tables: of the ids of parameters that it reads, whether it never multiplies by them."""

    nodes: tuple[NodeReport, ...]
    reason: str | None
    tables: Mapping[int, bool]

    @property
    def layers(self) -> tuple[tuple[Any, tuple[Weight, ...]], ...]: ...

    @property
    def mixtures(self) -> tuple[Any, ...]: ...

    def is_of(self, model: nn.Module) -> bool: ...
