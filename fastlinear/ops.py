"""The dispatcher's view of a fast layer: the op fastlinear::linear.

    linear(x, weight, bias, activation, params, transposed, packed, accumulate) = activation(F.linear(x, weight, bias))

weight is the canonical one, [N, K], or [K, N] if `transposed`; x is [..., K] and the output [..., N], contiguous, of
the dtype of x, to which weight and bias are cast. The packed weight is no argument but an accelerator behind the
scenes: on the CPU, the layer whose parameters these are is looked up by their memory and its engine answers. So a graph
that holds the op never holds packed bytes, goes where the parameters go, and is right for any other tensors too.
`packed` and `accumulate` are what the accelerator may round to: the dtype of its weight, and the format of its sums.

A frozen layer has no canonical weight: its panels stand there, with `layout`, N and K, and its graphs hold them. What
needs the weight itself has it from fastlinear::unpack(panels, layout, n, k), [N, K] in the dtype of the layout.

Eager calls do not pass here (the dispatcher costs 3 us): it serves Dynamo and the profiler.
"""

from __future__ import annotations

import weakref
from collections.abc import Mapping
from typing import Any, NamedTuple, Protocol, TypeAlias

import torch
from torch import Tensor, nn

from fastlinear import _kernels, activations
from fastlinear.activations import Activation

_AUTOCAST = torch._C.DispatchKeySet(torch._C.DispatchKey.AutocastCPU)
_DTYPES = {name: dtype for dtype, name in _kernels.FORMATS.items()}
_IDENTITY = Activation("identity")  # what the op's string says for None


class Layer(Protocol):
    """What the op has to know of a fast layer."""

    activation: Activation | None
    in_features: int
    training: bool
    _transposed: bool
    _accumulate: str

    @property
    def _parameters(self) -> Mapping[str, Tensor | None]: ...

    @property
    def _frozen(self) -> Any: ...  # panels and form, or None

    @property
    def pack_dtype(self) -> torch.dtype: ...

    def _takes(self, x: Tensor) -> bool: ...

    def _native(self, x: Tensor, dtype: torch.dtype) -> Tensor | None: ...

    def _torch(self, x: Tensor) -> Tensor: ...


class _Form(NamedTuple):
    """The op's arguments behind the tensors; the dispatcher leaves out those that have their default values."""

    activation: str
    params: list[float]
    transposed: bool
    packed: torch.dtype | None = None
    accumulate: str = "fp32"
    layout: str = ""
    n: int = 0
    k: int = 0

    def fused(self) -> Activation | None:
        return None if self.activation == _IDENTITY.name else Activation(self.activation, tuple(self.params))

    def canonical(self, weight: Tensor) -> Tensor:
        """[N, K]"""
        if self.layout:
            return unpack(weight, self.layout, self.n, self.k)
        return weight.t() if self.transposed else weight


_Key: TypeAlias = tuple[Any, ...]
_layers: weakref.WeakValueDictionary[int, Layer] = weakref.WeakValueDictionary()  # all there are, by id
_found: weakref.WeakValueDictionary[_Key, Layer] = weakref.WeakValueDictionary()  # those that were looked up


def register(layer: Layer) -> None:
    """Lets the op find the layer by whatever parameters it has at the time."""
    _layers[id(layer)] = layer


def forget(layer: object) -> None:
    """Undoes `register`: the layer is no longer a fast one."""
    _layers.pop(id(layer), None)


def linear(layer: Layer, x: Tensor) -> Tensor:
    """layer(x) as the op where that is what a fast layer would run natively, else as torch's own ops; traceable."""
    weight, bias = layer._parameters.get("weight"), layer._parameters.get("bias")
    frozen = layer._frozen if weight is None else None
    if layer.training or (weight is None and frozen is None) or not _native_form(layer, x, weight, bias):
        return layer._torch(x)
    name, params = layer.activation or _IDENTITY
    form = (name, list(params), layer._transposed, layer.pack_dtype, layer._accumulate)
    y: Tensor = _op(x, weight, bias, *form) if frozen is None else _op(x, frozen.panels, bias, *form, *frozen.form)
    return y


def unpack(panels: Tensor, layout: str, n: int, k: int) -> Tensor:
    """The weight [n, k] of which `panels` are the packed bytes; an op, and so right in every mode of torch."""
    weight: Tensor = torch.ops.fastlinear.unpack.default(panels, layout, n, k)
    return weight


def _native_form(layer: Layer, x: Tensor, weight: Tensor | None, bias: Tensor | None) -> bool:
    if type(x) is not Tensor or x.is_nested or x.dim() == 0 or x.shape[-1] != layer.in_features:
        return False
    if weight is not None and weight.dim() != 2:
        return False
    operands = [t for t in (x, weight, bias) if t is not None]
    dense = all(t.device.type == "cpu" and t.layout is torch.strided for t in operands)
    fit = all(t.dtype in _kernels.FORMATS for t in operands) if torch.is_autocast_enabled("cpu") else layer._takes(x)
    return dense and fit and not (torch.is_grad_enabled() and any(t.requires_grad for t in operands))


def _formula(x: Tensor, weight: Tensor, bias: Tensor | None, *arguments: Any) -> Tensor:
    form = _Form(*arguments)
    return activations.linear(x, form.canonical(weight), bias, form.fused())


def _cpu(x: Tensor, weight: Tensor, bias: Tensor | None, *arguments: Any) -> Tensor:
    form = _Form(*arguments)
    packed = form.packed or weight.dtype
    key = (weight.data_ptr(), form.activation, *form.params, form.transposed, form.accumulate)
    slot = (*key, packed)
    layer = _found.get(slot)
    if layer is None or id(layer) not in _layers or not _is_of(layer, weight, bias):
        alive = [layer for ref in _layers.valuerefs() if (layer := ref()) is not None]
        able = [layer for layer in alive if _key_of(layer) == key and _is_of(layer, weight, bias)]
        layer = max(able, key=lambda layer: layer.pack_dtype is packed, default=None)
        if layer is not None:
            _found[slot] = layer
    y = None if layer is None else layer._native(x, packed)
    return _formula(x, weight, bias, *arguments).contiguous() if y is None else y


def _key_of(layer: Layer) -> _Key:
    name, params = layer.activation or _IDENTITY
    return (address_of(_weight_of(layer)), name, *params, layer._transposed, layer._accumulate)


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


def address_of(t: Tensor | None) -> int | None:
    """Where the memory of a plain CPU tensor begins; None for anything else, which may have none."""
    if t is None or type(t) not in (Tensor, nn.Parameter) or t.layout is not torch.strided or t.device.type != "cpu":
        return None
    return t.data_ptr()


def _fake(x: Tensor, weight: Tensor, bias: Tensor | None, *arguments: Any) -> Tensor:
    form = _Form(*arguments)
    n, k = (form.n, form.k) if form.layout else reversed(weight.shape) if form.transposed else weight.shape
    torch._check(x.dim() > 0 and x.shape[-1] == k, lambda: f"fastlinear::linear: x {x.shape} needs {k} columns")
    return x.new_empty((*x.shape[:-1], n))


def _fake_weight(panels: Tensor, layout: str, n: int, k: int) -> Tensor:
    return panels.new_empty((n, k), dtype=_DTYPES[layout.split("/")[0]])


def _autocast(x: Tensor, weight: Tensor, bias: Tensor | None, *arguments: Any) -> Tensor:
    """F.linear under autocast: x is cast, and the weight packed as it is cast."""
    if x.dtype not in _kernels.FORMATS:  # autocast leaves fp64 alone
        return _formula(x, weight, bias, *arguments)
    form = _Form(*arguments)._replace(packed=torch.get_autocast_dtype("cpu"))
    with torch._C._ExcludeDispatchKeyGuard(_AUTOCAST):
        y: Tensor = _op(x.to(form.packed), weight, bias, *form)
    return y


def _autograd(keyset: Any, x: Tensor, weight: Tensor, bias: Tensor | None, *arguments: Any) -> Tensor:
    """What is differentiated is made of torch's ops; anything else goes on below autograd."""
    if _differentiable(x) or _differentiable(weight) or (bias is not None and _differentiable(bias)):
        return _formula(x, weight, bias, *arguments)
    below = keyset & torch._C._after_autograd_keyset
    y: Tensor = _op.redispatch(below, x, weight, bias, *arguments)
    return y


def _differentiable(t: Tensor) -> bool:
    # Dynamo enters forward_ad without its Python level, so the tensor is asked itself; there is but one level, 0.
    return (t.requires_grad and torch.is_grad_enabled()) or torch._VF._unpack_dual(t, level=0)[1] is not None


def _vmap(
    info: Any, in_dims: tuple[int | None, ...], x: Tensor, weight: Tensor, bias: Tensor | None, *arguments: Any
) -> tuple[Tensor, int]:
    """A batch of inputs is more rows of x; a batch of parameters is a batched product."""
    of_x, of_weight, of_bias, *_ = in_dims
    x = x.expand(info.batch_size, *x.shape) if of_x is None else x.movedim(of_x, 0)
    if of_weight is None and of_bias is None:
        return _op(x, weight, bias, *arguments), 0
    form = _Form(*arguments)
    if of_weight is None:
        weight = form.canonical(weight)
    else:
        weight = weight.movedim(of_weight, 0).mT if form.transposed else weight.movedim(of_weight, 0)
    y = x.reshape(info.batch_size, x.shape[1:-1].numel(), x.shape[-1]) @ weight.to(x.dtype).mT
    if bias is not None:
        y = y + (bias if of_bias is None else bias.movedim(of_bias, 0).unsqueeze(1)).to(x.dtype)
    return activations.apply(form.fused(), y.reshape(*x.shape[:-1], y.shape[-1])), 0


_library = torch.library.Library("fastlinear", "DEF")
_library.define(
    "linear(Tensor x, Tensor weight, Tensor? bias, str activation, float[] params, bool transposed, "
    "ScalarType? packed=None, str accumulate='fp32', str layout='', int n=0, int k=0) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)
_op = torch.ops.fastlinear.linear.default
_library.impl("linear", _cpu, "CPU")
_library.impl("linear", _formula, "CompositeExplicitAutograd")  # every other device
_library.impl("linear", _autocast, "AutocastCPU")
_library.impl("linear", _autograd, "Autograd", with_keyset=True)
torch.library.register_fake("fastlinear::linear", _fake, lib=_library)
torch.library.register_vmap("fastlinear::linear", _vmap, lib=_library)

_library.define("unpack(Tensor panels, str layout, int n, int k) -> Tensor", tags=(torch.Tag.pt2_compliant_tag,))
_library.impl("unpack", lambda panels, *form: _kernels.Packed.over(panels, *form).unpack(), "CPU")
torch.library.register_fake("fastlinear::unpack", _fake_weight, lib=_library)
