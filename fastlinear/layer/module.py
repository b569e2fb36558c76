"""How a fast layer answers: the engine calls its kernels, torch answers where they cannot, and a cold call prepares."""

from __future__ import annotations

import functools
from inspect import getmembers
from typing import Any, ClassVar

import torch
from torch import Tensor

import fastlinear._engine as _engine
import fastlinear._environment as environment
import fastlinear._reasons as _reasons
import fastlinear._tensors as _tensors
from fastlinear._engine import Engine
from fastlinear.layer import gradient, operator, spelled, unpacked
from fastlinear.layer.elsewhere import why_elsewhere
from fastlinear.layer.engines import WithEngines
from fastlinear.layer.fallback import in_torch, label
from fastlinear.layer.fitness import dtype_of, odd_dtype
from fastlinear.layer.frozen import Frozen, record_of, shared_as
from fastlinear.layer.parametrized import deepcopied
from fastlinear.layer.planning import is_quantized, prepare
from fastlinear.layer.shard import answer, is_shared, local
from fastlinear.layer.traced import is_recorded
from fastlinear.plan import rivals
from fastlinear.plan.decide import tell
from fastlinear.spec import activations, programs
from fastlinear.spec.activations import Activation
from fastlinear.spec.formats import name_of, told
from fastlinear.spec.precision import Precision
from fastlinear.spec.reference import Reference

_UNSAVED = (
    "_engine",
    "_casting",
    "_plans",
    "_torch_packs",
    "_elsewhere",
    "_panels",
    "_form",
    "_shard",
    "_spelled",
    "__jit_ignored_attributes__",
)

_BY_TORCH = (_reasons.UNFIT, _reasons.TRAINING, _reasons.DISABLED)

_is_dynamo_compiling = torch.compiler.is_dynamo_compiling


class FastModule(WithEngines):
    """What FastLinear and its twin for transformers' Conv1D have in common; mixed in before the stock class."""

    __jit_unused_properties__: list[str]
    _elsewhere: dict[str, int]  # calls that the kernels did not answer, by reason
    _is_quick = False  # calls go to the engine without nn.Module.__call__
    _forwards: ClassVar[set[Any]] = set()  # those that do nothing else
    _kernel: str | None = None  # what `linear.force` told it to run
    in_features: int
    out_features: int

    # ---- what it is ----

    @property
    def _gated(self) -> bool:
        return programs.is_gated(self.activation)

    @property
    def _channels(self) -> int:
        """Rows of the weight."""
        return 2 * self.out_features if self._gated else self.out_features

    @property
    def dtypes(self) -> str:
        """What it is computed in, as the report has it."""
        return told(dtype_of(self), self.packed_as, self._precision.products)

    # ---- call ----

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        cls._is_quick = cls.forward in FastModule._forwards  # a user's own forward is to be called
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
            if self._stock is not None and self._stock[0].forward is not self._stock[1]:
                return self._replaced(self._stock[0], input, operands)
            if self._spelled and not operands and not torch.compiler.is_exporting():
                y = spelled.linear(self, input)
                if y is not None:
                    return y
            bare = self._differs_by_call  # the marker, which is traced too, applies the original
            exporting = torch.compiler.is_exporting()
            way = self._torch if exporting else functools.partial(operator.linear, self)
            return way(input, bare, operands)
        return self._engine.forward(self, input, operands)

    def _replaced(self, stock: Any, x: Tensor, operands: tuple[Tensor, ...]) -> Tensor:
        """Where somebody has given the stock class another forward, that answers, as it would have before."""
        reason = f"{stock.__name__}.forward was replaced"
        if not _is_dynamo_compiling():
            self._tell(reason)
        y = stock.forward(self, x)
        return programs.apply(self.computes(self._differs_by_call)[0], y, operands)

    def __prepare_scriptable__(self) -> FastModule:
        """Gives torch.jit.script what `forward` asks for in a script."""
        panels, form = operator.for_script(self, self._differs_by_call)
        hidden = [] if panels is None else ["weight"]  # that of a frozen layer is no attribute
        vars(self).update(_panels=panels, _form=form, __jit_ignored_attributes__=hidden)
        return self

    def _slow(self, x: Tensor, why: str, bare: bool, operands: tuple[Tensor, ...] = ()) -> Tensor:
        """Answers a call that the engine did not; `why` is one of `_reasons`."""
        if why == _reasons.PROFILED or is_recorded():
            return operator.linear(self, x, bare, operands)
        if isinstance(x, torch.fx.Proxy) and not self.training and why != _reasons.DISABLED:
            return operator.recorded(self, x, bare, operands)
        if is_shared(x) and (y := self._answer_shared(x, operands)) is not None:
            return y
        if why == _reasons.AUTOCAST:
            y = self._under_autocast(x, bare, operands)
        else:
            y = None if why in _BY_TORCH else self._answer(x, self.packed_as, bare, operands)
        if y is None:
            self._count(x, why)
            if why not in (_reasons.UNFIT, _reasons.DISABLED, _reasons.AUTOCAST) and record_of(self) is None:
                y = self._teach(self._engine_for(self.packed_as, bare), bare, x, operands)
            y = self._torch(x, bare, operands) if y is None else y
        return y

    def _answer_shared(self, x: Tensor, operands: tuple[Tensor, ...]) -> Tensor | None:
        """The answer to a DTensor, by its parts; None where torch has to find one."""
        shard = shared_as(self)
        if shard is None and record_of(self) is not None:
            raise RuntimeError(
                f"{label(self)} was frozen before its model was split between processes, and nothing can split it now: "
                "unfreeze, parallelize, then freeze"
            )
        if shard is None or self.training or operands or environment.disabled():
            return None
        if shard != self._shard:  # it was split after it was converted
            self._reset()
        return answer(self, x, shard)

    def _teach(self, engine: Engine, bare: bool, x: Tensor, operands: tuple[Tensor, ...]) -> Tensor | None:
        """Tells the engine how torch answers in training mode and while the weight keeps changing; the answer for x, if
        that is what a pack would give."""
        activation, precision = self.computes(bare)
        changing: Any
        plain = changing = rivals.make(rivals.BASELINE, self.weight, self._transposed, activation, {}).run
        reference, exact = Reference(activation, precision, self._transposed), unpacked.answers(precision)
        if is_quantized(precision):
            changing = unpacked.Unpacked(reference, engine.rows) if exact else None
        elif precision.packed not in (None, name_of(self.weight.dtype)):
            changing = reference.floats
        engine.plainly(plain, changing, self._elsewhere, exact)
        dense = x.layout is torch.strided and not x.is_nested and x.shape[-1:] == (self._columns(),)
        fits = exact and dense and not self.training and not operands and x.dtype in _tensors.FORMATS
        return changing(x, self.weight, self.bias) if fits else None

    def _count(self, x: Tensor, why: str) -> None:
        self._tell(why_elsewhere(self, x, why in (_reasons.STALE, _reasons.GRADIENT)))

    def _tell(self, reason: str) -> None:
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
        keeps = gradient.needs_sums(*self.computes(bare))
        kept: list[Tensor] | None = [] if keeps else None
        with torch.no_grad():
            y = self._native(x, packed_as, bare, operands, kept)
        engine = self._engine_for(packed_as, bare)
        packed, weight = engine.packed, self._parameters.get("weight")
        changed = record_of(self) is not frozen  # frozen or thawed meanwhile, by another thread
        if y is None or packed is None or changed or (weight is None and frozen is None):
            return None
        attach = gradient.Attachment(
            self._reference(self._precision_in(engine, packed_as), frozen, bare),
            None if frozen is None else frozen.panels,
            self._tune == "lazy",
        )
        engine.attach_by(attach, keeps)
        return attach(x, weight, self.bias, y, packed, operands, kept[-1] if kept else None)

    def _reference(self, precision: Precision, frozen: Frozen | None, bare: bool) -> Reference:
        panels = ("", 0, 0) if frozen is None else frozen.form
        return Reference(self.computes(bare)[0], precision, self._transposed, panels)

    def _native(
        self,
        x: Tensor,
        packed_as: str,
        bare: bool = False,
        operands: tuple[Tensor, ...] = (),
        kept: list[Tensor] | None = None,
    ) -> Tensor | None:
        """The answer of the engine with a pack in that format, packed and planned for if need be; None where torch has
        to compute it. `kept` gets what the epilogue was applied to, where that is to be had."""
        engine = self._engine_for(packed_as, bare)
        y = engine.attempt(self, x, operands, kept)
        if y is not None or not self._precision_in(engine, packed_as).takes(x.dtype):
            return y
        fit = not x.is_nested and x.dim() > 0 and x.shape[-1] == self._columns()
        off = self.training or environment.disabled()
        if fit and not off and not self._differentiated(x, operands) and prepare(self, engine, packed_as, x):
            y = engine.attempt(self, x, operands, kept)
        return y

    def _columns(self) -> int:
        """Of x. The weight may have been given another shape through `.data`."""
        return self.weight_shape[0 if self._transposed else -1]

    @property
    def weight_shape(self) -> tuple[int, ...]:
        """Of the weight as the Parameter has it, which for a frozen layer is not unpacked for it; where processes
        share it, of this one's part."""
        frozen, weight = record_of(self), self._parameters.get("weight")
        if weight is not None:
            return tuple(local(weight).shape)
        shape = (self._channels, self.in_features) if frozen is None else (frozen.packed.n, frozen.packed.k)
        return shape[::-1] if self._transposed else shape

    def _torch(self, x: Tensor, bare: bool = False, operands: tuple[Tensor, ...] = ()) -> Tensor:
        """The answer in torch's own ops."""
        return in_torch(self, x, bare, operands)

    # ---- what it tells, and what is saved of it ----

    def __getstate__(self) -> dict[str, Any]:
        return {key: value for key, value in vars(self).items() if key not in _UNSAVED}

    __deepcopy__ = deepcopied

    def __setstate__(self, state: dict[str, Any]) -> None:
        precision = state.get("_precision", self._precision).present()
        super().__setstate__({**state, "_precision": precision})  # type: ignore[no-untyped-call]
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


FastModule._forwards.add(FastModule.forward)


def _spell(program: Activation) -> str:
    steps = tuple((step.name, *step.params) if step.params else step.name for step in programs.steps_of(program))
    alone = program.name in (*activations.names(), *programs.GATES, *programs.LIMITED)
    return f"activation={steps[0]!r}" if alone else f"epilogue={steps!r}"
