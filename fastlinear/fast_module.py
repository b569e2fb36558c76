"""What makes a linear layer fast, as a mixin: the engine in its __dict__, and the way round it.

The engine (guards, packed weight, plans) and the record of what was chosen for each bucket of M are never saved,
pickled or copied; a copy makes its own at its first call.
"""

from __future__ import annotations

import os
import threading
import weakref
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.weak import WeakIdKeyDictionary

from fastlinear import _engine, _kernels, activations, ops, planner
from fastlinear.activations import Activation
from fastlinear.planner import Chosen

_is_dynamo_compiling = torch.compiler.is_dynamo_compiling
_lock = threading.RLock()  # packing and planning; a call that is packed and planned never takes it
_packs = WeakIdKeyDictionary()  # parameter -> what it was when it was packed, and its pack: tied layers share one


def _new_lock() -> None:
    global _lock
    _lock = threading.RLock()


if hasattr(os, "register_at_fork"):  # another thread may have held it
    os.register_at_fork(after_in_child=_new_lock)


class FastModule(nn.Module):
    """What FastLinear and its twin for transformers' Conv1D have in common; mixed in before the stock class."""

    _transposed = False  # True: the weight is [in, out]
    _engine: _engine.Engine
    _chosen: dict[tuple[int, int], Chosen]  # by threads and bucket of M
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
        try:
            y = F.linear(x, self.weight.t() if self._transposed else self.weight, self.bias)
        except RuntimeError as error:  # looked at only now, because torch.jit.trace warns of every look at a shape
            if isinstance(x, Tensor) and not x.is_nested and (x.dim() == 0 or x.shape[-1] != self.in_features):
                raise RuntimeError(
                    f"{label(self)} takes inputs whose last dimension is in_features={self.in_features}, "
                    f"not a tensor of shape {tuple(x.shape)}"
                ) from error
            raise
        return activations.apply(self.activation, y)

    def _slow(self, x: Tensor, why: str) -> Tensor:
        """Answers a call that the engine did not; `why` is one of _engine.UNFIT, PROFILED, STALE, UNPLANNED."""
        if why == _engine.PROFILED:
            return ops.linear(self, x)
        y = None if why == _engine.UNFIT else self._native(x)
        return self._torch(x) if y is None else y

    def _native(self, x: Tensor) -> Tensor | None:
        """The engine's answer, packed and planned for if need be; None where torch has to compute it."""
        y = self._engine.attempt(self, x)
        fit = x.dtype is torch.float32 and not x.is_nested and x.dim() > 0
        if y is None and fit and x.shape[-1] == self.in_features and self._prepare(x.shape[:-1].numel()):
            y = self._engine.attempt(self, x)
        return y

    def _prepare(self, m: int) -> bool:
        """Packs and plans what a call with m rows needs; False where torch has to run it."""
        if os.environ.get("FASTLINEAR_DISABLE", "0") != "0":
            return False
        with _lock:
            if not self._engine.fresh(self):
                if why_unfit(self) is not None:
                    return False
                weight = self.weight  # read once: another thread may be setting it
                version = _engine.version_of(weight)
                self._engine.take(weight, version, pack(weight, self._transposed))
                self._chosen.clear()
            if m > 0:
                self._plan(m)
        return True

    def _plan(self, m: int) -> None:
        threads, packed = _kernels.num_threads(), self._engine.packed
        m = _engine.bucket(m)
        if packed is None or (threads, m) in self._chosen:
            return
        weight, bias = self.weight.detach(), None if self.bias is None else self.bias.detach()
        problem = planner.Problem(m, packed.n, packed.k, bias is not None, self.activation, self._transposed, threads)
        operands = planner.Operands(weight, bias, packed)
        chosen = planner.decide(problem, operands, measure=self._tune == "lazy")
        self._engine.plan_for(m, threads, planner.executable(chosen, problem, weight))
        self._chosen[threads, m] = chosen

    def _reset(self) -> None:
        steps = () if self.activation is None else (self.activation,)
        vars(self).update(_engine=_engine.Engine(_kernels.Epilogue(steps), self._transposed), _chosen={})
        ops.register(self)

    @property
    def plans(self) -> dict[int, Chosen]:
        """What runs for each bucket of M met so far, under torch's present number of threads."""
        threads = _kernels.num_threads()
        return {m: chosen for (t, m), chosen in sorted(self._chosen.items()) if t == threads}

    @property
    def pack_nbytes(self) -> int:
        """Bytes of the packed weight; 0 before the first call."""
        packed = self._engine.packed
        return 0 if packed is None else packed.nbytes

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        self._reset()  # to(), half(), share_memory() ...: the weight is about to be another one
        return super()._apply(fn, recurse)  # type: ignore[no-untyped-call]

    def __getstate__(self) -> dict[str, Any]:
        return {key: value for key, value in vars(self).items() if key not in ("_engine", "_chosen")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self._reset()

    def extra_repr(self) -> str:
        parts = [f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"]
        if self.activation is not None:
            parts.append(f"activation={_spell(self.activation)}")
        names = sorted({chosen.name for chosen in self.plans.values()})
        parts.append(f"kernel={' | '.join(names) or 'untuned'}")
        if self.pack_nbytes:
            parts.append(f"packed={self.pack_nbytes / 2**20:.2f} MiB")
        return ", ".join(parts)


def why_unfit(module: nn.Module) -> str | None:
    """Why the kernels cannot read a module's parameters, in a few words; None if they can."""
    weight = module._parameters.get("weight")
    if weight is None:
        return "its weight is computed by a hook or parametrization"
    bias = module._parameters.get("bias")
    if bias is None and getattr(module, "bias", None) is not None:
        return "its bias is computed by a hook or parametrization"
    if weight.dim() != 2:
        return f"its weight has {weight.dim()} dimensions, not 2"
    for what, tensor in (("weight", weight), ("bias", bias)):
        if tensor is not None and type(tensor) not in (nn.Parameter, Tensor):
            return f"its {what} is a {type(tensor).__name__}"
        if tensor is not None and tensor.device.type != "cpu":
            return f"its {what} is on device {tensor.device}"
        if tensor is not None and (tensor.dtype is not torch.float32 or tensor.layout is not torch.strided):
            return f"its {what} is {tensor.dtype} {tensor.layout}, not dense torch.float32"
    return None


def pack(weight: Tensor, transposed: bool = False) -> _kernels.Packed:
    """The weight [n, k], or [k, n] if transposed, in the layout of this machine."""
    state = (weight.data_ptr(), _engine.version_of(weight), transposed, planner.layout())
    known, shared = _packs.get(weight, (None, None))
    packed = shared() if shared is not None and known == state else None
    if packed is None:
        dense = weight.detach()
        packed = _kernels.Packed(dense.t() if transposed else dense, planner.layout())
        _packs[weight] = state, weakref.ref(packed)
    return packed


def forget_pack(weight: Tensor) -> None:
    """The next `pack` of this parameter packs anew, even where torch saw no change."""
    _packs.pop(weight, None)


def label(module: nn.Module) -> str:
    """What messages call a layer: its class, and its name in the converted model if it has one."""
    name = vars(module).get("_name", "")
    return f"{type(module).__name__} {name!r}" if name else type(module).__name__


def _spell(activation: Activation) -> str:
    return repr(activation.name) if not activation.params else repr((activation.name, *activation.params))
