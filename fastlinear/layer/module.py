"""How a fast layer answers: the engine calls its kernels, torch answers where they cannot, and a cold call prepares.

An engine (guards, packed weight, plans) is for one precision: the layer has its own, and gets another for each format
that autocast packs its weight in. They and the record of what was plan are never saved, pickled or copied; a copy
makes its own at its first call, or has the pack of a frozen layer from the start.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from inspect import getmembers
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fastlinear._engine as _engine
import fastlinear._environment as environment
import fastlinear._products as _products
import fastlinear._tensors as _tensors
import fastlinear._weights as _weights
from fastlinear._engine import Engine
from fastlinear.layer import gradient, operator
from fastlinear.layer.elsewhere import why_elsewhere
from fastlinear.layer.fitness import dtype_of, odd_dtype, why_unread
from fastlinear.layer.frozen import Freezable, Frozen, record_of, watch_parameters
from fastlinear.layer.lock import lock
from fastlinear.layer.packs import pack
from fastlinear.plan import decide, rivals
from fastlinear.plan.candidates import Plan
from fastlinear.plan.decide import tell
from fastlinear.plan.problem import FROZEN, Problem
from fastlinear.spec import activations, programs
from fastlinear.spec.activations import Activation
from fastlinear.spec.formats import DTYPES, FP32, dtype_of_rows, long_name, name_of
from fastlinear.spec.precision import AS_HELD, Precision, epilogue
from fastlinear.spec.reference import Reference

_UNSAVED = (
    "_engine",
    "_casting",
    "_plans",
    "_torch_packs",
    "_elsewhere",
    "_panels",
    "_form",
    "__jit_ignored_attributes__",
)

_BY_TORCH = (_engine.UNFIT, _engine.TRAINING, _engine.DISABLED)

_is_dynamo_compiling = torch.compiler.is_dynamo_compiling

_watchers: list[Callable[[Any], object]] = []


@contextmanager
def watching(done: Callable[[Any], object]) -> Iterator[None]:
    """Calls done(layer) whenever a fast layer has planned a call; unlike a hook, it changes nothing of the calls."""
    _watchers.append(done)
    try:
        yield
    finally:
        _watchers.remove(done)


class FastModule(Freezable):
    """What FastLinear and its twin for transformers' Conv1D have in common; mixed in before the stock class."""

    _transposed = False  # True: the weight is [in, out]
    __jit_unused_properties__: list[str]
    _precision = AS_HELD  # as it was asked for
    _casting: dict[str, Engine]  # engines for autocast, by the formats of their packs, bare ones as "bare bf16"
    _torch_packs: rivals.Packs  # of the weight as it is now
    _elsewhere: dict[str, int]  # calls that the kernels did not answer, by reason
    _is_quick = False  # calls go to the engine without nn.Module.__call__
    _absorbed: Any = None  # the marker where the activation stood that this layer applies for it
    _tune: str
    _kernel: str | None = None  # what `linear.force` told it to run
    weight: Tensor
    bias: Any  # Tensor or None; mypy takes the constructor's argument for it
    activation: Activation | None
    in_features: int
    out_features: int

    # ---- what it is ----

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
    def _gated(self) -> bool:
        return programs.is_gated(self.activation)

    @property
    def _channels(self) -> int:
        """Rows of the weight."""
        return 2 * self.out_features if self._gated else self.out_features

    @property
    def dtypes(self) -> str:
        """The dtype of the parameter and, where it is another one, of its pack: "float32 as bfloat16"; and what x is
        rounded to: "float32 as bfloat16 products"."""
        held = " as ".join(dict.fromkeys((long_name(name_of(dtype_of(self))), long_name(self.packed_as))))
        products = long_name(self._precision.products)
        if self._precision.products == FP32:
            return held
        return f"{held} products" if products == long_name(self.packed_as) else f"{held}, {products} products"

    # ---- call ----

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        cls._is_quick = cls.forward is FastModule.forward  # a user's own forward is to be called
        _engine.quicken(cls)

    def forward(self, input: Tensor) -> Tensor:
        return self._forward(input)

    def _forward(self, input: Tensor) -> Tensor:
        if torch.jit.is_scripting():  # type: ignore[attr-defined]
            if self._panels is None:
                y: Tensor = torch.ops.fastlinear.linear(input, self.weight, self.bias, *self._form)
            else:
                y = torch.ops.fastlinear.linear(input, self._panels, self.bias, *self._form)
        else:
            y = self._run(input)
        return y

    def _run(self, input: Tensor, operands: tuple[Tensor, ...] = ()) -> Tensor:
        if _is_dynamo_compiling():
            bare = self._differs_by_call  # the marker, which is traced too, applies the original
            exporting = torch.compiler.is_exporting()
            way = self._torch if exporting else functools.partial(operator.linear, self)
            return way(input, bare, operands)
        return self._engine.forward(self, input, operands)

    def __prepare_scriptable__(self) -> FastModule:
        """Gives torch.jit.script what `forward` asks for in a script."""
        panels, form = operator.for_script(self, self._differs_by_call)
        hidden = [] if panels is None else ["weight"]  # that of a frozen layer is no attribute
        vars(self).update(_panels=panels, _form=form, __jit_ignored_attributes__=hidden)
        return self

    def _slow(self, x: Tensor, why: str, bare: bool, operands: tuple[Tensor, ...] = ()) -> Tensor:
        """Answers a call that the engine did not; `why` is one of the reasons in _engine."""
        if why == _engine.PROFILED:
            return operator.linear(self, x, bare, operands)
        if isinstance(x, torch.fx.Proxy) and not self.training and why != _engine.DISABLED:
            return operator.recorded(self, x, bare, operands)
        if why == _engine.AUTOCAST:
            y = self._under_autocast(x, bare, operands)
        else:
            y = None if why in _BY_TORCH else self._answer(x, self.packed_as, bare, operands)
        if y is None:
            self._count(x, why)
            y = self._torch(x, bare, operands)
            if why not in (_engine.UNFIT, _engine.DISABLED, _engine.AUTOCAST) and record_of(self) is None:
                self._teach(self._engine_for(self.packed_as, bare), bare)
        return y

    def _teach(self, engine: Engine, bare: bool) -> None:
        """Tells the engine how torch answers in training mode and while the weight keeps changing."""
        activation, precision = self.computes(bare)
        plain = changing = rivals.make(rivals.BASELINE, self.weight, self._transposed, activation, {}).run
        if precision.packed not in (None, name_of(self.weight.dtype)):
            changing = Reference(activation, precision, self._transposed).floats
        engine.plainly(plain, None if _is_quantized(precision) else changing, self._elsewhere)

    def _count(self, x: Tensor, why: str) -> None:
        reason = why_elsewhere(self, x, why in (_engine.STALE, _engine.GRADIENT))
        count = self._elsewhere[reason] = self._elsewhere.get(reason, 0) + 1
        if count == 1:
            tell(f"{label(self)} goes round the kernels: {reason}")

    def _under_autocast(self, x: Tensor, bare: bool, operands: tuple[Tensor, ...]) -> Tensor | None:
        """What stock autocast makes of the call: x and the weight are cast to its dtype."""
        if self.training:
            return None
        if not torch.is_autocast_enabled("cpu"):  # another device's is
            return self._answer(x, self.packed_as, bare, operands)
        dtype = torch.get_autocast_dtype("cpu")
        if x.dtype not in _tensors.FORMATS and self._precision.takes(x.dtype):  # integers stay what they are
            return self._answer(x, self.packed_as, bare, operands)
        if x.dtype not in _tensors.FORMATS or dtype not in _tensors.FORMATS:
            return None
        return self._answer(x.to(dtype), self._precision.under(dtype), bare, operands)

    def _takes(self, x: Tensor) -> bool:
        """Whether there are kernels for the dtypes of x, weight, bias and pack."""
        return self.precision.takes(x.dtype) and odd_dtype(dtype_of(self), self.bias) is None

    def _differentiated(self, x: Tensor, operands: tuple[Tensor, ...] = ()) -> bool:
        tensors = (x, None if record_of(self) else self.weight, self.bias, *operands)
        return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)

    def _answer(
        self, x: Tensor, packed_as: str, bare: bool = False, operands: tuple[Tensor, ...] = ()
    ) -> Tensor | None:
        """The answer of the kernels, with a backward where gradients are wanted; None where torch has to compute it."""
        if self.training or not self._differentiated(x, operands):
            return self._native(x, packed_as, bare, operands)
        frozen = record_of(self)
        with torch.no_grad():
            y = self._native(x, packed_as, bare, operands)
        engine = self._engine_for(packed_as, bare)
        packed, weight = engine.packed, self._parameters.get("weight")
        if y is None or packed is None or (weight is None and frozen is None):  # None: thawed meanwhile
            return None
        attach = gradient.Attachment(
            self._reference(self._precision_in(engine, packed_as), frozen, bare),
            None if frozen is None else frozen.panels,
            self._tune == "lazy",
        )
        engine.attach_by(attach)
        return attach(x, weight, self.bias, y, (engine, packed), operands)

    def _reference(self, precision: Precision, frozen: Frozen | None, bare: bool) -> Reference:
        panels = ("", 0, 0) if frozen is None else frozen.form
        return Reference(self.computes(bare)[0], precision, self._transposed, panels)

    def _engine_for(self, packed_as: str, bare: bool) -> Engine:
        own, key = self._engine, f"bare {packed_as}" if bare else packed_as
        if packed_as == self.packed_as:
            return own.elsewhere if bare and own.elsewhere is not None else own
        return self._casting.get(key) or self._casting.setdefault(key, self._new_engine(self._cast, bare))

    def computes(self, bare: bool) -> tuple[Activation | None, Precision]:
        """What the layer computes; bare: in a call whose output may go elsewhere than where the activation stood, or
        the layer that takes integers."""
        if not bare:
            return self.activation, self._precision
        return None if self._absorbed is not None else self.activation, self._precision._replace(out=None)

    @property
    def _differs_by_call(self) -> bool:
        return self._absorbed is not None or self._precision.out is not None

    def _native(
        self, x: Tensor, packed_as: str, bare: bool = False, operands: tuple[Tensor, ...] = ()
    ) -> Tensor | None:
        """The answer of the engine with a pack in that format, packed and planned for if need be; None where torch has
        to compute it."""
        engine = self._engine_for(packed_as, bare)
        y = engine.attempt(self, x, operands)
        if y is not None or not self._precision_in(engine, packed_as).takes(x.dtype):
            return y
        fit = not x.is_nested and x.dim() > 0 and x.shape[-1] == self._columns()
        off = self.training or environment.disabled()
        if fit and not off and not self._differentiated(x, operands) and self._prepare(engine, packed_as, x):
            y = engine.attempt(self, x, operands)
        return y

    def _columns(self) -> int:
        """Of x. The weight may have been given another shape through `.data`."""
        weight = self._parameters.get("weight")
        return self.in_features if weight is None else int(weight.shape[0 if self._transposed else -1])

    # ---- fall back ----

    def _torch(self, x: Tensor, bare: bool = False, operands: tuple[Tensor, ...] = ()) -> Tensor:
        """The answer in torch's own ops: in training, and where the user switched the kernels off, of the parameter as
        it is, which for a frozen layer is what it is packed in; otherwise of the numbers that the kernels multiply."""
        try:
            plain = self.training or environment.disabled() or self._is_odd(x)
            return self._plain(x, bare, operands) if plain else self._referred(x, bare, operands)
        except RuntimeError as error:  # looked at only now, because torch.jit.trace warns of every look at a shape
            if isinstance(x, Tensor) and not x.is_nested and (x.dim() == 0 or x.shape[-1] != self.in_features):
                raise RuntimeError(
                    f"{label(self)} takes inputs whose last dimension is in_features={self.in_features}, "
                    f"not a tensor of shape {tuple(x.shape)}"
                ) from error
            raise

    def _each(self, x: Any, bare: bool) -> Tensor:
        """The answer to a nested tensor, part by part, since rows are quantized by what is in them."""

        def part(rows: Tensor) -> Tensor:
            y = self._engine.forward(self, rows)
            return y if bare or self._absorbed is None else programs.apply(self.activation, y)

        if x.layout is torch.jagged:
            y = part(x.values())
            return torch.nested.nested_tensor_from_jagged(y, x.offsets(), x.lengths())
        return torch.nested.as_nested_tensor([part(rows) for rows in x.unbind()])

    def _plain(self, x: Tensor, bare: bool, operands: tuple[Tensor, ...]) -> Tensor:
        frozen = record_of(self)
        x = self._precision.numbers(x) if isinstance(x, Tensor) else x
        weight, bias = self.weight if frozen is None else frozen.unpack(self._transposed), self.bias
        mixed = isinstance(x, Tensor) and any(t is not None and t.dtype is not x.dtype for t in (weight, bias))
        if mixed and self._takes(x):
            weight, bias = weight.to(x.dtype), None if bias is None else bias.to(x.dtype)
        y = F.linear(x, weight.t() if self._transposed else weight, bias)
        return programs.apply(self.computes(bare)[0], y, operands)

    def _is_odd(self, x: Any) -> bool:
        """Whether x is no rows, or the dtypes are none that go together, of which nn.Linear knows what to say."""
        if not isinstance(x, Tensor) or x.dim() == 0:
            return True
        if self._takes(x):
            return False
        if _is_autocast(x):
            return x.dtype not in _tensors.FORMATS
        fit = x.is_floating_point() and dtype_of(self) is x.dtype
        return not fit or (self.bias is not None and self.bias.dtype is not x.dtype)

    def _referred(self, x: Tensor, bare: bool, operands: tuple[Tensor, ...]) -> Tensor:
        if self._precision.rows is not None and (x.is_nested or x.layout is not torch.strided):
            if x.is_nested:
                return self._each(x, bare)
            x = x.to_dense()  # torch multiplies sparse rows, but has no extremes of them
        frozen, precision = record_of(self), self.computes(bare)[1]
        reference = self._reference(precision, frozen, bare)
        weight, bias = self.weight if frozen is None else frozen.panels, self.bias
        if not _is_autocast(x):
            return reference.floats(x, weight, bias, operands)
        device = x.device.type
        dtype = torch.get_autocast_dtype(device)
        with torch.autocast(device, enabled=False):
            if x.dtype in _tensors.FORMATS:
                x = x.to(dtype)
                reference = reference._replace(precision=precision._replace(packed=precision.under(dtype)))
            return reference.floats(x, weight, bias, operands)

    # ---- prepare ----

    def _prepare(self, engine: Engine, packed_as: str, x: Tensor) -> bool:
        """Packs and plans what a call with x needs; False where torch has to run it."""
        with lock:
            if all(engine is not each for each in self._engines()):
                return False  # another thread has just frozen or reset the layer
            if not engine.fresh(self):
                frozen = record_of(self)
                if why_unread(self) is not None or self._frozen is not frozen:
                    return False
                vars(self)["_torch_packs"] = {}
                # Read once: another thread may be setting it, to one of another dtype.
                weight = self.weight if frozen is None else frozen.unpack(self._transposed)
                if self._is_own(engine):
                    packed_as = self._precision.packed or name_of(weight.dtype)
                precision = self._precision_in(engine, packed_as)
                # To quantize a weight takes as long for torch's ops as for a pack.
                quantized = self._is_own(engine) and _is_quantized(precision)
                if frozen is None and not engine.ready(weight) and not quantized:
                    return False
                fingerprint = _engine.Fingerprint(weight)
                packed = pack(weight, precision, self._transposed, fingerprint=fingerprint, gated=self._gated)
                if frozen is not None:
                    engine.hold(packed)
                elif not engine.take(weight, fingerprint, packed):
                    for key in [key for key in self._plans if key[0] is engine]:
                        del self._plans[key]
        m = x.shape[:-1].numel()
        if m > 0:
            self._plan(engine, _engine.bucket(m), x.dtype)
        for done in _watchers:
            done(self)
        return True

    def _precision_in(self, engine: Engine, packed_as: str) -> Precision:
        """What an engine of this layer computes in: what was asked for, or what autocast does to that."""
        asked = self.computes(engine.bare)[1] if self._is_own(engine) else self._cast
        return asked._replace(packed=packed_as, accumulate=self._precision.accumulate)

    @property
    def _cast(self) -> Precision:
        """What an engine computes in that has the weight in another format."""
        return AS_HELD._replace(products=self._precision.products)

    def _plan(self, engine: Engine, m: int, x: torch.dtype) -> None:
        threads = _products.num_threads()
        key = engine, threads, name_of(x), m
        with lock:
            asked = None if self._settled(key, x) else self._question(engine, m, x, threads)
            known = self._plans.get(key)
        if asked is None:
            return
        problem, operands = asked
        if (
            known is None or known.provisional
        ):  # else it stayed when the weight changed, and only torch's own pack is due
            # Without the lock: this may measure, and others have layers to pack.
            known = decide.decide(problem, operands, measure=self._tune == "lazy", kernel=self._kernel)
        plan = known
        runs = decide.executable(plan, problem, operands)
        with lock:
            if engine.packed is not operands.packed or not engine.fresh(self) or self._settled(key, x):
                return  # repacked or planned by another thread meanwhile, or about to be
            engine.plan_for(m, threads, x, runs)
            self._plans[key] = plan
            spare, weight = operands.spare, self._parameters.get("weight")
            if spare is not None and weight is not None and plan.refused and plan.name not in rivals.NAMES:
                holding = f"bare {spare.format}" if engine.bare else spare.format  # counts, and shares, its memory
                holder = self._casting.setdefault(holding, self._new_engine(self._cast, engine.bare))
                if not holder.fresh(self):
                    holder.take(weight, _engine.Fingerprint(weight), spare)

    def _settled(self, key: tuple[Engine, int, str, int], x: torch.dtype) -> bool:
        """Whether the engine has a plan that is not to be asked for again."""
        engine, threads, _, m = key
        return key in self._plans and not self._plans[key].provisional and engine.planned(m, threads, x)

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
            spare = pack(weight, Precision(problem.held), self._transposed, gated=self._gated)
        return problem, decide.Operands(
            weight=None if weight is None else weight.detach(),
            bias=None if bias is None else bias.detach(),
            packed=packed,
            rows=engine.rows,
            out=precision.out,
            spare=spare,
            torch_packs=self._torch_packs,
        )

    def problem_keys(self) -> list[str]:
        """What the tuning cache knows the layer's plans by."""
        return [
            self.problem(engine, engine.packed, m, x, threads).key()
            for engine, threads, x, m in list(self._plans)
            if engine.packed is not None
        ]

    def ask_again(self, anew: bool = False) -> None:
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
            products=precision.products,
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
            watch_parameters(self)
            for each in filter(None, (engine, engine.elsewhere)):
                each.hold(frozen.packed)
        vars(self).update(_engine=engine, _casting={}, _plans={}, _torch_packs={})
        vars(self).setdefault("_elsewhere", {})
        operator.register(self)

    # ---- what it tells, and what is saved of it ----

    @property
    def plans(self) -> tuple[Plan, ...]:
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

    def __getstate__(self) -> dict[str, Any]:
        return {key: value for key, value in vars(self).items() if key not in _UNSAVED}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self._reset()

    def extra_repr(self) -> str:
        bias = getattr(self, "bias", None) is not None  # one that was deleted is for calls to miss
        parts = [f"in_features={self.in_features}, out_features={self.out_features}, bias={bias}"]
        if self.dtypes != "float32":
            parts.append(f"dtype={self.dtypes}")
        if self._precision.scheme:
            parts.append(f"quantized={self._precision.scheme}")
        if record_of(self) is not None:
            parts.append("frozen=True")
        if self.activation is not None:
            parts.append(_spell(self.activation))
        names = sorted({plan.name for plan in self.plans})
        parts.append(f"kernel={' | '.join(names) or 'untuned'}")
        if self.pack_nbytes:
            parts.append(f"packed={self.pack_nbytes / 2**20:.2f} MiB")
        return ", ".join(parts)


# TorchScript takes what has no annotation for a tensor, and understands none that is a string, those of bases included.
FastModule.__annotations__ = {"training": bool}
FastModule.forward.__annotations__ = FastModule._forward.__annotations__ = {}
FastModule.__jit_unused_properties__ = [name for name, _ in getmembers(FastModule, lambda m: isinstance(m, property))]


def label(module: nn.Module) -> str:
    """What messages call a layer: its class, and its name in the converted model if it has one."""
    name = vars(module).get("_name", "")
    return f"{type(module).__name__} {name!r}" if name else type(module).__name__


def _is_quantized(precision: Precision) -> bool:
    return bool(precision.scheme) or precision.packed not in (None, *DTYPES)


def _is_autocast(x: Tensor) -> bool:
    device = x.device.type
    return torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)


def _spell(program: Activation) -> str:
    steps = tuple((step.name, *step.params) if step.params else step.name for step in programs.steps_of(program))
    alone = program.name in (*activations.names(), *programs.GATES)
    return f"activation={steps[0]!r}" if alone else f"epilogue={steps!r}"
