"""A cold call of fast experts prepares: their weights are packed, and what runs for their rows is planned."""

from __future__ import annotations

import functools
import time
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

import fastlinear._engine as _engine
import fastlinear._experts as _experts
import fastlinear._fingerprints as _fingerprints
import fastlinear._plans as _plans
import fastlinear._products as _products
from fastlinear.layer.lock import lock
from fastlinear.layer.packs import pack_apart
from fastlinear.layer.shelf import Shelf, shelve
from fastlinear.layer.stack import fit
from fastlinear.plan import decide, measuring
from fastlinear.plan.candidates import Chosen
from fastlinear.plan.problem import Problem, asked_of
from fastlinear.spec import programs
from fastlinear.spec.experts import Form
from fastlinear.spec.formats import name_of
from fastlinear.spec.precision import Precision, epilogue

# From so many multiply-adds on all threads share a grouped product.
_PARALLEL_WORK = 1 << 20


class Ready(NamedTuple):
    """What a call needs of the weights."""

    shelves: tuple[Shelf, Shelf]
    products: tuple[_experts.Projection, _experts.Projection]


@functools.lru_cache(maxsize=1024)
def _plan_of(name: str, threads: int, k_slices: int) -> _plans.Plan:
    return _plans.Plan(name, threads, k_slices)


class Plannable(nn.Module):
    """The part of fast experts that packs and plans."""

    _form: Form
    _tune: str
    _frozen_experts: Any
    _ready: Ready | None
    _known: tuple[_fingerprints.Fingerprint | None, ...]
    _decided: dict[tuple[int, int, str, int], tuple[Chosen, float]]
    _answered: int
    _waits: int

    @property
    def names(self) -> tuple[str, str]:
        raise NotImplementedError

    @property
    def precision(self) -> Precision:
        raise NotImplementedError

    def tensors(self) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
        raise NotImplementedError

    @functools.cached_property
    def _quantizer(self) -> _plans.RowQuantizer | None:
        return self._form.precision.quantizer()

    def _fresh(self) -> Ready | None:
        """The packed weights, packed now if need be; None where they kept changing, until they have stood still."""
        parameters = self._watched()
        ready = self._ready
        if ready is not None and not self._waits and fit(self._known, parameters):
            return ready
        with lock:
            known = tuple(None if p is None else _fingerprints.Fingerprint(p) for p in parameters)
            if self._waits and fit(self._known, parameters):
                self._waits -= 1
            elif self._ready is not None:
                self._waits = _engine.trial if self._answered < _engine.trial else 0
            self._answered, self._known, self._ready = 0, known if self._waits else (None,), None
            if self._waits:
                return None
            frozen = self._frozen_experts
            shelves = (self.packed(0), self.packed(1)) if frozen is None else (frozen.first, frozen.second)
            self._hold(shelves, known)
        return self._ready

    def _watched(self) -> tuple[Tensor | None, ...]:
        first, second = self.names
        names = (first, second, f"{first}_bias", f"{second}_bias")
        return tuple(self._parameters.get(name) for name in names)

    def _hold(self, shelves: tuple[Shelf, Shelf], known: tuple[_fingerprints.Fingerprint | None, ...]) -> None:
        biases = [None if b is None else b.detach() for b in self.tensors()[2:]]
        biases[0] = self._form.bias(biases[0])
        steps = (self._form.program, None)
        products = [
            _experts.Projection(shelf.packs, epilogue(program, None), None if bias is None else bias.contiguous())
            for shelf, program, bias in zip(shelves, steps, biases, strict=True)
        ]
        vars(self).pop("_quantizer", None)
        self._ready, self._known = Ready(shelves, (products[0], products[1])), known
        self._answered = _engine.trial if not self._decided else 0  # the first has credit, as a layer's has

    def packed(self, which: int) -> Shelf:
        """The weights of the one product or the other, packed anew."""
        weights: Any = self._parameters[self.names[which]]
        precision = self.precision
        gated = which == 0 and programs.is_gated(self._form.program)
        every = (pack_apart(self.weight_of(which, expert), precision, gated) for expert in range(len(weights)))
        return shelve(every, len(weights))

    def weight_of(self, which: int, expert: int) -> Tensor:
        """The weight [n, k] of one expert, gates before what goes through them."""
        weight: Tensor = self._parameters[self.names[which]][expert].detach()  # type: ignore[index]
        if which == 0:
            return self._form.weight(weight)
        return weight.mT if self._form.transposed else weight

    def _plan(self, which: int, rows: int, pairs: int, x: torch.dtype, ready: Ready) -> _plans.Plan:
        """What runs the one product or the other, of so many rows an expert."""
        threads = _products.num_threads()
        key = (which, threads, name_of(x), _plans.bucket(rows))
        found, due = self._decided.get(key, (None, 0.0))
        if found is None or (due and time.monotonic() >= due):
            shelf = ready.shelves[which]
            bias = self.tensors()[2 + which]
            problem = self._problem(which, shelf, threads, name_of(x), _plans.bucket(rows))
            own = None if bias is None else bias.detach()[0].contiguous()
            operands = decide.Operands(None, own, shelf.packs[0], self._quantizer)
            found = decide.decide(problem, operands, measure=self._tune == "lazy")
            due = measuring.process.due(problem.key(), found.provisional) if found.provisional else 0.0
            self._decided[key] = found, due
        shelf = ready.shelves[which]
        if pairs * shelf.n * shelf.k >= _PARALLEL_WORK and threads > 1:  # the experts are what threads share
            return _plan_of(found.name, threads, 1)
        return _plan_of(found.name, found.plan_threads, found.k_slices)

    def _problem(self, which: int, shelf: Shelf, threads: int, x: str, bucket: int) -> Problem:
        """What a plan is made for: the product of one expert with its rows."""
        return asked_of(
            shelf,
            self.precision,
            bucket,
            x,
            threads,
            bias=self.tensors()[2 + which] is not None,
            activation=None if which else self._form.program,
        )

    @property
    def decided(self) -> list[Chosen]:
        """The plans in the order of `problem_keys`."""
        return [] if self._ready is None else [plan for plan, _due in self._decided.values()]

    def problem_keys(self) -> list[str]:
        """What the tuning cache knows the plans by."""
        ready = self._ready
        asked = [] if ready is None else list(self._decided)
        return [self._problem(key[0], ready.shelves[key[0]], *key[1:]).key() for key in asked if ready is not None]

    @property
    def plans(self) -> tuple[tuple[Chosen, ...], tuple[Chosen, ...]]:
        """What runs of each product, under torch's present number of threads."""
        threads = _products.num_threads()
        found = [(which, plan) for (which, t, *_), (plan, _due) in list(self._decided.items()) if t == threads]
        return tuple(  # type: ignore[return-value]
            tuple(sorted((plan for w, plan in found if w == which), key=lambda c: (c.x, c.bucket))) for which in (0, 1)
        )

    def ask_again(self, anew: bool) -> None:
        """Forgets the plans that were to be measured but are not (anew: all)."""
        with lock:
            for key, (plan, _) in list(self._decided.items()) if self._tune == "lazy" else ():
                if anew or plan.source in ("heuristic", "neighbor"):
                    del self._decided[key]
            vars(self).update(_answered=_engine.trial, _waits=0)
