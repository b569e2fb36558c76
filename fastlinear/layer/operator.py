"""The dispatcher's view of a fast layer: the op fastlinear::linear.

    linear(x, weight, bias, activation, params, transposed, packed, accumulate) = activation(F.linear(x, weight, bias))

weight is the canonical one, [N, K], or [K, N] if `transposed`; x is [..., K] and the output [..., N], contiguous, of
the dtype of x. `packed` is the format that the weight is rounded to, its own if "", `accumulate` the least exact
one of the sums, and `rows` with `scale`, `zero` and `smooth` tell how x is quantized, or was, where it is integers.
With `out`, a dtype, the output is integers, of `out_scale` and `out_zero`; `products` is the format that
x is rounded to, if it is floats. `activation` and `params` may spell a whole epilogue program (spec/programs.py), whose
tensors are `operands`. `reference` says it all in torch's ops.
The packed weight is no argument but an accelerator behind the
scenes: on the CPU, the layer whose parameters these are is looked up by their memory and its engine answers. So a graph
that holds the op never holds packed bytes, goes where the parameters go, and is right for any other tensors too.

A frozen layer has no canonical weight: its panels stand there, with `layout`, N and K, and its graphs hold them. What
needs the weight itself has it from fastlinear::unpack(panels, layout, n, k, smooth), [N, K] in the dtype of the layout,
or in fp32 where that is integers.

Eager calls do not pass here (the dispatcher costs 3 us): it serves Dynamo and the profiler.
"""

from __future__ import annotations

import weakref
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, Protocol, TypeAlias

import torch
from torch import Tensor, nn

import fastlinear._tensors as _tensors
import fastlinear._weights as _weights
from fastlinear.layer import gradient
from fastlinear.spec import activations
from fastlinear.spec.activations import Activation
from fastlinear.spec.formats import DTYPES, FP32, name_of
from fastlinear.spec.int4 import spelling
from fastlinear.spec.int8 import Requantize, Rows
from fastlinear.spec.packed import numbers
from fastlinear.spec.precision import Precision
from fastlinear.spec.programs import is_gated
from fastlinear.spec.reference import Reference

_AUTOCAST = torch._C.DispatchKeySet(torch._C.DispatchKey.AutocastCPU)
IDENTITY = Activation("identity")  # what the op's string says for None
SCHEMA = (
    "linear(Tensor x, Tensor weight, Tensor? bias, str activation, float[] params, bool transposed, "
    "str packed='', str accumulate='fp32', str layout='', int n=0, int k=0, "
    "str rows='', float scale=0.0, int zero=0, Tensor? smooth=None, ScalarType? out=None, float out_scale=0.0, "
    "int out_zero=0, str products='fp32', str coding='', Tensor[]? operands=None) -> Tensor"
)
Key: TypeAlias = tuple[Any, ...]


class Form(NamedTuple):
    """The op's arguments behind the tensors; the dispatcher leaves out those that have their default values."""

    activation: str
    params: list[float]
    transposed: bool
    packed: str = ""
    accumulate: str = "fp32"
    layout: str = ""
    n: int = 0
    k: int = 0
    rows: str = ""
    scale: float = 0.0
    zero: int = 0
    smooth: Tensor | None = None
    out: torch.dtype | None = None
    out_scale: float = 0.0
    out_zero: int = 0
    products: str = FP32
    coding: str = ""
    tensors: Sequence[Tensor] | None = None  # the operands

    @property
    def operands(self) -> tuple[Tensor, ...]:
        return tuple(self.tensors or ())

    def precision(self) -> Precision:
        """What the op may round to."""
        rows = Rows(self.rows, self.scale, self.zero, self.smooth) if self.rows else None
        out = None if self.out is None else Requantize(self.out, self.out_scale, self.out_zero)
        coding = spelling(self.coding) if self.coding else None
        return Precision(self.packed or None, self.accumulate, rows, out, products=self.products, coding=coding)

    def fused(self) -> Activation | None:
        """The activation as a layer has it."""
        return None if self.activation == IDENTITY.name else Activation(self.activation, tuple(self.params))

    def reference(self) -> Reference:
        """What the op computes, in torch's own ops."""
        return Reference(self.fused(), self.precision(), self.transposed, (self.layout, self.n, self.k))


def arguments(
    activation: Activation | None,
    transposed: bool,
    packed: str,
    precision: Precision,
    panels: tuple[str, int, int],
    operands: tuple[Tensor, ...] = (),
) -> Form:
    """What a layer tells the op. panels: layout, n and k of a frozen one, else "", 0 and 0."""
    name, params = activation or IDENTITY
    rows, out = precision.rows or Rows(""), precision.out or (None, 0.0, 0)
    coding = "" if precision.coding is None else precision.coding.spelled()
    rest: tuple[Any, ...] = (*panels, *rows, *out, precision.products, coding, [*operands] or None)
    return Form(name, list(params), transposed, packed, precision.accumulate, *rest)


def key_of(address: int | None, activation: Activation | None, transposed: bool, precision: Precision) -> Key:
    """Equal for what one layer may answer, whatever it is packed in."""
    rows, smooth = (precision.rows or Rows(""))._replace(smooth=None), address_of(precision.smooth)
    floats = precision.accumulate, precision.products, precision.coding
    return address, activation, transposed, floats, rows, smooth, precision.out


def address_of(t: Tensor | None) -> int | None:
    """Where the memory of a plain CPU tensor begins; None for anything else, which may have none."""
    if t is None or type(t) not in (Tensor, nn.Parameter) or t.layout is not torch.strided or t.device.type != "cpu":
        return None
    return t.data_ptr()


def unpack(panels: Tensor, layout: str, n: int, k: int, smooth: Tensor | None = None) -> Tensor:
    """The weight [n, k] of which `panels` are the packed bytes, after its columns were divided by `smooth` if that is
    given; an op, and so right in every mode of torch."""
    weight: Tensor = torch.ops.fastlinear.unpack.default(panels, layout, n, k)
    return weight if smooth is None else weight * smooth


class Layer(Protocol):
    """What the op has to know of a fast layer."""

    activation: Activation | None
    in_features: int
    training: bool
    _transposed: bool
    _precision: Precision

    @property
    def _parameters(self) -> Mapping[str, Tensor | None]: ...

    @property
    def _frozen(self) -> Any: ...  # panels and form, or None

    @property
    def precision(self) -> Precision: ...

    @property
    def packed_as(self) -> str: ...

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


def linear(layer: Layer, x: Tensor, bare: bool = False, operands: tuple[Tensor, ...] = ()) -> Tensor:
    """layer(x, *operands) as the op where that is what a fast layer would run natively, else as torch's own ops;
    traceable."""
    precision = layer.computes(bare)[1]
    weight, bias = layer._parameters.get("weight"), layer._parameters.get("bias")
    frozen = layer._frozen if weight is None else None
    if layer.training or (weight is None and frozen is None) or not _native_form(layer, x, weight, bias, operands):
        return layer._torch(x, bare, operands)
    tensors = (x, weight, bias, *operands)
    wanted = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)
    if wanted and precision.out is not None:  # integers have no gradients
        return layer._torch(x, bare, operands)
    return recorded(layer, x, bare, operands)


def recorded(layer: Layer, x: Any, bare: bool, operands: tuple[Any, ...] = ()) -> Tensor:
    """The call of the op, without a look at x: torch.fx hands its Proxy."""
    activation, precision = layer.computes(bare)
    operand, panels = layer._parameters.get("weight"), ("", 0, 0)
    if operand is None:
        operand, panels = layer._frozen.panels, layer._frozen.form
    form = arguments(activation, layer._transposed, layer.packed_as, precision, panels, operands)
    y: Tensor = _op(x, operand, layer._parameters.get("bias"), *form)
    return y


_FORM = tuple[
    str,
    list[float],
    bool,
    str,
    str,
    str,
    int,
    int,
    str,
    float,
    int,
    Tensor | None,
    int | None,
    float,
    int,
    str,
    str,
    list[Tensor] | None,
]


def for_script(layer: Layer, bare: bool) -> tuple[Tensor | None, Any]:
    """What stands for the weight of a frozen layer, and the arguments of the op behind the bias, as TorchScript takes
    them."""
    activation, precision = layer.computes(bare)
    frozen = layer._frozen if layer._parameters.get("weight") is None else None
    panels = None if frozen is None else frozen.form
    form = arguments(activation, layer._transposed, layer.packed_as, precision, panels or ("", 0, 0))
    return None if frozen is None else frozen.panels, torch.jit.Attribute(tuple(form), _FORM)


def _native_form(
    layer: Layer, x: Tensor, weight: Tensor | None, bias: Tensor | None, operands: tuple[Tensor, ...] = ()
) -> bool:
    if type(x) not in (Tensor, nn.Parameter) or x.is_nested or x.dim() == 0 or x.shape[-1] != layer.in_features:
        return False
    if weight is not None and weight.dim() != 2:
        return False
    tensors = [t for t in (x, weight, bias) if t is not None]
    dense = all(t.device.type == "cpu" and t.layout is torch.strided for t in (*tensors, *operands))
    fit = (torch.is_autocast_enabled("cpu") and all(t.dtype in _tensors.FORMATS for t in tensors)) or layer._takes(x)
    return dense and fit


def _formula(x: Tensor, weight: Tensor, bias: Tensor | None, *rest: Any) -> Tensor:
    form = Form(*rest)
    return form.reference().linear(x, weight, bias, form.operands)


def _cpu(x: Tensor, weight: Tensor, bias: Tensor | None, *rest: Any) -> Tensor:
    form = Form(*rest)
    packed = form.packed or name_of(weight.dtype)
    key = key_of(weight.data_ptr(), form.fused(), form.transposed, form.precision())
    slot = (*key, packed)
    layer = _find(slot, key, packed, weight, bias)
    y = None if layer is None else layer._native(x, packed, _key_of_layer(layer, False) != key, form.operands)
    return _formula(x, weight, bias, *rest).contiguous() if y is None else y


def _find(slot: Key, key: Key, packed: str, weight: Tensor, bias: Tensor | None) -> Layer | None:
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
    return _key_of_layer(layer, False), _key_of_layer(layer, True)


def _key_of_layer(layer: Layer, bare: bool) -> Key:
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


def _fake(x: Tensor, weight: Tensor, bias: Tensor | None, *rest: Any) -> Tensor:
    form = Form(*rest)
    n, k = (form.n, form.k) if form.layout else reversed(weight.shape) if form.transposed else weight.shape
    torch._check(x.dim() > 0 and x.shape[-1] == k, lambda: f"fastlinear::linear: x {x.shape} needs {k} columns")
    n = n // 2 if is_gated(form.fused()) else n
    dtype = form.out or (x.dtype if x.dtype.is_floating_point else torch.float32)
    return x.new_empty((*x.shape[:-1], n), dtype=dtype)


def _unpack(panels: Tensor, layout: str, n: int, k: int) -> Tensor:
    packed = _weights.Packed.over(panels.numpy(), layout, n, k)
    return numbers(packed)


def _fake_weight(panels: Tensor, layout: str, n: int, k: int) -> Tensor:
    return panels.new_empty((n, k), dtype=DTYPES.get(layout.split("/")[0], torch.float32))


def _autocast(x: Tensor, weight: Tensor, bias: Tensor | None, *rest: Any) -> Tensor:
    """F.linear under autocast: x is cast, and the weight packed as it is cast."""
    form, dtype = Form(*rest), torch.get_autocast_dtype("cpu")
    integers = form.precision().numbers(x) is not x
    if x.dtype not in _tensors.FORMATS and not integers:  # autocast leaves fp64 alone
        return _formula(x, weight, bias, *rest)
    form = form._replace(packed=form.precision().under(dtype))
    with torch._C._ExcludeDispatchKeyGuard(_AUTOCAST):
        y: Tensor = _op(x if integers else x.to(dtype), weight, bias, *form)
    return y


def _autograd(keyset: Any, x: Tensor, weight: Tensor, bias: Tensor | None, *rest: Any) -> Tensor:
    """What reverse mode differentiates has a backward of its own; other derivatives are those of torch's ops."""

    def below() -> Tensor:
        y: Tensor = _op.redispatch(keyset & torch._C._after_autograd_keyset, x, weight, bias, *rest)
        return y

    form = Form(*rest)
    tensors = [t for t in (x, weight, bias, *form.operands) if t is not None]
    differentiated = torch.is_grad_enabled() and any(t.requires_grad for t in tensors)
    # Dynamo enters forward_ad without its Python level, so the tensors are asked themselves; there is but one level, 0.
    if any(torch._VF._unpack_dual(t, level=0)[1] is not None for t in tensors):
        return _formula(x, weight, bias, *rest)
    if not differentiated or form.out is not None:
        return below()
    if torch._C._functorch.peek_interpreter_stack() is not None:
        return _formula(x, weight, bias, *rest)
    with torch.no_grad():
        y = below()
    return gradient.Attachment(form.reference())(x, weight, bias, y, None, form.operands)


def _vmap(
    info: Any, in_dims: tuple[int | None, ...], x: Tensor, weight: Tensor, bias: Tensor | None, *rest: Any
) -> tuple[Tensor, int]:
    """A batch of inputs is more rows of x; a batch of parameters is a batched product."""
    of_x, of_weight, of_bias, *_ = in_dims
    form = Form(*rest)
    if form.operands:
        dims: Any = in_dims[3 + Form._fields.index("tensors")]
        batched = [_in_front(t, d, x.dim() + (of_x is None)) for t, d in zip(form.operands, dims, strict=True)]
        rest = form._replace(tensors=batched)
    x = x.expand(info.batch_size, *x.shape) if of_x is None else x.movedim(of_x, 0)
    if of_weight is None and of_bias is None:
        return _op(x, weight, bias, *rest), 0
    reference, operands = Form(*rest).reference(), Form(*rest).operands
    rows = reference.rows(x)
    weight = reference.weight(weight if of_weight is None else weight.movedim(of_weight, 0)).to(rows.dtype)
    y = rows.reshape(info.batch_size, x.shape[1:-1].numel(), x.shape[-1]) @ weight.mT
    if bias is not None:
        y = y + (bias if of_bias is None else bias.movedim(of_bias, 0).unsqueeze(1)).to(y.dtype)
    return reference.finish(y.reshape(*x.shape[:-1], y.shape[-1]), x.dtype, operands), 0


def _in_front(operand: Tensor, dim: int | None, dims: int) -> Tensor:
    """An operand with its batch, if it has one, as the first of `dims` dimensions."""
    if dim is None:
        return operand
    operand = operand.movedim(dim, 0)
    return operand.reshape(operand.shape[0], *[1] * (dims - operand.dim()), *operand.shape[1:])


_library = torch.library.Library("fastlinear", "DEF")
_library.define(SCHEMA, tags=(torch.Tag.pt2_compliant_tag,))
_op = torch.ops.fastlinear.linear.default
_library.impl("linear", _cpu, "CPU")
_library.impl("linear", _formula, "CompositeExplicitAutograd")  # every other device
_library.impl("linear", _autocast, "AutocastCPU")
_library.impl("linear", _autograd, "Autograd", with_keyset=True)
torch.library.register_fake("fastlinear::linear", _fake, lib=_library)
torch.library.register_vmap("fastlinear::linear", _vmap, lib=_library)

_library.define("activation(Tensor y, str name, float[] params) -> Tensor", tags=(torch.Tag.pt2_compliant_tag,))
_library.impl(
    "activation", lambda y, name, params: activations.apply(Activation(name, params), y), "CompositeImplicitAutograd"
)

_library.define("unpack(Tensor panels, str layout, int n, int k) -> Tensor", tags=(torch.Tag.pt2_compliant_tag,))
_library.impl("unpack", _unpack, "CPU")
torch.library.register_fake("fastlinear::unpack", _fake_weight, lib=_library)
