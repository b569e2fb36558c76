"""What makes a linear layer fast, as a mixin: the engines in its __dict__, and the way round them.

An engine (guards, packed weight, plans) is for one dtype of the packed weight: the layer has its own, and gets another
for each dtype that autocast asks for. They and the record of what was chosen are never saved, pickled or copied; a copy
makes its own at its first call, or has the pack of a frozen layer from the start.
"""

from __future__ import annotations

import os
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastlinear import _engine, _kernels, activations, ops, planner
from fastlinear._engine import Engine
from fastlinear.activations import Activation
from fastlinear.candidates import FROZEN, Chosen, Problem
from fastlinear.frozen import Freezable
from fastlinear.packs import dtype_of, is_pairing, odd_dtype, pack, record_of, why_unfit
from fastlinear.packs import lock as _lock

_UNSAVED = ("_engine", "_casting", "_chosen")

_is_dynamo_compiling = torch.compiler.is_dynamo_compiling


class FastModule(Freezable):
    """What FastLinear and its twin for transformers' Conv1D have in common; mixed in before the stock class."""

    _transposed = False  # True: the weight is [in, out]
    _pack_dtype: torch.dtype | None = None  # what the weight is packed in; None: its own dtype
    _accumulate = "fp32"  # the format of the least exact sums that are welcome
    _casting: dict[torch.dtype, Engine]  # engines for autocast, by the dtype of their packs
    _tune: str
    weight: Tensor
    bias: Any  # Tensor or None; mypy takes the constructor's argument for it
    activation: Activation | None
    in_features: int
    out_features: int

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "forward" in vars(cls):  # a user's own forward is to be called
            cls.__call__ = nn.Module.__call__  # type: ignore[method-assign]

    def __call__(self, input: Tensor) -> Any:
        # nn.Module.__call__ costs as much as a small product; it is needed for hooks and for whoever traces.
        if not _is_dynamo_compiling():
            y = self._engine(self, input)
            if y is not None:
                return y
        return super().__call__(input)

    def forward(self, input: Tensor) -> Tensor:
        if _is_dynamo_compiling():
            return self._torch(input) if torch.compiler.is_exporting() else ops.linear(self, input)
        return self._engine.forward(self, input)

    def _torch(self, x: Tensor) -> Tensor:
        frozen = record_of(self)
        weight, bias = self.weight if frozen is None else frozen.unpack(self._transposed), self.bias
        mixed = isinstance(x, Tensor) and any(t is not None and t.dtype is not x.dtype for t in (weight, bias))
        if mixed and self._takes(x):
            weight, bias = weight.to(x.dtype), None if bias is None else bias.to(x.dtype)
        try:
            y = F.linear(x, weight.t() if self._transposed else weight, bias)
        except RuntimeError as error:  # looked at only now, because torch.jit.trace warns of every look at a shape
            if isinstance(x, Tensor) and not x.is_nested and (x.dim() == 0 or x.shape[-1] != self.in_features):
                raise RuntimeError(
                    f"{label(self)} takes inputs whose last dimension is in_features={self.in_features}, "
                    f"not a tensor of shape {tuple(x.shape)}"
                ) from error
            raise
        return activations.apply(self.activation, y)

    def _slow(self, x: Tensor, why: str) -> Tensor:
        """Answers a call that the engine did not; `why` is one of the reasons in _engine."""
        if why == _engine.PROFILED:
            return ops.linear(self, x)
        if why == _engine.AUTOCAST:
            y = self._under_autocast(x)
        else:
            y = None if why == _engine.UNFIT else self._native(x, self.pack_dtype)
        return self._torch(x) if y is None else y

    def _under_autocast(self, x: Tensor) -> Tensor | None:
        """What stock autocast makes of the call: x and the weight are cast to its dtype."""
        if not torch.is_autocast_enabled("cpu"):  # another device's is
            return self._native(x, self.pack_dtype)
        dtype = torch.get_autocast_dtype("cpu")
        if x.dtype not in _kernels.FORMATS or dtype not in _kernels.FORMATS or self._differentiated(x):
            return None
        return self._native(x.to(dtype), dtype)

    def _differentiated(self, x: Tensor) -> bool:
        if self.training or not torch.is_grad_enabled():
            return self.training
        operands = (x, None if record_of(self) else self.weight, self.bias)
        return any(t is not None and t.requires_grad for t in operands)

    @property
    def pack_dtype(self) -> torch.dtype:
        """What the weight is packed in."""
        frozen = record_of(self)
        return (self._pack_dtype or self.weight.dtype) if frozen is None else frozen.packed.dtype

    @property
    def dtypes(self) -> str:
        """The dtype of the parameter and, where it is another one, of its pack: "float32 as bfloat16"."""
        return " as ".join(dict.fromkeys(str(d).removeprefix("torch.") for d in (dtype_of(self), self.pack_dtype)))

    def _takes(self, x: Tensor) -> bool:
        """Whether there are kernels for the dtypes of x, weight, bias and pack."""
        return is_pairing(x.dtype, self.pack_dtype) and odd_dtype(dtype_of(self), self.bias) is None

    def _native(self, x: Tensor, dtype: torch.dtype) -> Tensor | None:
        """The answer of the engine with a pack of `dtype`, packed and planned for if need be; None where torch has to
        compute it."""
        engine = self._engine if dtype is self.pack_dtype else self._casting.get(dtype)
        if engine is None:
            engine = self._casting.setdefault(dtype, self._new_engine())
        y = engine.attempt(self, x)
        fit = is_pairing(x.dtype, dtype) and not x.is_nested and x.dim() > 0 and x.shape[-1] == self.in_features
        if y is None and fit and not self._differentiated(x) and self._prepare(engine, dtype, x):
            y = engine.attempt(self, x)
        return y

    def _prepare(self, engine: Engine, dtype: torch.dtype, x: Tensor) -> bool:
        """Packs and plans what a call with x needs; False where torch has to run it."""
        if os.environ.get("FASTLINEAR_DISABLE", "0") != "0":
            return False
        with _lock:
            if engine is not self._engine and engine is not self._casting.get(dtype):
                return False  # another thread has just frozen or reset the layer
            if not engine.fresh(self):
                frozen = record_of(self)
                if why_unfit(self) is not None or self._frozen is not frozen:
                    return False
                weight = self.weight  # read once: another thread may be setting it, to one of another dtype
                version = _engine.version_of(weight)
                if engine is self._engine:
                    dtype = self._pack_dtype or weight.dtype
                packed = pack(weight, dtype, self._transposed)
                if frozen is None:
                    engine.take(weight, version, packed)
                else:
                    engine.hold(packed)
                for key in [key for key in self._chosen if key[0] is engine]:
                    del self._chosen[key]
            m = x.shape[:-1].numel()
            if m > 0:
                self._plan(engine, _engine.bucket(m), x.dtype)
        return True

    def _plan(self, engine: Engine, m: int, x: torch.dtype) -> None:
        threads, packed, form = _kernels.num_threads(), engine.packed, _kernels.FORMATS[x]
        if packed is None or not is_pairing(x, packed.dtype) or (engine, threads, form, m) in self._chosen:
            return
        weight, bias = None if record_of(self) else self.weight.detach(), self.bias
        operands = planner.Operands(weight, None if bias is None else bias.detach(), packed)
        problem = self.problem(packed, m, form, threads)
        chosen = planner.decide(problem, operands, measure=self._tune == "lazy")
        engine.plan_for(m, threads, x, planner.executable(chosen, problem, weight))
        self._chosen[engine, threads, form, m] = chosen

    def problem(self, packed: _kernels.Packed, m: int, x: str, threads: int) -> Problem:
        """What a plan for m rows of format x is made for."""
        return Problem(
            m=m,
            n=packed.n,
            k=packed.k,
            x=x,
            packed=packed.format,
            held=_kernels.FORMATS[dtype_of(self)] if record_of(self) is None else FROZEN,
            accumulate=self._accumulate,
            bias=self.bias is not None,
            activation=self.activation,
            transposed=self._transposed,
            threads=threads,
        )

    def _new_engine(self) -> Engine:
        steps = () if self.activation is None else (self.activation,)
        return Engine(_kernels.Epilogue(steps), self._transposed)

    def _reset(self) -> None:
        engine, frozen = self._new_engine(), record_of(self)
        if frozen is not None:
            frozen.layers.add(self)
            engine.hold(frozen.packed)
        vars(self).update(_engine=engine, _casting={}, _chosen={})
        ops.register(self)

    @property
    def plans(self) -> tuple[Chosen, ...]:
        """What runs for each format of x and bucket of M met so far, under torch's present number of threads."""
        threads = _kernels.num_threads()
        chosen = [chosen for (_, t, *_), chosen in list(self._chosen.items()) if t == threads]
        return tuple(sorted(chosen, key=lambda c: (c.x, c.bucket)))

    @property
    def pack_nbytes(self) -> int:
        """Bytes of the packed weight, in all dtypes; 0 before the first call."""
        packs = [engine.packed for engine in (self._engine, *self._casting.values())]
        return sum(packed.nbytes for packed in packs if packed is not None)

    def __getstate__(self) -> dict[str, Any]:
        return {key: value for key, value in vars(self).items() if key not in _UNSAVED}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self._reset()

    def extra_repr(self) -> str:
        parts = [f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"]
        if self.dtypes != "float32":
            parts.append(f"dtype={self.dtypes}")
        if record_of(self) is not None:
            parts.append("frozen=True")
        if self.activation is not None:
            parts.append(f"activation={_spell(self.activation)}")
        names = sorted({chosen.name for chosen in self.plans})
        parts.append(f"kernel={' | '.join(names) or 'untuned'}")
        if self.pack_nbytes:
            parts.append(f"packed={self.pack_nbytes / 2**20:.2f} MiB")
        return ", ".join(parts)


def label(module: nn.Module) -> str:
    """What messages call a layer: its class, and its name in the converted model if it has one."""
    name = vars(module).get("_name", "")
    return f"{type(module).__name__} {name!r}" if name else type(module).__name__


def _spell(activation: Activation) -> str:
    return repr(activation.name) if not activation.params else repr((activation.name, *activation.params))
