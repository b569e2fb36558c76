"""sensitivity: which kinds of layers quantizing hurts, by what the user measures."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from fastlinear.layer.fitness import features_of
from fastlinear.model.arguments import call, check_example, check_module, tensors_in
from fastlinear.model.convert import convert
from fastlinear.model.selection import REASON, linear_layers
from fastlinear.spec.schemes import Int8Dynamic, Scheme

Metric = Callable[[Any, Any], float]


@dataclass(frozen=True)
class Kind:
    """Layers that are alike but for numbers in their names. loss: what quantizing these alone costs, in the metric."""

    pattern: str
    names: tuple[str, ...]
    weights: int
    loss: float


@dataclass(frozen=True)
class Sensitivity:
    """kinds: worst first; everything: the loss with all of them quantized; exclude: patterns for `convert(exclude=...)`
    that bring it down to `target`, and `excluded` the loss that was then measured, both None where nothing needs to be
    left out, or nothing reaches the target; skipped: layers that could not be quantized, and why."""

    kinds: tuple[Kind, ...]
    everything: float
    target: float
    exclude: tuple[str, ...] | None
    excluded: float | None
    skipped: Mapping[str, str]

    def __str__(self) -> str:
        width = max([len("all of them"), *(len(kind.pattern) for kind in self.kinds)])
        total = sum(kind.weights for kind in self.kinds)
        lines = [f"{'quantized alone':<{width}} {'layers':>6} {'weights':>8} {'loss':>10}"]
        lines.append("-" * len(lines[0]))
        for kind in self.kinds:
            share = f"{kind.weights / total:.0%}"
            lines.append(f"{kind.pattern:<{width}} {len(kind.names):>6} {share:>8} {kind.loss:>10.3g}")
        count = sum(len(kind.names) for kind in self.kinds)
        lines.append(f"{'all of them':<{width}} {count:>6} {'100%':>8} {self.everything:>10.3g}")
        if self.exclude is not None:
            lines += ["", f"exclude={[*self.exclude]!r} brings it to {self.excluded:.3g}"]
        elif self.everything > self.target:
            lines += ["", f"no choice of these kinds brings it to {self.target:.3g}"]
        return "\n".join(lines)


def relative_error(output: Any, reference: Any) -> float:
    """The default metric: |output - reference| over |reference|, Euclidean, over all floating tensors in both."""
    both = zip(tensors_in(output), tensors_in(reference), strict=True)
    pairs = [(a.double(), b.double()) for a, b in both if b.is_floating_point()]
    norm = sum(float(b.square().sum()) for _, b in pairs)
    return (sum(float((a - b).square().sum()) for a, b in pairs) / norm) ** 0.5 if norm else 0.0


def sensitivity(
    model: nn.Module,
    batches: Iterable[Any],
    *,
    metric: Metric = relative_error,
    quantize: Scheme | None = None,
    target: float | None = None,
) -> Sensitivity:
    """Quantize one kind of layer at a time, and rank the kinds by what that costs.

    model: not converted; it stays as it is. Its layers are of one kind where their names differ in numbers only.
    batches: examples to run, as for `calibrate`; they and the outputs of the model are kept.
    metric: metric(output, reference) -> float, of a batch: larger is worse, 0 is as before. output is the quantized
        model's, reference this model's. Losses are means over the batches.
    quantize: the scheme; None is Int8Dynamic().
    target: the loss to come down to by leaving kinds out, worst first; None is half of what quantizing all costs.

    Runs the model once for each batch and kind, and as often again while it looks for what to exclude. Raises TypeError
    or ValueError for arguments of a wrong kind, where there is no batch, and where no layer can be quantized.
    """
    check_module("sensitivity", model)
    scheme = Int8Dynamic() if quantize is None else quantize
    examples = list(batches)
    for batch in examples:
        check_example(batch)
    if not examples:
        raise ValueError("sensitivity was given no batches")
    kinds, skipped = _kinds(model, scheme)
    mode = model.training
    model.eval()
    try:
        with torch.no_grad():
            references = [call(model, batch) for batch in examples]

            def loss(names: list[str]) -> float:
                quantized = convert(model, include=names, quantize=scheme, tune="off", fuse=False)
                found = (metric(call(quantized, batch), ref) for batch, ref in zip(examples, references, strict=True))
                return sum(map(float, found)) / len(examples)

            ranked = sorted((_with_loss(kind, loss) for kind in kinds), key=lambda kind: -kind.loss)
            everything = loss([name for kind in ranked for name in kind.names])
            wanted = everything / 2 if target is None else float(target)
            exclude, excluded = _proposal(ranked, everything, wanted, loss)
    finally:
        model.train(mode)
    return Sensitivity(tuple(ranked), everything, wanted, exclude, excluded, skipped)


def _kinds(model: nn.Module, scheme: Scheme) -> tuple[list[Kind], dict[str, str]]:
    layers: dict[str, Any] = {names[0]: layer for layer, names in linear_layers(model).items()}
    trial = convert(model, include=list(layers), quantize=scheme, tune="off", fuse=False)
    from_trial = {names[0]: layer for layer, names in linear_layers(trial).items()}
    skipped: dict[str, str] = {}
    found: dict[str, list[str]] = {}
    for name, layer in from_trial.items():
        reason = vars(layer).get(REASON)
        if reason:
            skipped[name] = reason
        else:
            found.setdefault(re.sub(r"(?<![^.])\d+(?![^.])", "*", name), []).append(name)
    if not found:
        raise ValueError(f"no layer of {type(model).__name__} can be quantized: {skipped or 'it has no linear layer'}")
    return [
        Kind(pattern, tuple(names), sum(math.prod(features_of(layers[name])) for name in names), 0.0)
        for pattern, names in found.items()
    ], skipped


def _with_loss(kind: Kind, loss: Callable[[list[str]], float]) -> Kind:
    return Kind(kind.pattern, kind.names, kind.weights, loss([*kind.names]))


def _proposal(
    ranked: list[Kind], everything: float, target: float, loss: Callable[[list[str]], float]
) -> tuple[tuple[str, ...] | None, float | None]:
    """The fewest of the worst kinds whose exclusion brings the measured loss to the target."""
    if everything <= target:
        return None, None
    for count in range(1, len(ranked)):
        left = loss([name for kind in ranked[count:] for name in kind.names])
        if left <= target:
            return tuple(kind.pattern for kind in ranked[:count]), left
    return None, None
