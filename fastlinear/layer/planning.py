"""A cold call of a fast layer prepares: its weight is packed, and what runs for its rows is planned."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

import fastlinear._fingerprints as _fingerprints
import fastlinear._plans as _plans
import fastlinear._products as _products
from fastlinear._engine import Engine
from fastlinear.layer import unpacked
from fastlinear.layer.fitness import why_unread
from fastlinear.layer.frozen import record_of
from fastlinear.layer.lock import lock
from fastlinear.layer.packs import pack
from fastlinear.layer.shard import is_shared
from fastlinear.plan import decide, rivals
from fastlinear.plan.problem import Problem
from fastlinear.spec.formats import DTYPES, name_of
from fastlinear.spec.precision import Precision

_watchers: list[Callable[[Any], object]] = []


@contextmanager
def watching(done: Callable[[Any], object]) -> Iterator[None]:
    """Calls done(layer) whenever a fast layer has planned a call; unlike a hook, it changes nothing of the calls."""
    _watchers.append(done)
    try:
        yield
    finally:
        _watchers.remove(done)


def is_quantized(precision: Precision) -> bool:
    """Whether the numbers of a pack are not those of a floating format."""
    return bool(precision.scheme) or precision.packed not in (None, *DTYPES)


def prepare(layer: Any, engine: Engine, packed_as: str, x: Tensor) -> bool:
    """Packs and plans what a call with x needs; False where torch has to run it."""
    with lock:
        if all(engine is not each for each in layer._engines()):
            return False  # another thread has just frozen or reset the layer
        if not engine.fresh(layer):
            frozen = record_of(layer)
            if why_unread(layer) is not None or layer._frozen is not frozen:
                return False
            vars(layer)["_torch_packs"] = {}
            # Read once: another thread may be setting it, to one of another dtype.
            weight = layer.weight if frozen is None else frozen.unpack(layer._transposed)
            if is_shared(weight):  # of which nobody lent this process's part to the call
                return False
            if layer._is_own(engine):
                packed_as = layer._precision.of_floats().packed or name_of(weight.dtype)
            precision = layer._precision_in(engine, packed_as)
            left = not (layer._is_own(engine) and is_quantized(precision)) or unpacked.answers(precision)
            if frozen is None and not engine.ready(weight) and left:
                return False
            fingerprint = _fingerprints.Fingerprint(weight)
            packed = pack(weight, precision, layer._transposed, fingerprint=fingerprint, gated=layer._gated)
            if frozen is not None:
                engine.hold(packed)
            elif not engine.take(weight, fingerprint, packed):
                for key in [key for key in layer._plans if key[0] is engine]:
                    del layer._plans[key]
    m = x.shape[:-1].numel()
    if m > 0:
        _plan(layer, engine, _plans.bucket(m), x.dtype)
    for done in _watchers:
        done(layer)
    return True


def _plan(layer: Any, engine: Engine, m: int, x: torch.dtype) -> None:
    threads = _products.num_threads()
    key = engine, threads, name_of(x), m
    with lock:
        asked = None if _settled(layer, key, x) else _question(layer, engine, m, x, threads)
        known = layer._plans.get(key)
    if asked is None:
        return
    problem, operands = asked
    if known is None or known.provisional:  # else it stayed when the weight changed, and only torch's own pack is due
        # Without the lock: this may measure, and others have layers to pack.
        known = decide.decide(problem, operands, measure=layer._tune == "lazy", kernel=layer._kernel)
    plan = known
    runs = decide.executable(plan, problem, operands)
    with lock:
        if engine.packed is not operands.packed or not engine.fresh(layer) or _settled(layer, key, x):
            return  # repacked or planned by another thread meanwhile, or about to be
        engine.plan_for(m, threads, x, runs)
        layer._plans[key] = plan
        spare, weight = operands.spare, layer._parameters.get("weight")
        if spare is not None and weight is not None and plan.refused and plan.name not in rivals.NAMES:
            holding = f"bare {spare.format}" if engine.bare else spare.format  # counts, and shares, its memory
            holder = layer._casting.setdefault(holding, layer._new_engine(layer._cast, engine.bare))
            if not holder.fresh(layer):
                holder.take(weight, _fingerprints.Fingerprint(weight), spare)


def _settled(layer: Any, key: tuple[Engine, int, str, int], x: torch.dtype) -> bool:
    """Whether the engine has a plan that is not to be asked for again."""
    engine, threads, _, m = key
    return key in layer._plans and not layer._plans[key].provisional and engine.planned(m, threads, x)


def _question(
    layer: Any, engine: Engine, m: int, x: torch.dtype, threads: int
) -> tuple[Problem, decide.Operands] | None:
    """What a plan is to be found for, and the tensors to measure with; None where there are no kernels."""
    packed = engine.packed
    if packed is None:
        return None
    precision = layer._precision_in(engine, packed.format)
    if not precision.takes(x):
        return None
    weight, bias = None if record_of(layer) else layer.weight, layer.bias
    problem = layer.problem(engine, packed, m, name_of(x), threads)
    spare = None
    if weight is not None and problem.fallback:
        spare = pack(weight, Precision(problem.held), layer._transposed, gated=layer._gated)
    return problem, decide.Operands(
        weight=None if weight is None else weight.detach(),
        bias=None if bias is None else bias.detach(),
        packed=packed,
        rows=engine.rows,
        out=precision.out,
        spare=spare,
        torch_packs=layer._torch_packs,
    )
