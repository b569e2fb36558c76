"""Freezing fast experts: they keep the packed weights only, and look like any others from outside."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

import fastlinear._modes as _modes
from fastlinear.layer import mixture, pages
from fastlinear.layer.fallback import label
from fastlinear.layer.lent import Lent, LentTensor
from fastlinear.layer.lock import lock
from fastlinear.layer.quality import note_experts
from fastlinear.layer.shelf import Shelf
from fastlinear.spec.experts import Form


class Frozen(NamedTuple):
    """What frozen experts have instead of weights. dtype, requires_grad: of the Parameters, as they will be again."""

    first: Shelf
    second: Shelf
    dtype: torch.dtype
    requires_grad: tuple[bool, bool]
    origin: str = ""


class Freezable(nn.Module):
    """The part of fast experts that makes frozen ones look like any others."""

    _form: Form
    _frozen_experts: Frozen | None = None

    @property
    def names(self) -> tuple[str, str]:
        raise NotImplementedError

    def _reset(self) -> None:
        raise NotImplementedError

    def __getattr__(self, name: str) -> Any:
        frozen = vars(self).get("_frozen_experts")
        if frozen is not None and name in (*mixture.FIRST, mixture.SECOND) and self._parameters.get(name, self) is None:
            return self._handed_out(name)
        return super().__getattr__(name)

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        # As of a frozen layer: torch's pruning gives a weight, which here is a lent one, another name.
        if isinstance(param, LentTensor) and not isinstance(param, nn.Parameter) and are_frozen(self):
            thaw(self)
            param = self._parameters[next(own for own in self.names if name.startswith(own))]
        super().register_parameter(name, param)

    def _unpacked(self, name: str) -> Tensor:
        frozen = self._frozen_experts
        assert frozen is not None
        if name == mixture.SECOND:
            weight = frozen.second.unpack().to(frozen.dtype)
            return weight.mT.contiguous() if self._form.transposed else weight
        return self._form.held(frozen.first.unpack().to(frozen.dtype)).contiguous()

    def _handed_out(self, name: str) -> Tensor:
        """A frozen weight for others than the module; whoever writes to it makes it a Parameter again."""
        weight = self._unpacked(name)
        if torch.compiler.is_dynamo_compiling() or _modes.watched():
            return weight
        lent = Lent(weight, functools.partial(_take_over, self, name))
        return lent.hand_out(lent.whole)

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        own: dict[str, Tensor | None] = dict.fromkeys(self._parameters)
        if self._frozen_experts is not None:
            own |= {name: self._unpacked(name) for name in self.names}
        super()._save_to_state_dict(destination, prefix, keep_vars)
        for name, weight in own.items():  # in the order of the stock module's
            if weight is not None:
                destination[prefix + name] = weight
            elif prefix + name in destination:
                destination[prefix + name] = destination.pop(prefix + name)

    def _load_from_state_dict(
        self, state_dict: Any, prefix: str, metadata: Any, strict: bool, missing_keys: list[str], *lists: Any
    ) -> None:
        if any(prefix + name in state_dict for name in self.names):
            thaw(self)
        elif strict and self._frozen_experts is not None:
            missing_keys.extend(prefix + name for name in self.names)
        super()._load_from_state_dict(state_dict, prefix, metadata, strict, missing_keys, *lists)

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        frozen = self._frozen_experts
        if frozen is not None:
            before = torch.empty(0, dtype=frozen.dtype, device="cpu")
            after = fn(before)
            if after.dtype is not before.dtype or after.device != before.device:
                thaw(self)
        self._reset()
        return super()._apply(fn, recurse)  # type: ignore[no-untyped-call]


def are_frozen(module: Any) -> bool:
    return isinstance(module, Freezable) and module._frozen_experts is not None


def on_meta(module: Any, name: str) -> Tensor:
    """A frozen weight as the Parameter was, on the meta device."""
    n, k = module.shapes[module.names.index(name)]
    shape = (module.count, k, n) if module._form.transposed else (module.count, n, k)
    return torch.empty(shape, dtype=module.held, device="meta")


def freeze(module: Any) -> None:
    """Packs the weights of fast experts and drops them; ValueError where the kernels cannot read them."""
    with lock:
        if module._frozen_experts is not None:
            return
        if (reason := module.why_unread()) is not None:
            raise ValueError(f"{label(module)} cannot be frozen: {reason}")
        parameters = [module._parameters[name] for name in module.names]
        dtype, wants = parameters[0].dtype, (parameters[0].requires_grad, parameters[1].requires_grad)
        # Anew, as they may have changed in a way that torch does not count.
        first, second = module.packed(0), module.packed(1)
        for which, shelf in enumerate((first, second)):
            note_experts(module, which, shelf)
        hold(module, Frozen(first, second, dtype, wants))
        pages.let_go(*(parameter.detach() for parameter in parameters))


def hold(module: Any, frozen: Frozen) -> None:
    """Makes fast experts frozen ones; what they had as their weights is let go, unread."""
    plans = module._decided
    vars(module)["_frozen_experts"] = frozen
    for name in module.names:
        module._parameters[name] = None
    module._reset()
    vars(module)["_decided"] = plans


def thaw(module: Any) -> None:
    """Makes the weights of frozen experts Parameters again; does nothing to others."""
    with lock, torch.inference_mode(False):
        frozen = module._frozen_experts
        if frozen is not None:
            weights = {name: module._unpacked(name) for name in module.names}
            _thaw(module, frozen, weights)


def _thaw(module: Any, frozen: Frozen, weights: dict[str, Tensor]) -> None:
    for name, wants in zip(module.names, frozen.requires_grad, strict=True):
        weight = weights[name]
        module._parameters[name] = weight if isinstance(weight, nn.Parameter) else nn.Parameter(weight, wants)
    vars(module).pop("_frozen_experts")
    vars(module)["_form"] = module._form._replace(precision=module._form.precision.of_floats())
    module._reset()


def _take_over(module: Any, name: str, written: Tensor) -> nn.Parameter | None:
    """Thaws experts one of whose weights somebody has written to."""
    with lock, torch.inference_mode(False):
        frozen = module._frozen_experts
        if frozen is None:
            return None
        weights = {own: written if own == name else module._unpacked(own) for own in module.names}
        _thaw(module, frozen, weights)
        return module._parameters[name]  # type: ignore[no-any-return]
