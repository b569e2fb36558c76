"""Frozen layers: the packed weight stays, the Parameter goes, and everything else that nn.Linear does is kept.

A frozen layer has None in the place of its parameter "weight", and a Frozen in its __dict__. `layer.weight` is unpacked
at each access, as a tensor that is for reading; so are state dicts. What needs a weight to write to (load_state_dict,
half(), to("cuda") ...) thaws the layer first, and so does whoever writes to the tensor (lent.py). Model code that reads
a weight in every call, like T5's feed-forward for its dtype, would spend most of its time unpacking: from some point
on, it gets a tensor that is kept.

A Frozen stands for a weight: layers that hold the same one are tied. `hold(layer, frozen)` freezes a fast layer over it
and `linear.adopt(module, ..., over=frozen)` a stock one; `record_of(layer)` is the layer's, if it is frozen.

A frozen layer without a bias has an empty Parameter instead of its weight, so that `next(model.parameters())`, the
usual way to ask for dtype and device, has an answer. No state dict has it.
"""

from __future__ import annotations

import functools
import logging
import sys
import weakref
from typing import Any
from weakref import WeakSet

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

import fastlinear._modes as _modes
import fastlinear._torch as _torch
import fastlinear._weights as _weights
from fastlinear._engine import Engine
from fastlinear.layer import operator
from fastlinear.layer.lent import Lent, LentTensor
from fastlinear.layer.lock import lock
from fastlinear.layer.packs import GatedPacked, kind_of, repack
from fastlinear.layer.shard import Shard, shard_of
from fastlinear.plan import table
from fastlinear.plan.candidates import Chosen
from fastlinear.spec import gates
from fastlinear.spec.formats import present
from fastlinear.spec.precision import Precision

_log = logging.getLogger("fastlinear")

_OFTEN = 32  # reads of a weight by others after which it is kept unpacked
PLACEHOLDER = "frozen_weight"  # the name of the empty Parameter


class Frozen:
    """What frozen layers have instead of a weight.

    packed: the weight [n, k]; dtype: what the Parameter was in, and will be again; requires_grad: likewise; origin: for
    the report, in a few words, where the pack comes from if it was not packed here ("repacked from bf16/32x2"); smooth:
    fp32 [k] that the columns of the weight were divided by before they were packed, None for 1; shard: where processes
    share the weight, of which `packed` is a part.
    """

    def __init__(
        self,
        packed: _weights.Packed,
        dtype: torch.dtype,
        requires_grad: bool = False,
        origin: str = "",
        smooth: Tensor | None = None,
        shard: Shard | None = None,
    ) -> None:
        self.packed, self.dtype, self.requires_grad, self.origin = packed, dtype, requires_grad, origin
        self.smooth, self.shard = smooth, shard
        self.layers: WeakSet[Freezable] = WeakSet()  # those that are tied by this
        self.reads = 0  # by others than the layer itself
        self.kept: Lent | None = None  # what is lent, once it is read often
        self._lent: weakref.ref[Lent] | None = None
        # What the op takes, where Dynamo finds it: it does not look into extension types.
        self.panels, self.form = packed.data, (packed.layout, packed.n, packed.k)
        self.gated = isinstance(packed, GatedPacked)

    def unpack(self, transposed: bool) -> Tensor:
        """The weight as the Parameter had it: [n, k], or [k, n] if transposed."""
        weight = operator.unpack(self.panels, *self.form)
        weight = gates.separate(weight, self.form[0]) if self.gated else weight
        weight = (weight if self.smooth is None else weight * self.smooth).to(self.dtype)
        return weight.t().contiguous() if transposed else weight

    @property
    def lent(self) -> Lent | None:
        """The unpacked weight that somebody has at the moment."""
        return None if self._lent is None else self._lent()

    def read(self, transposed: bool) -> Tensor:
        """The same for others than the layer; all at one time get the same memory, and whoever writes to it thaws."""
        lent = self.lent
        if lent is None:
            with torch.inference_mode(False):
                weight = self.unpack(transposed)
            self.reads += 1
            if type(weight) is not Tensor:
                return weight
            lent = Lent(weight, functools.partial(_take_over, weakref.ref(self)))
            self._lent, self.kept = weakref.ref(lent), lent if self.reads > _OFTEN else None
        return lent.hand_out(lent.whole)

    def __deepcopy__(self, memo: dict[int, Any]) -> Frozen:  # copied layers are tied by the copy
        return Frozen(self.packed, self.dtype, self.requires_grad, self.origin, self.smooth, self.shard)

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        packed = self.packed
        if self.shard is not None:
            raise TypeError(
                "a frozen weight that processes share cannot be pickled: unfreeze the model, or save its file"
            )
        rest = self.dtype, self.requires_grad, self.smooth, self.gated
        if packed.grouped:  # whose layout is the same on every machine
            data = _bytes_of(packed.data) if protocol > 2 else packed.data
            return _of_groups_again, (data, packed.layout, packed.n, packed.k, *rest)
        contents = packed.unpack(), packed.scale, packed.zero
        if protocol > 2:
            return _packed_from_bytes, (packed.format, *map(_bytes_of, contents), *rest)
        # torch.save's protocol, to which bytes are text. What goes to another process has a later one: torch sends
        # tensors as open files, which must live until they have been received, as these do not.
        return _packed_again, (packed.format, *contents, *rest)


def _bytes_of(tensor: Tensor | None) -> tuple[bytearray, torch.dtype, tuple[int, ...]] | None:
    if tensor is None:
        return None
    return bytearray(tensor.reshape(-1).view(torch.uint8).numpy()), tensor.dtype, tuple(tensor.shape)


def _tensor_of(contents: tuple[bytearray, torch.dtype, tuple[int, ...]] | None) -> Tensor | None:
    if contents is None:
        return None
    data, dtype, shape = contents
    if not data:  # which frombuffer refuses
        return torch.empty(shape, dtype=dtype, device="cpu")
    return torch.frombuffer(data, dtype=dtype).reshape(shape)


def _packed_from_bytes(packed_as: str, weight: Any, scale: Any, zero: Any, *rest: Any) -> Frozen:
    contents: tuple[Any, ...] = tuple(map(_tensor_of, (weight, scale, zero)))
    return _packed_again(packed_as, *contents, *rest)


def _packed_again(
    packed_as: str,
    weight: Tensor,
    scale: Tensor | None,
    zero: Tensor | None,
    dtype: torch.dtype,
    requires_grad: bool,
    smooth: Tensor | None,
    gated: bool = False,
) -> Frozen:
    packed = kind_of(gated)(weight, table.layout(present(packed_as)), scale, zero)
    return Frozen(packed, dtype, requires_grad, smooth=smooth)


def _of_groups_again(
    data: Any, layout: str, n: int, k: int, dtype: torch.dtype, requires_grad: bool, smooth: Tensor | None, gated: bool
) -> Frozen:
    tensor = data if isinstance(data, Tensor) else _tensor_of(data)
    assert tensor is not None
    aligned = kind_of(gated).over(tensor.clone().numpy(), layout, n, k)
    return Frozen(repack(aligned, layout), dtype, requires_grad, smooth=smooth)


def record_of(module: nn.Module) -> Frozen | None:
    """The Frozen that a frozen layer has in the place of its weight; None for any other module."""
    frozen: Frozen | None = getattr(module, "_frozen", None)
    # functional_call lends a frozen layer a weight
    return None if frozen is None or module._parameters.get("weight") is not None else frozen


def known_by(layer: nn.Module) -> Any:
    """What graphs know a layer by: its weight, or the panels of a frozen one, which is not unpacked for it."""
    frozen = record_of(layer)
    return layer._parameters.get("weight") if frozen is None else frozen.panels


def shared_as(layer: nn.Module) -> Shard | None:
    """How the weight of a layer, fast or not, lies in the memories of processes that share it."""
    frozen = record_of(layer)
    return shard_of(layer._parameters.get("weight")) if frozen is None else frozen.shard


class _Parameters(dict[str, Any]):
    """The parameters of a layer that was frozen, with None in the place of "weight". Code that looks for the weight in
    here instead of asking the layer, as accelerate and spectral_norm do, means to replace it: the layer is thawed."""

    def __init__(self, layer: Freezable, parameters: dict[str, Any]) -> None:
        super().__init__(parameters)
        self.layer = weakref.ref(layer)

    def __getitem__(self, name: str) -> Any:
        if name == "weight" and self.get(name) is None and sys._getframe(1).f_code is not LENDING:
            thaw_layer(self.layer())
        return super().__getitem__(name)

    def __contains__(self, name: object) -> bool:
        if name == "weight" and self.get(name) is None and sys._getframe(1).f_code is _PARAMETRIZING:
            thaw_layer(self.layer())
        return super().__contains__(name)

    def __reduce__(self) -> Any:  # copies and pickles have ones of their own
        return dict, (dict(self),)


_PARAMETRIZING = parametrize.register_parametrization.__code__  # which makes a buffer of what is no Parameter
LENDING = _torch.swap_tensor.__code__  # of functional_call, which puts back what it found


def watch_parameters(layer: Freezable) -> None:
    """Has those who look for the weight among the parameters of a frozen layer find it."""
    known = layer._parameters
    if not isinstance(known, _Parameters) or known.layer() is not layer:
        vars(layer)["_parameters"] = _Parameters(layer, known)


class Freezable(nn.Module):
    """The part of a fast layer that makes a frozen one look like any other."""

    _frozen: Frozen | None = None
    _transposed: bool
    _precision: Precision
    _engine: Engine
    _plans: dict[tuple[Engine, int, str, int], Chosen]

    def _reset(self) -> None:
        raise NotImplementedError

    @property
    def packed_as(self) -> str:
        raise NotImplementedError

    @property
    def weight_shape(self) -> tuple[int, ...]:
        raise NotImplementedError

    @property
    def precision(self) -> Precision:
        raise NotImplementedError

    def __getattr__(self, name: str) -> Any:
        if name == "weight":
            frozen = record_of(self)
            if frozen is not None and frozen.shard is None:
                return _handed_out(frozen, self._transposed)
            if frozen is not None:  # writes into a DTensor go unseen
                thaw_layer(self)
                return self._parameters[name]
        return super().__getattr__(name)

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, value)
        if name == "weight":
            _let_go(self)

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        # torch's pruning gives the weight itself another name; weight_norm makes a Parameter of what is lent, its own.
        if isinstance(param, LentTensor) and not isinstance(param, nn.Parameter) and is_frozen(self):
            thaw_layer(self)
            param = self._parameters["weight"]
        super().register_parameter(name, param)

    def __delattr__(self, name: str) -> None:
        super().__delattr__(name)
        if name == "weight":
            _let_go(self)

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        frozen = record_of(self)
        if frozen is not None:
            # Averages of weights are written straight into a model's state dict.
            shared = None if frozen.shard is None else frozen.shard.whole(frozen.unpack(self._transposed))
            destination[prefix + "weight"] = _handed_out(frozen, self._transposed) if shared is None else shared
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination.pop(prefix + PLACEHOLDER, None)

    def _load_from_state_dict(
        self, state_dict: Any, prefix: str, metadata: Any, strict: bool, missing_keys: list[str], *lists: Any
    ) -> None:
        if prefix + "weight" in state_dict:
            thaw_layer(self)
        elif strict and is_frozen(self):
            missing_keys.append(prefix + "weight")
        super()._load_from_state_dict(state_dict, prefix, metadata, strict, missing_keys, *lists)
        if prefix + PLACEHOLDER in missing_keys:
            missing_keys.remove(prefix + PLACEHOLDER)

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        frozen = record_of(self)
        if frozen is not None:
            before = torch.empty(0, dtype=frozen.dtype, device="cpu")
            after = fn(before)
            if after.dtype is not before.dtype or after.device != before.device:
                thaw_layer(self)
        self._reset()  # to(), half(), share_memory() ...: the weight is about to be another one
        return super()._apply(fn, recurse)  # type: ignore[no-untyped-call]


def _handed_out(frozen: Frozen, transposed: bool) -> Tensor:
    """The weight for others than the layer; whoever records or rewrites what is done with it gets plain ops."""
    plain = torch.compiler.is_dynamo_compiling() or _modes.watched()
    return frozen.unpack(transposed) if plain else frozen.read(transposed)


def is_frozen(layer: nn.Module) -> bool:
    return record_of(layer) is not None


def hold(layer: Any, frozen: Frozen) -> None:
    """Makes a fast layer a frozen one over `frozen`; what it had as its weight is let go, unread.

    Raises ValueError where the shapes differ.
    """
    shape = (frozen.packed.n, frozen.packed.k)
    held = layer.weight_shape[::-1] if layer._transposed else layer.weight_shape
    if shape != held:
        raise ValueError(
            f"a layer of {held[1]} in and {held[0]} out features cannot hold a weight of {shape[0]} x {shape[1]}"
        )
    with lock:
        if layer._frozen is not None:
            layer._frozen.layers.discard(layer)
        vars(layer)["_frozen"] = frozen  # first, since other threads may be calling the layer
        layer._parameters["weight"] = None
        if layer._parameters.get("bias") is None:
            empty = torch.empty(0, dtype=frozen.dtype, device="cpu")
            layer._parameters[PLACEHOLDER] = nn.Parameter(empty, requires_grad=False)
        layer._reset()


def thaw_layer(layer: Any) -> None:
    """Makes the weight of a frozen layer, and of those tied to it, one Parameter again; does nothing to others."""
    with lock, torch.inference_mode(False):
        frozen = record_of(layer)
        if frozen is None:
            return
        lent = frozen.lent
        held = frozen.unpack(layer._transposed) if lent is None else lent.whole
        weight = nn.Parameter(held if frozen.shard is None else frozen.shard.whole(held), frozen.requires_grad)
        if lent is not None:
            lent.parameter = weight
        _thaw(frozen, weight)


def _take_over(record: weakref.ref[Frozen], written: Tensor) -> nn.Parameter | None:
    """Thaws the layers of a Frozen, whose weight somebody has written to in the memory that was lent."""
    with lock, torch.inference_mode(False):
        frozen = record()
        if frozen is None or not frozen.layers:
            return None
        weight: Any = written if isinstance(written, nn.Parameter) else nn.Parameter(written, frozen.requires_grad)
        _log.info("a frozen weight of %d x %d was written to, and is a Parameter again", *written.shape)
        _thaw(frozen, weight)
        return weight  # type: ignore[no-any-return]


def _thaw(frozen: Frozen, weight: nn.Parameter) -> None:
    for tied in list(frozen.layers):
        tied._parameters["weight"] = weight
        _let_go(tied)


def _let_go(layer: Freezable) -> None:
    """A layer that was frozen has got, or lost, a weight."""
    frozen = vars(layer).pop("_frozen", None)
    if frozen is not None:
        frozen.layers.discard(layer)
        layer._parameters.pop(PLACEHOLDER, None)
        vars(layer)["_precision"] = layer._precision.of_floats()
        layer._reset()
