"""Linear layers that other packages quantized: told by their attributes, without those packages, and taken over.

Whatever their class is, they become nn.Linear, in place, and then fast layers, frozen over the very codes. Several
packages repack or unpack their weights in the first call, after which there is nothing left to take over.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

import fastlinear._tensors as _tensors
import fastlinear._weights as _weights
from fastlinear.layer import packs
from fastlinear.layer.frozen import Freezable, Frozen
from fastlinear.spec.checkpoints import SCHEMES, torchao
from fastlinear.spec.checkpoints.scheme import Config, Parts, Scheme
from fastlinear.spec.formats import DTYPES, FP32, name_of
from fastlinear.spec.int4 import FP8, Coded, coding_of
from fastlinear.spec.int8 import Quantized
from fastlinear.spec.packed import Weight, stands_for
from fastlinear.spec.precision import Precision, Wanted

_UNPACKING = "ct_decompress_hook"
_CALLED = "its first call has repacked its weight: convert before that"
_NOT_YET = "bitsandbytes has not quantized its weight yet, which moving it to a device does"

Own = dict[str, Any]  # the attributes, parameters and buffers of a module


class Found(NamedTuple):
    """The tensors of a layer as a reader of checkpoints has them."""

    scheme: Scheme
    parts: Parts
    config: Config

    @property
    def shape(self) -> tuple[int, int]:
        """N and K; ValueError where the tensors do not go together."""
        return self.scheme.shape(self.parts, self.config)


class Taken(NamedTuple):
    """What becomes of a layer. linear: a stock one in its place, whose weight is on meta."""

    linear: nn.Linear
    frozen: Frozen
    precision: Precision


# ---- what tells them ----


def _tensors_of(own: Own, *names: str) -> dict[str, Tensor]:
    return {name: own[name] for name in names if own.get(name) is not None}


def _in_words(module: Any, own: Own) -> Found | str | None:
    """GPTQ packs along K, and AWQ along N, so that the shapes tell them apart."""
    if own.get("linear_mode") is not None:  # gptqmodel's
        return _CALLED
    bits = next((own[name] for name in ("bits", "w_bit") if own.get(name) is not None), 4)
    parts = _tensors_of(own, "qweight", "qzeros", "scales", "g_idx")
    qweight, scales = parts["qweight"], parts["scales"]
    columns = [t.shape[1] if t.dim() == 2 else -1 for t in (qweight, scales)]
    if columns[0] == columns[1]:
        form = module.qzero_format() if callable(getattr(module, "qzero_format", None)) else 1
        told = {"bits": bits, "sym": getattr(module, "sym", True), "checkpoint_format": "gptq_v2" if form == 2 else ""}
        return Found(SCHEMES["gptq"][0], parts, told)
    gemm = qweight.dtype is torch.int32 and columns[0] * 32 == columns[1] * bits
    return Found(SCHEMES["awq"][0], parts, {"bits": bits, "version": "gemm" if gemm else "gemv"})


def _compressed(module: Any, own: Own) -> Found | str | None:
    packed, plain = SCHEMES["compressed-tensors"]
    weights = getattr(own.get("quantization_scheme"), "weights", None)
    if weights is None:
        return "it has no quantization_scheme that tells of its weight"
    of_weights = {name: getattr(weights, name, None) for name in ("num_bits", "block_structure")}
    told = {"config_groups": {"group": {"weights": of_weights}}}
    for scheme in (packed, plain):
        if all(own.get(name) is not None for name in scheme.parts):
            integers = scheme is packed or own["weight"].dtype in (torch.int8, torch.float8_e4m3fn)
            return Found(scheme, _tensors_of(own, *scheme.parts, *scheme.optional), told) if integers else None
    return "of compressed-tensors pack-quantized, int8 and fp8 are supported"


def _fp8(module: Any, own: Own) -> Found | str | None:
    if own["weight"].dtype in _tensors.FORMATS:
        return None  # dequantized
    size = own.get("block_size")
    return Found(SCHEMES["fp8"][0], _tensors_of(own, "weight", "weight_scale_inv"), {"weight_block_size": size})


def _hqq(module: Any, own: Own) -> Found | str | None:
    meta = own["meta"]
    parts = {"W_q": own["W_q"].detach(), **{name: torch.as_tensor(meta[name], dtype=torch.int64, device="cpu")
             for name in ("shape", "axis", "nbits") if meta.get(name) is not None}}  # fmt: skip
    for name in ("scale", "zero"):
        if not isinstance(meta.get(name), Tensor):
            return f"its {name} is quantized, too, and floats are supported"
        parts[name] = meta[name]
    if meta.get("view_as_float"):
        parts["W_q"] = parts["W_q"].view(torch.uint8)
    return Found(SCHEMES["hqq"][0], parts, {})


def _bitsandbytes(module: Any, own: Own) -> Found | str | None:
    weight, (scheme, _) = own["weight"], SCHEMES["bitsandbytes"]
    state = weight.quant_state
    if state is None:
        return _NOT_YET
    if getattr(state, "packing_format_for_cpu", False):
        return _CALLED
    parts = {f"weight.{name}": tensor for name, tensor in state.as_dict(packed=True).items()}
    codes = weight.data.as_subclass(Tensor).reshape(-1).view(torch.uint8)
    return Found(scheme, {"weight": codes[:, None], **parts}, {})


def _bitsandbytes_int8(module: Any, own: Own) -> Found | str | None:
    weight, (_, scheme) = own["weight"], SCHEMES["bitsandbytes"]
    if weight.has_fp16_weights:
        return None
    largest = getattr(own.get("state"), "SCB", None) if weight.SCB is None else weight.SCB  # moved by the first call
    if largest is None:
        return _NOT_YET
    return Found(scheme, {"weight": weight.data.as_subclass(Tensor), "SCB": largest}, {})


def _torchao(module: Any, own: Own) -> Found | str | None:
    weight = own["weight"]
    if tuple(weight.block_size) == (1, weight.shape[-1]) and weight.qdata.shape == weight.shape:
        return None  # int8 with a scale a channel, which spec/foreign.py reads
    if getattr(weight, "act_pre_scale", None) is not None:
        return f"its weight ({type(weight).__name__}) wants its inputs scaled first, by act_pre_scale"
    few = getattr(weight, "target_dtype", None) is getattr(torch, "int4", 0) or weight.qdata.shape != weight.shape
    told = {"shape": tuple(weight.shape), "block_size": weight.block_size, "bits": 4 if few else 8}
    parts = {name: getattr(weight, name) for name in ("qdata", "scale", "zero_point")}
    return Found(torchao.SCHEME, {name: tensor for name, tensor in parts.items() if tensor is not None}, told)


Teller = Callable[[Any, Own], Found | str | None]
# What a layer, or its weight, has, and what tells of it then.
_LAYERS: tuple[tuple[tuple[str, ...], Teller], ...] = (
    (("qweight", "qzeros", "scales"), _in_words),
    (("weight_packed", "weight_scale"), _compressed),
    (("quantization_scheme", "weight_scale", "weight"), _compressed),
    (("weight_scale_inv", "weight"), _fp8),
    (("W_q", "meta"), _hqq),
)
_WEIGHTS: tuple[tuple[tuple[str, ...], Teller], ...] = (
    (("quant_state", "quant_type"), _bitsandbytes),
    (("SCB", "has_fp16_weights"), _bitsandbytes_int8),
    (("qdata", "scale", "block_size"), _torchao),
)


def found(module: nn.Module) -> Found | str | None:
    """What a layer that another package quantized holds, or in a few words why it cannot be taken over; None for any
    other module."""
    own, tell = _told(module)
    told = None if tell is None else tell(module, own)
    if not isinstance(told, Found):
        return told
    for name, tensor in told.parts.items():
        if type(tensor) not in (Tensor, nn.Parameter):
            return f"its {name} is a {type(tensor).__name__}"
        if tensor.device.type != "cpu":
            return f"its {name} is on device {tensor.device}"
    try:
        told.shape  # noqa: B018
    except ValueError as error:
        return f"of {told.scheme.label}: {error}"
    return told


def is_foreign(module: nn.Module) -> bool:
    """Whether another package quantized a layer, as far as its attributes tell."""
    own, tell = _told(module)
    return tell is not None and tell(module, own) is not None


def _told(module: nn.Module) -> tuple[Own, Teller | None]:
    if isinstance(module, Freezable):
        return {}, None
    own: Own = {**vars(module), **module._buffers, **module._parameters}
    for needs, tell in _LAYERS:
        if all(own.get(name) is not None for name in needs):
            return own, tell
    weight = module._parameters.get("weight")
    if weight is not None and type(weight) is not nn.Parameter:
        for needs, tell in _WEIGHTS:
            if all(hasattr(weight, name) for name in needs):
                return own, tell
    return own, None


# ---- what becomes of them ----


def why_not(found: Found, asked: Wanted, name: str) -> str | None:
    """Why a layer cannot be taken over as it was asked for, in a few words; None if it can."""
    if asked.scheme is None:
        return None
    weight, (_, k) = _weight_of(found, asked), found.shape
    if not isinstance(weight, Coded):
        return asked.why_not(name, k, weight if isinstance(weight, Quantized) else None)
    if asked.scheme.coding() is None:
        return f"its weight is quantized already, to {4 if weight.table is not None else 8} bits in groups"
    if asked.scheme.rows(name) is None:
        return None
    if not weight.coding.is_whole:
        return "its codes stand for other numbers than integers or halves, which alone multiply integers"
    most = _weights.dot_limit(False)
    return f"its groups of {weight.group} are larger than the {most} of an int32 sum" if weight.group > most else None


def _weight_of(told: Found, asked: Wanted) -> Weight:
    """What is to be packed. Schemes quantize fp8 anew, as they do floats."""
    weight = told.scheme.weight(told.parts, told.config)
    anew = asked.scheme is not None and isinstance(weight, Coded) and weight.codes.dtype is FP8
    return stands_for(weight) if anew else weight


def take(module: nn.Module, told: Found, asked: Wanted, name: str, held: torch.dtype | None, gated: bool) -> Taken:
    """A layer of which `why_not` has nothing to say. held: the dtype that its weight is to have where it is unpacked;
    None for that of its bias, or of its scales."""
    own, _ = _told(module)
    bias, (n, k) = own.get("bias"), told.shape
    scale = next((t for part, t in told.parts.items() if "scale" in part and t.dtype in _tensors.FORMATS), None)
    held = held or next((t.dtype for t in (bias, scale) if t is not None), torch.float32)
    stock = nn.Linear(k, n, bias is not None, "meta", held)
    if bias is not None:
        wide = bias.detach() if bias.dtype in (torch.float32, held) else bias.detach().float()
        stock.bias = nn.Parameter(wide.reshape(n), requires_grad=False)
    stock.train(module.training)
    frozen, precision = _frozen(told, asked, name, held, gated)
    return Taken(stock, frozen, precision)


def _frozen(told: Found, asked: Wanted, name: str, held: torch.dtype, gated: bool) -> tuple[Frozen, Precision]:
    weight, label = _weight_of(told, asked), told.scheme.label
    if isinstance(weight, Tensor):
        precision = asked.of(name, held)
        precision = precision._replace(packed=precision.packed or name_of(held), sample=None)
        packed = packs.pack_apart(weight, precision, gated)
        frozen = Frozen(packed, held, origin=f"unpacked from {label} to {packed.format}", smooth=precision.smooth)
        return frozen, precision._replace(packed=None if packed.format == name_of(held) else packed.format)
    scheme = asked.scheme
    packed = packed_as_is(weight, gated, "w8f" if scheme is None else scheme.packed)
    frozen = Frozen(packed, held, origin=f"from {label}")
    products = asked.switched if asked.switched != FP32 else asked.everywhere.products
    rows = None if scheme is None else scheme.rows(name)
    return frozen, precision_of(frozen)._replace(rows=rows, products=products, accumulate=asked.everywhere.accumulate)


def packed_as_is(weight: Coded | Quantized, gated: bool, integers: str = "w8f") -> _weights.Packed:
    """Codes, or integers in the format `integers`, bit for bit."""
    if isinstance(weight, Quantized):
        return packs.pack_quantized(weight, integers, gated)
    return packs.pack_coded(weight, gated)


def packed_for(weight: Weight, held: torch.dtype, gated: bool = False) -> _weights.Packed:
    """Codes and integers bit for bit; floats in their own dtype, or in `held`, that of the model around them, where
    that is narrower than theirs, or no kernel reads theirs."""
    if not isinstance(weight, Tensor):
        return packed_as_is(weight, gated)
    wide = weight.dtype is torch.float32 and held is not torch.float32  # of which no kernel multiplies 16 bits by fp32
    floats = weight.to(held) if wide or weight.dtype not in _tensors.FORMATS else weight
    return packs.pack_apart(floats, Precision(name_of(floats.dtype)), gated)


def precision_of(frozen: Frozen) -> Precision:
    """Of a layer that holds what was packed elsewhere."""
    own = frozen.packed.format in DTYPES and name_of(frozen.dtype) == frozen.packed.format
    return Precision(None if own else frozen.packed.format, coding=coding_of(frozen.packed))


def put_in_place(module: Any, linear: nn.Linear) -> tuple[type, Own]:
    """Makes a module a stock linear layer, but for the hooks of its calls, and tells what `put_back` undoes that by."""
    before = type(module), dict(vars(module))
    hooks = {
        name: held for name, held in vars(module).items() if name.startswith(("_forward_", "_backward_", "_is_full"))
    }
    vars(module).clear()
    vars(module).update({**vars(linear), **hooks})
    module.__class__ = nn.Linear
    return before


def put_back(module: Any, before: tuple[type, Own]) -> None:
    vars(module).clear()
    module.__class__ = before[0]
    vars(module).update(before[1])


def without_unpacking(model: nn.Module) -> Callable[[], None]:
    """Takes from a model the hook by which compressed-tensors unpacks all that it has packed in the first call, where
    nothing of that is left; and tells what undoes it."""
    handle, hooks = vars(model).get(_UNPACKING), dict(model._forward_pre_hooks)
    if handle is None or any("quantization_scheme" in vars(module) for module in model.modules()):
        return lambda: None
    handle.remove()
    del vars(model)[_UNPACKING]

    def undo() -> None:
        model._forward_pre_hooks.update(hooks)
        vars(model)[_UNPACKING] = handle

    return undo


def dtype_around(model: nn.Module) -> torch.dtype | None:
    """The dtype of the first parameter of a model that is no layer's of these."""
    for module in model.modules():
        scaled = any(name.endswith("_scale_inv") for name in module._parameters)  # experts in fp8, which are no layer
        if not scaled and not is_foreign(module):
            for parameter in module._parameters.values():
                if parameter is not None and parameter.dtype in _tensors.FORMATS:
                    return parameter.dtype
    return None


def text_of(layer: Any) -> str:
    """What the weight of a layer that is not fast is held in: its dtype, or the package that quantized it."""
    told = found(layer)
    if isinstance(told, Found):
        return told.scheme.label
    weight = layer._parameters.get("weight")
    return "quantized" if weight is None and told is not None else str(layer.weight.dtype).removeprefix("torch.")


def nbytes_of(layer: nn.Module) -> int:
    """Of a layer that another package quantized, with its scales."""
    told = found(layer)
    parts = told.parts.values() if isinstance(told, Found) else (*layer.parameters(), *layer.buffers())
    return sum(tensor.nbytes for tensor in parts)
