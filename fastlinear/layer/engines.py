"""The engines of a fast layer, and what they are asked to compute.

An engine (guards, packed weight, plans) is for one precision: the layer has its own, and gets another for each format
that autocast packs its weight in. They and the record of what was planned are never saved, pickled or copied; a copy
makes its own at its first call, or has the pack of a frozen layer from the start.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

import fastlinear._products as _products
import fastlinear._weights as _weights
from fastlinear._engine import Engine
from fastlinear.layer import gradient, lookup, spelled
from fastlinear.layer.fitness import dtype_of
from fastlinear.layer.frozen import Freezable, record_of, shared_as, watch_parameters
from fastlinear.layer.lock import lock
from fastlinear.layer.shard import Shard
from fastlinear.plan import rivals
from fastlinear.plan.candidates import Chosen
from fastlinear.plan.problem import FROZEN, Problem, asked_of
from fastlinear.spec.activations import Activation
from fastlinear.spec.formats import dtype_of_rows, name_of
from fastlinear.spec.precision import AS_HELD, Precision, epilogue


class WithEngines(Freezable):
    """The part of a fast layer that has its engines."""

    _transposed = False  # True: the weight is [in, out]
    _precision = AS_HELD  # as it was asked for
    _casting: dict[str, Engine]  # engines for autocast, by the formats of their packs, bare ones as "bare bf16"
    _torch_packs: rivals.Packs  # of the weight as it is now
    _stock: tuple[Any, Any] | None = None  # the class that this is the twin of, and its forward as it was
    _absorbed: Any = None  # the marker where the activation stood that this layer applies for it
    _spelled = ""  # what `spelled.form_of` knows its op by
    _tune: str
    _shard: Shard | None = None  # where its weight is one that several processes share
    weight: Tensor
    bias: Any  # Tensor or None; mypy takes the constructor's argument for it
    activation: Activation | None

    @property
    def packed_as(self) -> str:
        """The format that the weight is packed in."""
        frozen = record_of(self)
        if frozen is None:
            return self._precision.of_floats().packed or name_of(self.weight.dtype)
        return str(frozen.packed.format)

    @property
    def precision(self) -> Precision:
        """As it was asked for, with the format that the weight is packed in."""
        return self._precision._replace(packed=self.packed_as)

    def computes(self, bare: bool) -> tuple[Activation | None, Precision]:
        """What the layer computes; bare: in a call whose output may go elsewhere than where the activation stood, or
        the layer that takes integers."""
        if not bare:
            return self.activation, self._precision
        return None if self._absorbed is not None else self.activation, self._precision._replace(out=None)

    @property
    def _differs_by_call(self) -> bool:
        return self._absorbed is not None or self._precision.out is not None

    def _engine_for(self, packed_as: str, bare: bool) -> Engine:
        own, key = self._engine, f"bare {packed_as}" if bare else packed_as
        if packed_as == self.packed_as:
            return own.elsewhere if bare and own.elsewhere is not None else own
        return self._casting.get(key) or self._casting.setdefault(key, self._new_engine(self._cast, bare))

    def _precision_in(self, engine: Engine, packed_as: str) -> Precision:
        """What an engine of this layer computes in: what was asked for, or what autocast does to that."""
        asked = self.computes(engine.bare)[1] if self._is_own(engine) else self._cast
        return asked._replace(packed=packed_as, accumulate=self._precision.accumulate)

    @property
    def _cast(self) -> Precision:
        """What an engine computes in that has the weight in another format."""
        return AS_HELD._replace(products=self._precision.products)

    def problem_keys(self) -> list[str]:
        """What the tuning cache knows the layer's plans by."""
        return [
            self.problem(engine, engine.packed, m, x, threads).key()
            for engine, threads, x, m in list(self._plans)
            if engine.packed is not None
        ]

    def ask_again(self, anew: bool) -> None:
        """Forgets the plans that were to be measured but are not (anew: all), so that the next call that needs one asks
        for it."""
        with lock:
            for key, plan in list(self._plans.items()) if self._tune == "lazy" else ():
                if anew or plan.source in ("heuristic", "neighbor"):
                    engine, threads, x, m = key
                    engine.plan_for(m, threads, dtype_of_rows(x), None)
                    del self._plans[key]

    def problem(self, engine: Engine, packed: _weights.Packed, m: int, x: str, threads: int) -> Problem:
        """What a plan for m rows of format x is made for."""
        frozen, precision = record_of(self), self._precision_in(engine, packed.format)
        return asked_of(
            packed,
            precision,
            m,
            x,
            threads,
            bias=self.bias is not None,
            activation=self.computes(engine.bare)[0],
            held=name_of(dtype_of(self)) if frozen is None else FROZEN,
            transposed=self._transposed,
        )

    def _new_engine(self, precision: Precision, bare: bool = False) -> Engine:
        steps = epilogue(self.computes(bare)[0], None if bare else precision.out)
        engine = Engine(steps, self._transposed, precision.quantizer(), bare)
        if self._shard is not None:
            engine.follow_memory()
        if self._stock is not None:
            engine.stand_for(*self._stock)
        return engine

    def _engines(self) -> list[Engine]:
        own = self._engine
        return [own, *filter(None, [own.elsewhere]), *self._casting.values()]

    def _is_own(self, engine: Engine) -> bool:
        return engine is self._engine or engine is self._engine.elsewhere

    def _reset(self) -> None:
        frozen = record_of(self)
        vars(self)["_shard"] = shared_as(self)
        engine = self._new_engine(self._precision)
        if self._differs_by_call:
            tickets = None if self._absorbed is None else self._absorbed.tickets_of(self)
            engine.join(self._new_engine(self._precision, True), self._absorbed, tickets, self._precision.out)
        if frozen is not None:
            frozen.layers.add(self)
            watch_parameters(self)
            for each in filter(None, (engine, engine.elsewhere)):
                each.hold(frozen.packed)
        vars(self).update(_engine=engine, _casting={}, _plans={}, _torch_packs={})
        vars(self)["_spelled"] = "" if frozen is None else spelled.spell(self)
        vars(self).setdefault("_elsewhere", {})
        lookup.register(self)

    @property
    def plans(self) -> tuple[Chosen, ...]:
        """What runs for each format of x and bucket of M met so far, under torch's present number of threads."""
        threads = _products.num_threads()
        plans = [(engine.bare, plan) for (engine, t, *_), plan in list(self._plans.items()) if t == threads]
        met = {(c.x, c.bucket) for bare, c in plans if not bare}
        shown = [c for bare, c in plans if not bare or (c.x, c.bucket) not in met]
        return tuple(sorted(shown, key=lambda c: (c.x, c.bucket)))

    @property
    def pack_nbytes(self) -> int:
        """Bytes of the packed weight, in all formats, for backward and torch's own ways; 0 before the first call."""
        packs = {id(engine.packed): engine.packed for engine in self._engines()}
        of_torch = (rivals.memory(packed)[1] for packed in list(self._torch_packs.values()))
        own = (packed.nbytes + gradient.nbytes(packed) for packed in packs.values() if packed is not None)
        return sum(own) + sum(of_torch)
