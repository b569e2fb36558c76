"""The unpacked weight of a frozen layer in other hands: a tensor that takes writes over instead of losing them.

A frozen layer has no weight that could be written to, only panels. What `layer.weight` gives is a copy, and a write to
it (`layer.weight.data += delta`, `copy_`, an init, a write to a view) would vanish. So it is a tensor that looks, after
every torch function it takes part in, whether that changed it; if so, its memory becomes the layer's Parameter, and the
layer is frozen no more.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

import fastlinear._torch as _torch

_SETTERS = {vars(_torch.TensorBase)[name].__set__ for name in ("grad", "requires_grad")}
_SET_DATA = vars(_torch.TensorBase)["data"].__set__


class Lent:
    """A weight that is lent: `whole`, a plain tensor; what is called with it when it was written to, which gives the
    Parameter that it became, if there was still a layer to take it; and that, afterwards."""

    def __init__(self, whole: Tensor, take_over: Callable[[Tensor], nn.Parameter | None]) -> None:
        self.whole, self._take_over = whole, take_over
        self.storage = whole.untyped_storage()._cdata
        self.parameter: nn.Parameter | None = None

    def hand_out(self, view: Tensor) -> LentTensor:
        """A tensor to give away; `view` is plain, and of the memory of `whole`."""
        tensor: LentTensor = view.as_subclass(LentTensor)
        tensor._lent, tensor._seen, tensor._is_whole = self, view._version, view is self.whole
        return tensor

    def write(self, became: nn.Parameter | None = None) -> None:
        """Somebody writes, or has written, to the memory; or a tensor that was lent has become a Parameter itself."""
        if self.parameter is None:
            self.parameter = self._take_over(self.whole if became is None else became)


class LentTensor(Tensor):
    """`layer.weight` of a frozen layer, and its views. Pickles and deep copies are plain tensors; what numpy and DLPack
    get is read-only or a copy."""

    _lent: Lent
    _seen: int  # the version of the last look
    _is_whole: bool  # not a view, of which other data is no concern of the layer's

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        handed = [*_handed(args), *_handed((kwargs or {}).values())]
        with _torch.DisableTorchFunctionSubclass():
            if func is Tensor.__dlpack__ and handed:
                args = (args[0].clone(), *args[1:])
            result = func(*args, **(kwargs or {}))
            for tensor in handed:
                if tensor._version != tensor._seen:
                    tensor._seen = tensor._version
                    tensor._lent.write()
            if func == _SET_DATA and _is_first(args, handed):
                _replace(args[0])
            elif func in _SETTERS and _is_first(args, handed) and args[1] is not None and args[1] is not False:
                _set(func, *args)
            return _lend(result, handed)

    def set_(self, *args: Any, **kwargs: Any) -> Any:  # which is no torch function
        with _torch.DisableTorchFunctionSubclass():
            super().set_(*args, **kwargs)
            _replace(self)
        return self

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, value)
        if name == "__class__" and vars(self).get("_is_whole") and isinstance(self, nn.Parameter):
            vars(self)["_lent"].write(self)  # torch.utils.swap_tensors, which goes on to swap all else

    def __deepcopy__(self, memo: dict[int, Any]) -> Tensor:
        return _plain(self).clone()

    def __reduce_ex__(self, protocol: Any) -> Any:
        return _plain(self).__reduce_ex__(protocol)


def _handed(values: Any) -> Iterator[LentTensor]:
    for value in values:
        if isinstance(value, LentTensor):
            yield value
        elif isinstance(value, (list, tuple)):
            yield from _handed(value)


def _is_first(args: Any, handed: list[LentTensor]) -> bool:
    return bool(handed) and args[0] is handed[0]


def _lend(result: Any, handed: list[LentTensor]) -> Any:
    """The result of a function of lent tensors, lent as well where it is in the memory of one."""
    if type(result) is Tensor:
        if result.layout is torch.strided:
            storage = result.untyped_storage()._cdata
            return next((t._lent.hand_out(result) for t in handed if t._lent.storage == storage), result)
    elif type(result) in (list, tuple):
        return type(result)(_lend(each, handed) for each in result)
    elif hasattr(result, "__array_interface__"):  # numpy's
        result.flags.writeable = False
    return result


def _replace(tensor: LentTensor) -> None:
    """The tensor has got other data, unless it is its own, as where `layer.weight.data += delta` ends."""
    whole = tensor._lent.whole
    if not tensor._is_whole:
        return
    forms = [(t.data_ptr(), t.shape, t.stride(), t.dtype) for t in (tensor, whole)]
    if forms[0] != forms[1]:
        tensor._lent.write()
        if tensor._lent.parameter is not None:
            tensor._lent.parameter.data = _plain(tensor)


def _set(func: Any, tensor: LentTensor, value: Any) -> None:
    """The attribute of the Parameter, as it was set on what is lent."""
    tensor._lent.write()
    if tensor._lent.parameter is not None:
        func(tensor._lent.parameter, _plain(value) if isinstance(value, Tensor) else value)


def _plain(tensor: Tensor) -> Tensor:
    with _torch.DisableTorchFunctionSubclass():
        return tensor.as_subclass(Tensor)
