"""FastLinear: an nn.Linear that runs on a packed weight with its activation fused, or on F.linear where it must.

Weight and bias stay ordinary Parameters, so state dicts, optimizers, hooks and `isinstance(m, nn.Linear)` keep their
meaning. What makes it fast lives in the module's __dict__ and is never saved, pickled or copied: the engine (guards,
packed weight, plans) and the record of what was chosen for each bucket of M.
"""

from __future__ import annotations

import functools
import os
import sys
import threading
import weakref
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastlinear import _engine, _kernels, activations, ops, planner
from fastlinear.activations import Activation
from fastlinear.planner import Chosen

TUNE_MODES = ("lazy", "off")
_CONV1D = "transformers.pytorch_utils"  # where GPT-2's Conv1D lives; looked at only if the user has imported it

_lock = threading.RLock()  # packing and planning; a call that is packed and planned never takes it
_packs: weakref.WeakValueDictionary[tuple[Any, ...], _kernels.Packed] = weakref.WeakValueDictionary()  # tied weights
if hasattr(os, "register_at_fork"):  # another thread may have held it

    def _new_lock() -> None:
        global _lock
        _lock = threading.RLock()

    os.register_at_fork(after_in_child=_new_lock)
_is_dynamo_compiling = torch.compiler.is_dynamo_compiling


class _Fast(nn.Module):
    """What FastLinear and its twin for transformers' Conv1D have in common; mixed in before the stock class."""

    _transposed = False  # True: the weight is [in, out]
    _engine: _engine.Engine
    weight: Tensor
    bias: Any  # Tensor or None; mypy takes the constructor's argument for it
    activation: Activation | None
    in_features: int
    out_features: int

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "forward" in vars(cls):  # a user's own forward is to be called
            cls.__call__ = nn.Module.__call__  # type: ignore[method-assign]

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        # nn.Module.__call__ costs as much as a small product; it is needed for hooks and for whoever traces.
        if len(args) == 1 and not kwargs and type(args[0]) is Tensor and not _is_dynamo_compiling():
            y = self._engine(self, args[0])
            if y is not None:
                return y
        return super().__call__(*args, **kwargs)

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
                if why_not(self) is not None:
                    return False
                weight = self.weight  # read once: another thread may be setting it
                self._engine.take(weight, _pack(weight, self._transposed))
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

    _tune: str
    _chosen: dict[tuple[int, int], Chosen]

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
        return super()._apply(fn, recurse)

    def __getstate__(self) -> dict[str, Any]:
        state = super().__getstate__() if hasattr(nn.Module, "__getstate__") else self.__dict__.copy()
        return {key: value for key, value in state.items() if key not in ("_engine", "_chosen")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
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


class FastLinear(_Fast, nn.Linear):
    """Drop-in for nn.Linear followed by an activation: y = activation(x W^T + b).

    Takes what nn.Linear takes, and `activation`: a name ("gelu"), a name with torch's parameters (("leaky_relu", 0.1)),
    an nn module or a torch function; ValueError for one that cannot be fused. Input [..., in_features], output
    [..., out_features]. The first call with a new number of rows measures the kernels for it (about 50 ms, kept in a
    cache file); training, gradients, other dtypes and devices run nn.Linear's own code.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        device: Any = None,
        dtype: torch.dtype | None = None,
        *,
        activation: object = None,
    ) -> None:
        resolved = activations.resolve(activation)
        super().__init__(in_features, out_features, bias, device, dtype)
        _become_fast(self, resolved, "lazy", "")

    @classmethod
    def from_linear(cls, linear: nn.Linear, activation: object = None) -> FastLinear:
        """A FastLinear that shares the parameters of `linear`; ValueError where it cannot be one (see `why_not`)."""
        resolved, reason = activations.resolve(activation), why_not(linear)
        if reason is not None:
            raise ValueError(f"{type(linear).__name__} cannot become a FastLinear: {reason}")
        fast = cls.__new__(cls)
        state = vars(linear).items()
        vars(fast).update({key: value.copy() if isinstance(value, dict) else value for key, value in state})
        _become_fast(fast, resolved, "lazy", "")
        return fast


def adopt(module: nn.Module, activation: Activation | None = None, tune: str = "lazy", name: str = "") -> None:
    """Turns an nn.Linear or a transformers Conv1D into its fast twin in place: same object, parameters and hooks.

    `tune` is "lazy" (on first call) or "off" (heuristic); `name` is what messages call the layer. ValueError where
    `why_not(module)` has a reason.
    """
    if tune not in TUNE_MODES:
        raise ValueError(f"tune={tune!r} is unknown; allowed are {', '.join(TUNE_MODES)}")
    reason = why_not(module)
    if reason is not None:
        raise ValueError(f"{name or type(module).__name__} cannot be converted: {reason}")
    module.__class__ = _twin(type(module)) or type(module)
    _become_fast(module, activation, tune, name)


def release(module: nn.Module) -> None:
    """Turns a fast layer back into what it was; its activation is no longer applied."""
    stock: Any = next(cls for cls in type(module).__mro__ if not issubclass(cls, _Fast))
    ops.forget(module)
    for key in (*_OWN, *(key for key in _CONV_OWN if module._transposed)):
        vars(module).pop(key, None)
    module.__class__ = stock


def refresh(module: Any) -> None:
    """Forgets packed weight and plans; needed only after a change torch does not count, such as `.data.copy_()`."""
    module._reset()


def is_fast(module: nn.Module) -> bool:
    """True for FastLinear and its Conv1D twin."""
    return isinstance(module, _Fast)


def why_not(module: nn.Module) -> str | None:
    """Why a module cannot run on the kernels, in a few words; None if it can."""
    fast = is_fast(module)
    if not fast and _twin(type(module)) is None:
        return f"{type(module).__name__} is not exactly nn.Linear or transformers' Conv1D"
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


def label(module: nn.Module) -> str:
    """What messages call a layer: its class, and its name in the converted model if it has one."""
    name = vars(module).get("_name", "")
    return f"{type(module).__name__} {name!r}" if name else type(module).__name__


_OWN = ("activation", "_engine", "_chosen", "_tune", "_name")
_CONV_OWN = ("in_features", "out_features")


def _become_fast(module: Any, activation: Activation | None, tune: str, name: str) -> None:
    vars(module).update(activation=activation, _tune=tune, _name=name)
    if module._transposed:
        vars(module).update(in_features=module.weight.shape[0], out_features=module.weight.shape[1])
    module._reset()


def _pack(weight: Tensor, transposed: bool) -> _kernels.Packed:
    layout = planner.layout()
    key = (weight.data_ptr(), _engine.version_of(weight), tuple(weight.shape), weight.stride(), transposed, layout)
    packed = _packs.get(key)
    if packed is None:
        packed = _packs[key] = _kernels.Packed(weight.detach().t() if transposed else weight.detach(), layout)
    return packed


def _spell(activation: Activation) -> str:
    return repr(activation.name) if not activation.params else repr((activation.name, *activation.params))


def _twin(cls: type) -> type[_Fast] | None:
    if cls is nn.Linear:
        return FastLinear
    stock = getattr(sys.modules.get(_CONV1D), "Conv1D", None)
    return _conv1d_twin(cls) if cls is stock and stock is not None else None


@functools.cache
def _conv1d_twin(stock: type[nn.Module]) -> type[_Fast]:
    doc = "Conv1D of transformers (GPT-2) as a fast layer."
    members = {"_transposed": True, "__module__": __name__, "__doc__": doc}
    return type("FastConv1D", (_Fast, stock), members)


def __getattr__(name: str) -> Any:
    """FastConv1D exists once transformers' Conv1D does; pickle looks it up here."""
    if name == "FastConv1D":
        from transformers.pytorch_utils import Conv1D

        return _conv1d_twin(Conv1D)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
