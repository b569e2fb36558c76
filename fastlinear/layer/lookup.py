"""Which fast layer the tensors of a call of fastlinear::linear belong to: it is looked up by their memory."""

from __future__ import annotations

import weakref
from collections.abc import Mapping
from typing import Any, Protocol

from torch import Tensor

from fastlinear.layer.form import Key, address_of, key_of
from fastlinear.spec.activations import Activation
from fastlinear.spec.formats import DTYPES
from fastlinear.spec.precision import Precision


class Layer(Protocol):
    """What the op has to know of a fast layer."""

    activation: Activation | None
    in_features: int
    training: bool
    _transposed: bool
    _precision: Precision
    _spelled: str

    @property
    def _parameters(self) -> Mapping[str, Tensor | None]: ...

    @property
    def _frozen(self) -> Any: ...  # panels and form, or None

    @property
    def precision(self) -> Precision: ...

    @property
    def packed_as(self) -> str: ...

    @property
    def _differs_by_call(self) -> bool: ...

    def _columns(self) -> int: ...

    def _takes(self, x: Tensor) -> bool: ...

    def computes(self, bare: bool) -> tuple[Activation | None, Precision]: ...

    def _native(self, x: Tensor, packed_as: str, bare: bool, operands: tuple[Tensor, ...]) -> Tensor | None: ...

    def _torch(self, x: Tensor, bare: bool, operands: tuple[Tensor, ...]) -> Tensor: ...


_layers: weakref.WeakValueDictionary[int, Layer] = weakref.WeakValueDictionary()  # all there are, by id
_by_address: dict[int | None, list[weakref.ref[Layer]]] = {}  # by where their weights were when one was last looked for
_missed: dict[Key, int] = {}  # what no layer was found for -> calls until it is looked for again
_MISSES, _AGAIN = 4096, 1000
_found: weakref.WeakValueDictionary[Key, Layer] = weakref.WeakValueDictionary()  # those that were looked up


def register(layer: Layer) -> None:
    """Lets the op find the layer by whatever parameters it has at the time."""
    _layers[id(layer)] = layer
    _by_address.clear()
    _missed.clear()


def forget(layer: object) -> None:
    """Undoes `register`: the layer is no longer a fast one."""
    _layers.pop(id(layer), None)


def find(slot: Key, key: Key, packed: str, weight: Tensor, bias: Tensor | None) -> Layer | None:
    """The layer that the op's arguments belong to, if there is one. Addresses change without notice: where none is
    found all are looked at again, but for one question not in every call."""
    layer = _found.get(slot)
    if layer is not None and id(layer) in _layers and _is_of(layer, weight, bias):
        return layer
    if _missed.get(slot, 0) > 0:
        _missed[slot] -= 1
        return None
    layer = _look_up(key, packed, weight, bias)
    if layer is None:
        _by_address.clear()
        for each in [each for ref in _layers.valuerefs() if (each := ref()) is not None]:
            _by_address.setdefault(address_of(_weight_of(each)), []).append(weakref.ref(each))
        layer = _look_up(key, packed, weight, bias)
    if layer is not None:
        _found[slot] = layer
        return layer
    if len(_missed) >= _MISSES:
        _missed.clear()
    _missed[slot] = _AGAIN
    return None


def _look_up(key: Key, packed: str, weight: Tensor, bias: Tensor | None) -> Layer | None:
    near = [layer for ref in _by_address.get(weight.data_ptr(), ()) if (layer := ref()) is not None]
    able = [layer for layer in near if id(layer) in _layers and key in _keys_of(layer)]
    able = [layer for layer in able if _is_of(layer, weight, bias) and (packed in DTYPES or packed == layer.packed_as)]
    return max(able, key=lambda layer: layer.packed_as == packed, default=None)


def _keys_of(layer: Layer) -> tuple[Key, Key]:
    return key_of_layer(layer, False), key_of_layer(layer, True)


def key_of_layer(layer: Layer, bare: bool) -> Key:
    activation, precision = layer.computes(bare)
    return key_of(address_of(_weight_of(layer)), activation, layer._transposed, precision)


def _is_of(layer: Layer, weight: Tensor, bias: Tensor | None) -> bool:
    return _same(_weight_of(layer), weight) and _same(layer._parameters.get("bias"), bias)


def _weight_of(layer: Layer) -> Tensor | None:
    """What stands for the weight in the op."""
    weight = layer._parameters.get("weight")
    panels: Tensor | None = None if weight is not None or layer._frozen is None else layer._frozen.panels
    return weight if panels is None else panels


def _same(a: Tensor | None, b: Tensor | None) -> bool:
    if a is b or a is None or b is None:
        return a is b
    address = address_of(a)
    same_memory = address is not None and address == address_of(b)
    return same_memory and a.dtype is b.dtype and a.shape == b.shape and a.stride() == b.stride()
