"""What the tensors of a quantized linear layer stand for, as GPTQ, AWQ, compressed-tensors, bitsandbytes, HQQ and fp8
checkpoints have them, in plain torch.

Each scheme takes the tensors of one layer by the names they have there, and gives its weight [N, K]; what does not go
together shows in `shape`, which says so with ValueError before anything is unpacked. W = scale * (q - zero) becomes
scale * number + offset: numbers are counted from the middle of the codes, and there is an offset only where a zero
point is another than that; it is in fp32, which holds it exactly.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

import fastlinear._kernels as _kernels
from fastlinear.spec.int4 import FP8, TABLES, Coded, as_tensor, dequantize
from fastlinear.spec.int8 import Quantized
from fastlinear.spec.packed import Weight

Parts = Mapping[str, Tensor]
Config = Mapping[str, Any]

_AWQ = (0, 4, 1, 5, 2, 6, 3, 7)  # the nibble that has column i of 8
_STATES = ("weight.quant_state.bitsandbytes__nf4", "weight.quant_state.bitsandbytes__fp4")
_INPUTS = (
    "input_scale",
    "input_zero_point",
)  # by which compressed-tensors would quantize inputs, which are as they are
_OF_HQQ = (  # what HQQ notes of a layer, beside its weight
    "axis", "nbits", "group_size", "packing", "unpack_view_dtype", "view_as_float", "quant_scale", "quant_zero",
    "compute_dtype", "offload_meta", "encoded_state_dict", "stores_quant_config", "channel_wise", "optimize",
    "round_zero",
)  # fmt: skip


class Scheme(NamedTuple):
    """How a layer's weight is stored. parts: names of its tensors, the first of which tells such a layer; optional:
    more of them; shape and weight: of the parts and the checkpoint's quantization_config. shape raises ValueError where
    the parts do not go together, and weight no more then."""

    label: str
    parts: tuple[str, ...]
    optional: tuple[str, ...]
    shape: Callable[[Parts, Config], tuple[int, int]]
    weight: Callable[[Parts, Config], Weight]


def need(parts: Parts, name: str, dtypes: tuple[torch.dtype, ...], *shape: int | None) -> Tensor:
    """A tensor of one of these dtypes, and of this shape but where it is None."""
    tensor = parts[name]
    if tensor.dtype not in dtypes:
        raise ValueError(f"{name} is {tensor.dtype}, not {' or '.join(map(str, dtypes))}")
    fits = tensor.dim() == len(shape) and all(e in (None, s) for e, s in zip(shape, tensor.shape, strict=True))
    if not fits:
        wanted = ", ".join("any" if extent is None else str(extent) for extent in shape)
        raise ValueError(f"{name} is of shape {list(tensor.shape)}, not [{wanted}]")
    return tensor


SCALES = (torch.float16, torch.bfloat16, torch.float32)
_BLOCK_SCALES = (*SCALES, torch.uint8, torch.float8_e8m0fnu)


def _fields(words: Tensor, bits: int) -> Tensor:
    """The unsigned fields of int32 words, the lowest first: [..., W] -> [..., W * 32 / bits], uint8."""
    fields = words.contiguous().view(torch.uint8)
    return fields if bits == 8 else torch.stack([fields & 15, fields >> 4], -1).flatten(-2)


def _bits(config: Config, name: str = "bits") -> int:
    bits = config.get(name, 4)
    if bits not in (4, 8) or isinstance(bits, bool):
        raise ValueError(f"its {name} are {bits!r}, and 4 and 8 are supported")
    return int(bits)


def _grouped(
    codes: Tensor, scale: Tensor, zero: Tensor | None, bits: int, group: int, of_group: Tensor | None
) -> Weight:
    """Of unsigned codes [N, K], and scales and zero points [N, groups]; of_group: the group of each column, or None
    where they lie one after another. Columns of groups as long as these are put in order; others are unpacked."""
    middle, order = 1 << bits - 1, None
    if of_group is not None:
        order = of_group.argsort(stable=True)
        if not torch.equal(of_group[order], _one_after_another(len(order), group)):
            zeros = middle if zero is None else zero[:, of_group]
            return scale.float()[:, of_group] * (codes.float() - zeros)
        codes, order = codes[:, order], order.int()
    offset = None
    if zero is not None and bool((zero != middle).any()):
        scale = scale.float()
        offset = scale * (middle - zero.float())
    if bits == 4:
        return Coded(codes, scale, as_tensor(TABLES["int4"]), group, offset, None, order)
    return Coded((codes.int() - middle).to(torch.int8), scale, None, group, offset, None, order)


def _one_after_another(k: int, group: int) -> Tensor:
    """The group of each of k inputs that lie so."""
    return torch.arange(k, device="cpu") // group


def group_of(k: int, groups: int) -> int:
    """The k that share a scale, as a power of two: one scale for all has the next one from k on."""
    if groups == 1:
        return 1 << max(k - 1, 15).bit_length()
    size = -(-k // groups) if groups else 0
    if size < 16 or size & (size - 1) or -(-k // size) != groups:
        raise ValueError(f"it has {groups} groups of {k} inputs, and groups of 16, 32, 64 ... are supported")
    return size


# ---- GPTQ and AWQ ----


def _gptq_bits(parts: Parts, config: Config) -> int:
    """The config's, or, where that tells others for patterns of names, those of a layer's zero points."""
    if not config.get("dynamic"):
        return _bits(config)
    words, n = (parts[name].shape[-1] if parts[name].dim() else 0 for name in ("qzeros", "qweight"))
    return _bits({"bits": words * 32 // n if n else None})


def _gptq_shape(parts: Parts, config: Config) -> tuple[int, int]:
    bits = _gptq_bits(parts, config)
    qweight = need(parts, "qweight", (torch.int32,), None, None)
    n, k = qweight.shape[1], qweight.shape[0] * 32 // bits
    groups = len(need(parts, "scales", SCALES, None, n))
    need(parts, "qzeros", (torch.int32,), groups, n * bits // 32)
    group_of(k, groups)
    _check_order(parts, "g_idx", k, groups)
    return n, k


def _check_order(parts: Parts, name: str, k: int, groups: int) -> None:
    """ValueError where what names the group of each input, if there is such, names none."""
    if name in parts:
        order = need(parts, name, (torch.int32, torch.int64), k)
        if bool((order < 0).any() | (order >= groups).any()):
            raise ValueError(f"{name} names groups that are none of {groups}")


def _order(parts: Parts, name: str, k: int, groups: int) -> Tensor | None:
    """The group of each input, where these do not lie one after the other."""
    order = parts.get(name)
    if order is None or torch.equal(order.long(), _one_after_another(k, group_of(k, groups))):
        return None
    return order.long()


def _gptq(parts: Parts, config: Config) -> Weight:
    """Codes are packed along K, zero points along N. Version 1 stores zero points less 1. A checkpoint that is
    symmetric tells its version by their value, whatever it says of itself."""
    bits, (_, k), scales = _gptq_bits(parts, config), _gptq_shape(parts, config), parts["scales"]
    zeros = _fields(parts["qzeros"], bits).int()
    middle, mask = 1 << bits - 1, (1 << bits) - 1
    second = config.get("checkpoint_format") in ("gptq_v2", "gptq_p")
    if config.get("sym", True) and bool((zeros == middle).all()):
        second = True
    elif config.get("sym", True) and bool((zeros == middle - 1).all()):
        second = False
    zeros = zeros if second else zeros + 1 & mask
    codes = _fields(parts["qweight"].t().contiguous(), bits)
    order = _order(parts, "g_idx", k, len(scales))
    return _grouped(codes, scales.t().contiguous(), zeros.t(), bits, group_of(k, len(scales)), order)


def _awq_shape(parts: Parts, config: Config) -> tuple[int, int]:
    if str(config.get("version") or "gemm").lower() != "gemm":
        raise ValueError(f"it is of AWQ's version {config.get('version')!r}, and 'gemm' is supported")
    if _bits(config) != 4:
        raise ValueError("AWQ of 4 bits is supported")
    qweight = need(parts, "qweight", (torch.int32,), None, None)
    n, k = qweight.shape[1] * 8, qweight.shape[0]
    groups = len(need(parts, "scales", SCALES, None, n))
    need(parts, "qzeros", (torch.int32,), groups, n // 8)
    group_of(k, groups)
    return n, k


def _awq(parts: Parts, config: Config) -> Weight:
    """All is packed along N, eight columns in another order."""
    (_, k), scales = _awq_shape(parts, config), parts["scales"]
    order = torch.tensor(_AWQ, dtype=torch.int64, device="cpu")
    codes, zeros = (
        _fields(words, 4).unflatten(-1, (-1, 8))[..., order].flatten(-2)
        for words in (parts["qweight"], parts["qzeros"])
    )
    return _grouped(codes.t().contiguous(), scales.t().contiguous(), zeros.t(), 4, group_of(k, len(scales)), None)


# ---- compressed-tensors ----


def _packed_bits(parts: Parts, config: Config) -> int:
    """The config's, or, where its groups of layers tell several, those of a layer's weight."""
    groups = config.get("config_groups")
    every = groups.values() if isinstance(groups, dict) else ()
    told: list[Any] = [group.get("weights") if isinstance(group, dict) else None for group in every]
    if not told or not all(isinstance(each, dict) for each in told):
        raise ValueError("its config_groups do not tell in which way weights are quantized")
    if all(each.get("num_bits") == told[0].get("num_bits") for each in told):
        return _bits(told[0], "num_bits")
    words, k = parts["weight_packed"].shape[1], int(parts["weight_shape"][1])
    return _bits({"num_bits": words * 32 // k if k else None}, "num_bits")


def _packed_shape(parts: Parts, config: Config) -> tuple[int, int]:
    packed = need(parts, "weight_packed", (torch.int32,), None, None)
    n, k = need(parts, "weight_shape", (torch.int64, torch.int32), 2).tolist()
    bits = _packed_bits(parts, config)
    if n != len(packed) or k < 0 or -(-k * bits // 32) != packed.shape[1]:
        raise ValueError(f"weight_shape is [{n}, {k}], which weight_packed, {list(packed.shape)}, does not hold")
    groups = need(parts, "weight_scale", SCALES, n, None).shape[1]
    if "weight_zero_point" in parts:
        need(parts, "weight_zero_point", (torch.int32,), -(-n * bits // 32), groups)
    group_of(k, groups)
    _check_order(parts, "weight_g_idx", k, groups)
    return n, k


def _packed(parts: Parts, config: Config) -> Weight:
    """Codes are packed along K, zero points along N, both with half of their range added."""
    (n, k), bits = _packed_shape(parts, config), _packed_bits(parts, config)
    scale, zero = parts["weight_scale"], None
    codes = _fields(parts["weight_packed"], bits)[:, :k].contiguous()
    if "weight_zero_point" in parts:
        zero = _fields(parts["weight_zero_point"].t().contiguous(), bits)[:, :n].t()
    order = _order(parts, "weight_g_idx", k, scale.shape[1])
    return _grouped(codes, scale, zero, bits, group_of(k, scale.shape[1]), order)


def _values_shape(parts: Parts) -> tuple[int, int]:
    weight = need(parts, "weight", (torch.int8, FP8), None, None)
    return weight.shape[0], weight.shape[1]


def _plain_shape(parts: Parts, config: Config) -> tuple[int, int]:
    (n, k), scale, zero = _values_shape(parts), parts["weight_scale"], parts.get("weight_zero_point")
    if scale.dtype not in SCALES or scale.shape not in ((), (1,), (n,), (n, 1)):
        raise ValueError(f"weight_scale is {scale.dtype} {list(scale.shape)}, not one float for all, or for a channel")
    if parts["weight"].dtype is torch.int8 and zero is not None and bool(zero.any()):
        raise ValueError("weight_zero_point of int8 weights must be 0")
    return n, k


def _plain(parts: Parts, config: Config) -> Weight:
    """Integers or fp8 with a scale for all, or for a channel."""
    (n, k), weight = _plain_shape(parts, config), parts["weight"]
    scale = parts["weight_scale"].reshape(-1, 1).expand(n, 1)
    if weight.dtype is torch.int8:
        return Quantized(weight, scale.float().flatten())
    return _eight(weight, scale, group_of(k, 1))


def _eight(values: Tensor, scale: Tensor, group: int) -> Weight:
    """Of fp8, or integers, [N, K] and scales [N, groups]. Kernels have no NaN of fp8, with which a weight is floats."""
    weight = Coded(values.contiguous(), scale.contiguous(), None, group)
    odd = values.dtype is FP8 and bool((values.view(torch.uint8) & 0x7F == 0x7F).any())
    return dequantize(weight) if odd else weight


# ---- fp8 in blocks ----


def _block_size(config: Config) -> list[int]:
    size = config.get("weight_block_size") or [128, 128]
    if not (isinstance(size, (list, tuple)) and len(size) == 2 and all(type(s) is int and s > 0 for s in size)):
        raise ValueError(f"its weight_block_size is {size!r}, not two numbers")
    return [*size]


def _blocks_shape(parts: Parts, config: Config) -> tuple[int, int]:
    n, k = _values_shape(parts)
    if parts["weight_scale_inv"].numel() != 1:
        rows, columns = _block_size(config)
        need(parts, "weight_scale_inv", _BLOCK_SCALES, -(-n // rows), -(-k // columns))
    elif parts["weight_scale_inv"].dtype not in _BLOCK_SCALES:
        raise ValueError(f"weight_scale_inv is {parts['weight_scale_inv'].dtype}")
    return n, k


def _blocks(parts: Parts, config: Config) -> Weight:
    """fp8 with a scale for each block, 128 x 128 unless told otherwise, or with one for all. Blocks as wide as groups
    may be keep their bits, with a scale for each of their channels; others are floats."""
    (n, k), weight, scale = _blocks_shape(parts, config), parts["weight"], parts["weight_scale_inv"]
    if scale.dtype is torch.uint8:
        scale = scale.view(torch.float8_e8m0fnu)
    if scale.numel() == 1:
        return _eight(weight, scale.reshape(1, 1).expand(n, 1), group_of(k, 1))
    rows, columns = _block_size(config)
    by_row = scale.repeat_interleave(rows, 0)[:n]
    whole = columns in _kernels.GROUP_SIZES
    if whole or scale.shape[1] == 1:
        return _eight(weight, by_row, columns if whole else group_of(k, 1))
    return weight.float() * by_row.float().repeat_interleave(columns, 1)[:, :k]


# ---- bitsandbytes ----


def _state(parts: Parts) -> dict[str, Any]:
    raw = next((parts[name] for name in _STATES if name in parts), None)
    if raw is None or raw.dtype is not torch.uint8 or raw.numel() > 1 << 16:
        raise ValueError("it has no quant_state of nf4 or fp4")
    try:
        state = json.loads(bytes(raw.tolist()).decode())
    except RecursionError as error:
        raise ValueError("its quant_state is no JSON that could be read") from error
    shape = state.get("shape") if isinstance(state, dict) else None
    if not isinstance(shape, list) or len(shape) != 2 or not all(type(s) is int and 0 < s < 1 << 40 for s in shape):
        raise ValueError("its quant_state tells no shape")
    return dict(state)


def _nf4_shape(parts: Parts, config: Config) -> tuple[int, int]:
    state = _state(parts)
    (n, k), size = state["shape"], state.get("blocksize")
    if need(parts, "weight", (torch.uint8,), None, 1).shape[0] * 2 != n * k:
        raise ValueError(f"its quant_state tells a shape of {n} x {k}, and weight has another size")
    if type(size) is not int or size < 16 or size & (size - 1) or k % size:
        raise ValueError(f"its blocks are of {size!r}, which rows of {k} inputs do not hold whole")
    need(parts, "weight.quant_map", (torch.float32,), 16)
    scale = need(parts, "weight.absmax", (torch.float32, torch.uint8), n * k // size)
    if scale.dtype is torch.uint8:
        outer, offset = state.get("nested_blocksize"), state.get("nested_offset")
        if type(outer) is not int or outer <= 0 or type(offset) not in (int, float):
            raise ValueError("its quant_state tells no nested_blocksize and nested_offset")
        for name in ("weight.nested_quant_map", "weight.nested_absmax"):
            if name not in parts:
                raise ValueError(f"its scales are codes of 8 bits, and it has no {name}")
        need(parts, "weight.nested_quant_map", (torch.float32,), 256)
        need(parts, "weight.nested_absmax", (torch.float32,), -(-len(scale) // outer))
    return n, k


def _nf4(parts: Parts, config: Config) -> Weight:
    """Codes of consecutive elements, the first in the upper half; a scale for each `blocksize` of them, itself perhaps
    a code of 8 bits with scales of its own."""
    (n, k), state, scale = _nf4_shape(parts, config), _state(parts), parts["weight.absmax"]
    if scale.dtype is torch.uint8:
        index = torch.arange(len(scale), device="cpu") // state["nested_blocksize"]
        offset = torch.tensor(state["nested_offset"], dtype=torch.float32, device="cpu")
        scale = parts["weight.nested_quant_map"][scale.int()] * parts["weight.nested_absmax"][index] + offset
    pairs = parts["weight"].view(-1)
    codes = torch.stack([pairs >> 4, pairs & 15], -1).view(n, k)
    return Coded(codes, scale.view(n, -1), parts["weight.quant_map"], state["blocksize"])


def _int8_shape(parts: Parts, config: Config) -> tuple[int, int]:
    n, k = need(parts, "weight", (torch.int8,), None, None).shape
    need(parts, "SCB", (torch.float32,), n)
    if "weight_format" in parts and bool(parts["weight_format"].any()):
        raise ValueError(f"its weight_format is {parts['weight_format'].tolist()}, and 0, row by row, is supported")
    return n, k


def _int8(parts: Parts, config: Config) -> Weight:
    """Integers with the largest magnitude of each channel, which 127 stands for."""
    return Quantized(parts["weight"], parts["SCB"] / 127)


# ---- HQQ ----


def _hqq_shape(parts: Parts, config: Config) -> tuple[int, int]:
    for name, supported in (("axis", 1), ("nbits", 4)):
        if name in parts and parts[name].flatten().tolist() != [supported]:
            raise ValueError(f"its {name} is {parts[name].flatten().tolist()}, and {supported} is supported")
    n, k = need(parts, "shape", (torch.int64, torch.int32), 2).tolist()
    pairs = need(parts, "W_q", (torch.uint8,), None, None)
    if n < 0 or k < 0 or pairs.numel() * 2 != n * k:
        raise ValueError(f"its shape is {n} x {k}, and W_q has another size: 4 bits are supported")
    size = pairs.shape[1]
    if size < 16 or k % size or (k != size and size & (size - 1)):
        raise ValueError(f"its groups are of {size}, which rows of {k} inputs do not hold whole")
    for name in ("scale", "zero"):
        need(parts, name, SCALES, n * k // size, 1)
    return n, k


def _hqq(parts: Parts, config: Config) -> Weight:
    """A row of W_q is a group; the first half of them in the upper, the second in the lower halves of the bytes."""
    (n, k), pairs = _hqq_shape(parts, config), parts["W_q"]
    scale, zero = (parts[name].float().view(n, -1) for name in ("scale", "zero"))
    codes = torch.cat([pairs >> 4, pairs & 15]).view(n, k)
    table = as_tensor(TABLES["int4"])
    return Coded(codes, scale, table, group_of(k, scale.shape[1]), scale * (8 - zero))


def _mxfp4_shape(parts: Parts, config: Config) -> tuple[int, int, int]:
    blocks = need(parts, "blocks", (torch.uint8,), None, None, None, 16)
    experts, n, groups, _ = blocks.shape
    need(parts, "scales", (torch.uint8,), experts, n, groups)
    return experts, n, 32 * groups


def _mxfp4(parts: Parts, expert: int) -> Coded:
    """Blocks of 32 k: the lower half of a byte is the even one; scales are the exponents that e8m0 is."""
    pairs = parts["blocks"][expert]
    codes = torch.stack([pairs & 15, pairs >> 4], -1).flatten(1)
    table = as_tensor(TABLES["fp4"])
    return Coded(codes, parts["scales"][expert].contiguous().view(torch.float8_e8m0fnu), table, 32)


class Mixture(NamedTuple):
    """How the weights of all experts of one product are stored. parts: what their names end in, behind that of the
    Parameter; shape: [E, N, K]; weight: that of one expert."""

    label: str
    parts: tuple[str, ...]
    shape: Callable[[Parts, Config], tuple[int, int, int]]
    weight: Callable[[Parts, int], Coded]


MIXTURES = {"mxfp4": Mixture("MXFP4", ("blocks", "scales"), _mxfp4_shape, _mxfp4)}


SCHEMES: dict[str, tuple[Scheme, ...]] = {
    "gptq": (Scheme("GPTQ", ("qweight", "qzeros", "scales"), ("g_idx",), _gptq_shape, _gptq),),
    "awq": (Scheme("AWQ", ("qweight", "qzeros", "scales"), (), _awq_shape, _awq),),
    "compressed-tensors": (
        Scheme(
            "compressed-tensors",
            ("weight_packed", "weight_scale", "weight_shape"),
            ("weight_zero_point", "weight_g_idx", *_INPUTS),
            _packed_shape,
            _packed,
        ),
        Scheme("compressed-tensors", ("weight_scale", "weight"), ("weight_zero_point", *_INPUTS), _plain_shape, _plain),
    ),
    "fp8": (Scheme("fp8", ("weight_scale_inv", "weight"), (), _blocks_shape, _blocks),),
    "bitsandbytes": (
        Scheme(
            "bitsandbytes",
            ("weight.absmax", "weight", "weight.quant_map"),
            (*_STATES, "weight.nested_absmax", "weight.nested_quant_map"),
            _nf4_shape,
            _nf4,
        ),
        Scheme("bitsandbytes", ("SCB", "weight"), ("weight_format",), _int8_shape, _int8),
    ),
    "hqq": (Scheme("HQQ", ("W_q", "scale", "zero", "shape"), _OF_HQQ, _hqq_shape, _hqq),),
    "mxfp4": (),  # its linear layers are floats
}
