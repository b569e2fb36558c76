"""What makes a linear layer fast, as a mixin: its engine where that answers, and the way round it."""

from __future__ import annotations

from inspect import getmembers
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fastlinear._engine as _engine
import fastlinear._environment as environment
import fastlinear._kernels as _kernels
from fastlinear.layer import operator
from fastlinear.layer.elsewhere import why_elsewhere
from fastlinear.layer.packs import dtype_of, record_of
from fastlinear.layer.planned import Planned
from fastlinear.plan.decide import tell
from fastlinear.spec import activations
from fastlinear.spec.activations import Activation

_UNSAVED = (
    "_engine",
    "_casting",
    "_chosen",
    "_torch_packs",
    "_elsewhere",
    "_panels",
    "_form",
    "__jit_ignored_attributes__",
)

_is_dynamo_compiling = torch.compiler.is_dynamo_compiling


class FastModule(Planned):
    """What FastLinear and its twin for transformers' Conv1D have in common; mixed in before the stock class."""

    _transposed = False  # True: the weight is [in, out]
    __jit_unused_properties__: list[str]

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "forward" in vars(cls):  # a user's own forward is to be called
            cls.__call__ = nn.Module.__call__  # type: ignore[method-assign]

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        # nn.Module.__call__ costs as much as a small product; it is needed for hooks and for whoever traces or patches.
        if not _is_dynamo_compiling() and len(args) == 1 and not kwargs:
            y = self._engine(self, args[0])
            if y is not None:
                return y
        return super().__call__(*args, **kwargs)

    def forward(self, input: Tensor) -> Tensor:
        if torch.jit.is_scripting():  # type: ignore[attr-defined]
            if self._panels is None:
                y: Tensor = torch.ops.fastlinear.linear(input, self.weight, self.bias, *self._form)
            else:
                y = torch.ops.fastlinear.linear(input, self._panels, self.bias, *self._form)
        else:
            y = self._run(input)
        return y

    def _run(self, input: Tensor) -> Tensor:
        if _is_dynamo_compiling():
            bare = self._differs_by_call  # the marker, which is traced too, applies the original
            return self._torch(input, bare) if torch.compiler.is_exporting() else operator.linear(self, input, bare)
        return self._engine.forward(self, input)

    def __prepare_scriptable__(self) -> FastModule:
        """Gives torch.jit.script what `forward` asks for in a script."""
        panels, form = operator.for_script(self, self._differs_by_call)
        hidden = [] if panels is None else ["weight"]  # that of a frozen layer is no attribute
        vars(self).update(_panels=panels, _form=form, __jit_ignored_attributes__=hidden)
        return self

    def _torch(self, x: Tensor, bare: bool = False) -> Tensor:
        """The answer in torch's own ops: in training, and where the user switched the kernels off, of the parameter as
        it is, which for a frozen layer is what it is packed in; otherwise of the numbers that the kernels multiply."""
        try:
            plain = self.training or environment.disabled() or self._is_odd(x)
            return self._plain(x, bare) if plain else self._referred(x, bare)
        except RuntimeError as error:  # looked at only now, because torch.jit.trace warns of every look at a shape
            if isinstance(x, Tensor) and not x.is_nested and (x.dim() == 0 or x.shape[-1] != self.in_features):
                raise RuntimeError(
                    f"{label(self)} takes inputs whose last dimension is in_features={self.in_features}, "
                    f"not a tensor of shape {tuple(x.shape)}"
                ) from error
            raise

    def _each(self, x: Any, bare: bool) -> Tensor:
        """The answer to a nested tensor, part by part, since rows are quantised by what is in them."""

        def part(rows: Tensor) -> Tensor:
            y = self._engine.forward(self, rows)
            return y if bare or self._absorbed is None else activations.apply(self.activation, y)

        if x.layout is torch.jagged:
            y = part(x.values())
            return torch.nested.nested_tensor_from_jagged(y, x.offsets(), x.lengths())
        return torch.nested.as_nested_tensor([part(rows) for rows in x.unbind()])

    def _plain(self, x: Tensor, bare: bool) -> Tensor:
        frozen = record_of(self)
        x = self._precision.numbers(x) if isinstance(x, Tensor) else x
        weight, bias = self.weight if frozen is None else frozen.unpack(self._transposed), self.bias
        mixed = isinstance(x, Tensor) and any(t is not None and t.dtype is not x.dtype for t in (weight, bias))
        if mixed and self._takes(x):
            weight, bias = weight.to(x.dtype), None if bias is None else bias.to(x.dtype)
        y = F.linear(x, weight.t() if self._transposed else weight, bias)
        return activations.apply(self.computes(bare)[0], y)

    def _is_odd(self, x: Any) -> bool:
        """Whether the dtypes are none that go together, of which nn.Linear knows what to say."""
        if not isinstance(x, Tensor):
            return True
        if self._takes(x):
            return False
        if _is_autocast(x):
            return x.dtype not in _kernels.FORMATS
        fit = x.is_floating_point() and dtype_of(self) is x.dtype
        return not fit or (self.bias is not None and self.bias.dtype is not x.dtype)

    def _referred(self, x: Tensor, bare: bool) -> Tensor:
        if x.is_nested and self._precision.rows is not None:
            return self._each(x, bare)
        frozen, precision = record_of(self), self.computes(bare)[1]
        reference = self._reference(precision, frozen, bare)
        weight, bias = self.weight if frozen is None else frozen.panels, self.bias
        if not _is_autocast(x):
            return reference.floats(x, weight, bias)
        device = x.device.type
        dtype = torch.get_autocast_dtype(device)
        with torch.autocast(device, enabled=False):
            if x.dtype in _kernels.FORMATS:
                x = x.to(dtype)
                reference = reference._replace(precision=precision._replace(packed=precision.under(dtype)))
            return reference.floats(x, weight, bias)

    def _slow(self, x: Tensor, why: str, bare: bool) -> Tensor:
        """Answers a call that the engine did not; `why` is one of the reasons in _engine."""
        if why == _engine.PROFILED:
            return operator.linear(self, x, bare)
        if why == _engine.AUTOCAST:
            y = self._under_autocast(x, bare)
        else:
            y = None if why in (_engine.UNFIT, _engine.DISABLED) else self._answer(x, self.packed_as, bare)
        if y is None:
            self._count(x, why)
            y = self._torch(x, bare)
        return y

    def _count(self, x: Tensor, why: str) -> None:
        reason = why_elsewhere(self, x, why == _engine.STALE)
        count = self._elsewhere[reason] = self._elsewhere.get(reason, 0) + 1
        if count == 1:
            tell(f"{label(self)} goes round the kernels: {reason}")

    def _under_autocast(self, x: Tensor, bare: bool) -> Tensor | None:
        """What stock autocast makes of the call: x and the weight are cast to its dtype."""
        if self.training:
            return None
        if not torch.is_autocast_enabled("cpu"):  # another device's is
            return self._answer(x, self.packed_as, bare)
        dtype = torch.get_autocast_dtype("cpu")
        if x.dtype not in _kernels.FORMATS and self._precision.takes(x.dtype):  # integers stay what they are
            return self._answer(x, self.packed_as, bare)
        if x.dtype not in _kernels.FORMATS or dtype not in _kernels.FORMATS:
            return None
        return self._answer(x.to(dtype), self._precision.under(dtype), bare)

    def __getstate__(self) -> dict[str, Any]:
        return {key: value for key, value in vars(self).items() if key not in _UNSAVED}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self._reset()

    def extra_repr(self) -> str:
        parts = [f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"]
        if self.dtypes != "float32":
            parts.append(f"dtype={self.dtypes}")
        if self._precision.scheme:
            parts.append(f"quantized={self._precision.scheme}")
        if record_of(self) is not None:
            parts.append("frozen=True")
        if self.activation is not None:
            parts.append(f"activation={_spell(self.activation)}")
        names = sorted({chosen.name for chosen in self.plans})
        parts.append(f"kernel={' | '.join(names) or 'untuned'}")
        if self.pack_nbytes:
            parts.append(f"packed={self.pack_nbytes / 2**20:.2f} MiB")
        return ", ".join(parts)


# TorchScript takes what has no annotation for a tensor, and understands none that is a string, those of bases included.
FastModule.__annotations__ = {"training": bool}
FastModule.forward.__annotations__ = {}
FastModule.__jit_unused_properties__ = [name for name, _ in getmembers(FastModule, lambda m: isinstance(m, property))]


def label(module: nn.Module) -> str:
    """What messages call a layer: its class, and its name in the converted model if it has one."""
    name = vars(module).get("_name", "")
    return f"{type(module).__name__} {name!r}" if name else type(module).__name__


def _is_autocast(x: Tensor) -> bool:
    device = x.device.type
    return torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)


def _spell(activation: Activation) -> str:
    return repr(activation.name) if not activation.params else repr((activation.name, *activation.params))
