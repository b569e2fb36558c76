"""The part of a fast layer that packs its weight and plans its calls, when a call first needs it.

An engine (guards, packed weight, plans) is for one precision: the layer has its own, and gets another for each format
that autocast packs its weight in. They and the record of what was chosen are never saved, pickled or copied; a copy
makes its own at its first call, or has the pack of a frozen layer from the start.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

import fastlinear._engine as _engine
import fastlinear._environment as environment
import fastlinear._kernels as _kernels
from fastlinear._engine import Engine
from fastlinear.layer import gradient, operator
from fastlinear.layer.frozen import Freezable, Frozen
from fastlinear.layer.packs import dtype_of, odd_dtype, pack, record_of, why_unfit
from fastlinear.layer.packs import lock as _lock
from fastlinear.plan import decide, rivals
from fastlinear.plan.candidates import FROZEN, Chosen, Problem
from fastlinear.spec.activations import Activation
from fastlinear.spec.int8 import handed_on
from fastlinear.spec.precision import AS_HELD, Precision, dtype_of_rows, epilogue, long_name, name_of
from fastlinear.spec.reference import Reference

_watchers: list[Callable[[Any], object]] = []


@contextmanager
def watching(done: Callable[[Any], object]) -> Iterator[None]:
    """Calls done(layer) whenever a fast layer has planned a call; unlike a hook, it changes nothing of the calls."""
    _watchers.append(done)
    try:
        yield
    finally:
        _watchers.remove(done)


class Planned(Freezable):
    """What a fast layer needs beside its parameters to run natively."""

    _precision = AS_HELD  # as it was asked for
    _casting: dict[str, Engine]  # engines for autocast, by the formats of their packs, bare ones as "bare bf16"
    _torch_packs: rivals.Packs  # of the weight as it is now
    _elsewhere: dict[str, int]  # calls that the kernels did not answer, by reason
    _absorbed: Any = None  # the marker where the activation stood that this layer applies for it
    _tune: str
    weight: Tensor
    bias: Any  # Tensor or None; mypy takes the constructor's argument for it
    activation: Activation | None
    in_features: int
    out_features: int

    @property
    def packed_as(self) -> str:
        """The format that the weight is packed in."""
        frozen = record_of(self)
        return (self._precision.packed or name_of(self.weight.dtype)) if frozen is None else str(frozen.packed.format)

    @property
    def precision(self) -> Precision:
        """As it was asked for, with the format that the weight is packed in."""
        return self._precision._replace(packed=self.packed_as)

    @property
    def dtypes(self) -> str:
        """The dtype of the parameter and, where it is another one, of its pack: "float32 as bfloat16"."""
        return " as ".join(dict.fromkeys((long_name(name_of(dtype_of(self))), long_name(self.packed_as))))

    def _takes(self, x: Tensor) -> bool:
        """Whether there are kernels for the dtypes of x, weight, bias and pack."""
        return self.precision.takes(x.dtype) and odd_dtype(dtype_of(self), self.bias) is None

    def _differentiated(self, x: Tensor) -> bool:
        operands = (x, None if record_of(self) else self.weight, self.bias)
        return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in operands)

    def _answer(self, x: Tensor, packed_as: str, bare: bool = False) -> Tensor | None:
        """The answer of the kernels, with a backward where gradients are wanted; None where torch has to compute it."""
        if self.training or not self._differentiated(x):
            return self._native(x, packed_as, bare)
        frozen = record_of(self)
        weight = self._parameters.get("weight") if frozen is None else frozen.panels
        with torch.no_grad():
            y = self._native(x, packed_as, bare)
        if y is None or weight is None:
            return None
        engine = self._engine_for(packed_as, bare)
        chosen = self._chosen.get(
            (engine, _kernels.num_threads(), name_of(x.dtype), _engine.bucket(x.shape[:-1].numel()))
        )
        kernel = chosen is not None and chosen.name not in rivals.NAMES and not chosen.refused
        packed, plan = engine.packed, decide.native(chosen) if chosen and kernel else None
        native = None if packed is None else gradient.Native(packed, plan, engine.rows)  # None: thawed meanwhile
        reference = self._reference(self._precision_in(engine, packed_as), frozen, bare)
        out = reference.precision.out
        y = y if out is None else handed_on(y, out)
        return gradient.attach(lambda: y, x, weight, self.bias, reference, native)

    def _reference(self, precision: Precision, frozen: Frozen | None, bare: bool) -> Reference:
        panels = ("", 0, 0) if frozen is None else frozen.form
        return Reference(self.computes(bare)[0], precision, self._transposed, panels)

    def _engine_for(self, packed_as: str, bare: bool) -> Engine:
        own, key = self._engine, f"bare {packed_as}" if bare else packed_as
        if packed_as == self.packed_as:
            return own.elsewhere if bare and own.elsewhere is not None else own
        return self._casting.get(key) or self._casting.setdefault(key, self._new_engine(AS_HELD, bare))

    def computes(self, bare: bool) -> tuple[Activation | None, Precision]:
        """What the layer computes; bare: in a call whose output may go elsewhere than where the activation stood, or
        the layer that takes integers."""
        if not bare:
            return self.activation, self._precision
        return None if self._absorbed is not None else self.activation, self._precision._replace(out=None)

    @property
    def _differs_by_call(self) -> bool:
        return self._absorbed is not None or self._precision.out is not None

    def _native(self, x: Tensor, packed_as: str, bare: bool = False) -> Tensor | None:
        """The answer of the engine with a pack in that format, packed and planned for if need be; None where torch has
        to compute it."""
        engine = self._engine_for(packed_as, bare)
        y = engine.attempt(self, x)
        if y is not None or not self._precision_in(engine, packed_as).takes(x.dtype):
            return y
        fit = not x.is_nested and x.dim() > 0 and x.shape[-1] == self._columns()
        off = self.training or environment.disabled()
        if fit and not off and not self._differentiated(x) and self._prepare(engine, packed_as, x):
            y = engine.attempt(self, x)
        return y

    def _columns(self) -> int:
        """Of x. The weight may have been given another shape through `.data`."""
        weight = self._parameters.get("weight")
        return self.in_features if weight is None else int(weight.shape[0 if self._transposed else -1])

    def _prepare(self, engine: Engine, packed_as: str, x: Tensor) -> bool:
        """Packs and plans what a call with x needs; False where torch has to run it."""
        with _lock:
            if all(engine is not each for each in self._engines()):
                return False  # another thread has just frozen or reset the layer
            if not engine.fresh(self):
                frozen = record_of(self)
                if why_unfit(self) is not None or self._frozen is not frozen:
                    return False
                vars(self)["_torch_packs"] = {}
                # Read once: another thread may be setting it, to one of another dtype.
                weight = self.weight if frozen is None else frozen.unpack(self._transposed)
                if self._is_own(engine):
                    packed_as = self._precision.packed or name_of(weight.dtype)
                precision = self._precision_in(engine, packed_as)
                # What is rounded or quantized is the pack's numbers, whatever torch would be quicker with.
                rounded = self._is_own(engine) and (precision.scheme or packed_as != name_of(weight.dtype))
                if frozen is None and not engine.ready(weight) and not rounded:
                    return False
                fingerprint = _engine.Fingerprint(weight)
                packed = pack(weight, precision, self._transposed, fingerprint=fingerprint)
                if frozen is not None:
                    engine.hold(packed)
                elif not engine.take(weight, fingerprint, packed):
                    for key in [key for key in self._chosen if key[0] is engine]:
                        del self._chosen[key]
        m = x.shape[:-1].numel()
        if m > 0:
            self._plan(engine, _engine.bucket(m), x.dtype)
        for done in _watchers:
            done(self)
        return True

    def _precision_in(self, engine: Engine, packed_as: str) -> Precision:
        """What an engine of this layer computes in: what was asked for, or what autocast does to that."""
        asked = self.computes(engine.bare)[1] if self._is_own(engine) else AS_HELD
        return asked._replace(packed=packed_as, accumulate=self._precision.accumulate)

    def _plan(self, engine: Engine, m: int, x: torch.dtype) -> None:
        threads = _kernels.num_threads()
        key = engine, threads, name_of(x), m
        with _lock:
            asked = None if self._settled(key, x) else self._question(engine, m, x, threads)
            known = self._chosen.get(key)
        if asked is None:
            return
        problem, operands = asked
        if (
            known is None or known.provisional
        ):  # else it stayed when the weight changed, and only torch's own pack is due
            # Without the lock: this may measure, and others have layers to pack.
            known = decide.decide(problem, operands, measure=self._tune == "lazy")
        chosen = known
        runs = decide.executable(chosen, problem, operands)
        with _lock:
            if engine.packed is not operands.packed or not engine.fresh(self) or self._settled(key, x):
                return  # repacked or planned by another thread meanwhile, or about to be
            engine.plan_for(m, threads, x, runs)
            self._chosen[key] = chosen
            spare, weight = operands.spare, self._parameters.get("weight")
            if spare is not None and weight is not None and chosen.refused and chosen.name not in rivals.NAMES:
                holding = f"bare {spare.format}" if engine.bare else spare.format  # counts, and shares, its memory
                holder = self._casting.setdefault(holding, self._new_engine(AS_HELD, engine.bare))
                if not holder.fresh(self):
                    holder.take(weight, _engine.Fingerprint(weight), spare)

    def _settled(self, key: tuple[Engine, int, str, int], x: torch.dtype) -> bool:
        """Whether the engine has a plan that is not to be asked for again."""
        engine, threads, _, m = key
        return key in self._chosen and not self._chosen[key].provisional and engine.planned(m, threads, x)

    def _question(self, engine: Engine, m: int, x: torch.dtype, threads: int) -> tuple[Problem, decide.Operands] | None:
        """What a plan is to be found for, and the tensors to measure with; None where there are no kernels."""
        packed = engine.packed
        if packed is None:
            return None
        precision = self._precision_in(engine, packed.format)
        if not precision.takes(x):
            return None
        weight, bias = None if record_of(self) else self.weight, self.bias
        problem = self.problem(engine, packed, m, name_of(x), threads)
        spare = None
        if weight is not None and problem.fallback:
            spare = pack(weight, Precision(problem.held), self._transposed)
        return problem, decide.Operands(
            weight=None if weight is None else weight.detach(),
            bias=None if bias is None else bias.detach(),
            packed=packed,
            rows=engine.rows,
            out=precision.out,
            spare=spare,
            torch_packs=self._torch_packs,
        )

    def ask_again(self) -> None:
        """Forgets the plans that were to be measured but are not, so that the next call that needs one asks anew."""
        with _lock:
            for key, chosen in list(self._chosen.items()) if self._tune == "lazy" else ():
                if chosen.source in ("heuristic", "neighbor"):
                    engine, threads, x, m = key
                    engine.plan_for(m, threads, dtype_of_rows(x), None)
                    del self._chosen[key]

    def problem(self, engine: Engine, packed: _kernels.Packed, m: int, x: str, threads: int) -> Problem:
        """What a plan for m rows of format x is made for."""
        frozen, precision = record_of(self), self._precision_in(engine, packed.format)
        return Problem(
            m=m,
            n=packed.n,
            k=packed.k,
            x=x,
            packed=packed.format,
            held=name_of(dtype_of(self)) if frozen is None else FROZEN,
            accumulate=precision.accumulate,
            bias=self.bias is not None,
            activation=self.computes(engine.bare)[0],
            transposed=self._transposed,
            threads=threads,
            scheme=precision.scheme,
            fallback=precision.fallback and frozen is None,
            layout=packed.layout,
        )

    def _new_engine(self, precision: Precision, bare: bool = False) -> Engine:
        steps = epilogue(self.computes(bare)[0], None if bare else precision.out)
        return Engine(steps, self._transposed, precision.quantizer(), bare)

    def _engines(self) -> list[Engine]:
        own = self._engine
        return [own, *filter(None, [own.elsewhere]), *self._casting.values()]

    def _is_own(self, engine: Engine) -> bool:
        return engine is self._engine or engine is self._engine.elsewhere

    def _reset(self) -> None:
        engine, frozen = self._new_engine(self._precision), record_of(self)
        if self._differs_by_call:
            tickets = None if self._absorbed is None else self._absorbed.tickets_of(self)
            engine.join(self._new_engine(self._precision, True), self._absorbed, tickets, self._precision.out)
        if frozen is not None:
            frozen.layers.add(self)
            for each in filter(None, (engine, engine.elsewhere)):
                each.hold(frozen.packed)
        vars(self).update(_engine=engine, _casting={}, _chosen={}, _torch_packs={})
        vars(self).setdefault("_elsewhere", {})
        operator.register(self)

    @property
    def plans(self) -> tuple[Chosen, ...]:
        """What runs for each format of x and bucket of M met so far, under torch's present number of threads."""
        threads = _kernels.num_threads()
        chosen = [(engine.bare, chosen) for (engine, t, *_), chosen in list(self._chosen.items()) if t == threads]
        met = {(c.x, c.bucket) for bare, c in chosen if not bare}
        shown = [c for bare, c in chosen if not bare or (c.x, c.bucket) not in met]
        return tuple(sorted(shown, key=lambda c: (c.x, c.bucket)))

    @property
    def pack_nbytes(self) -> int:
        """Bytes of the packed weight, in all formats and for torch's own ways, too; 0 before the first call."""
        packs = {id(engine.packed): engine.packed for engine in self._engines()}
        of_torch = (rivals.memory(packed)[1] for packed in list(self._torch_packs.values()))
        return sum(packed.nbytes for packed in packs.values() if packed is not None) + sum(of_torch)
