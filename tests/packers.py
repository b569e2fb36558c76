"""Packers of formats that others quantize to, in words of their own: each gives a weight in fp64, and its tensors."""

import json
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

GROUP = 64
Parts = dict[str, Tensor]


def packed(values: Tensor, bits: int, order: tuple[int, ...] | None = None) -> Tensor:
    """[..., F] fields of some bits -> int32 [..., F * bits / 32]; `order`: the column that each field has."""
    per = 32 // bits
    words = torch.zeros(*values.shape[:-1], values.shape[-1] // per, dtype=torch.int64)
    for field in range(per):
        column = field if order is None else order[field]
        words |= values[..., column::per].long() << bits * field
    return torch.where(words >= 1 << 31, words - (1 << 32), words).int()


def random_codes(n: int, k: int, bits: int = 4) -> Tensor:
    return torch.randint(1 << bits, (n, k))


def scales(n: int, groups: int, dtype: torch.dtype = torch.float16) -> Tensor:
    return (torch.rand(n, groups) / 64 + 1e-3).to(dtype)


def spread(of_groups: Tensor, k: int) -> Tensor:
    return of_groups.double().repeat_interleave(GROUP, 1)[:, :k]


def order_of(k: int, kind: str) -> Tensor:
    """The group of each input: one after another, or "scattered", or scattered and of "uneven" lengths."""
    by_k = torch.arange(k) // GROUP
    by_k[0] = k // GROUP - 1 if kind == "uneven" else 0
    return by_k[torch.randperm(k)] if kind else by_k


def gptq(n: int, k: int, *, bits: int = 4, second: bool = False, sym: bool = True, order: str = "") -> Any:
    groups, middle = k // GROUP, 1 << bits - 1
    codes, scale = random_codes(n, k, bits), scales(n, groups)
    zeros = torch.full((n, groups), middle) if sym else torch.randint(1, 1 << bits, (n, groups))
    by_k = order_of(k, order)
    weight = scale.double()[:, by_k] * (codes - zeros[:, by_k])
    stored = zeros if second else zeros - 1
    parts = {
        "qweight": packed(codes, bits).t(), "qzeros": packed(stored.t(), bits), "scales": scale.t(),
        "g_idx": by_k.int(),
    }  # fmt: skip
    return weight, parts


def awq(n: int, k: int) -> Any:
    codes, zeros, scale = random_codes(n, k), random_codes(n, k // GROUP), scales(n, k // GROUP)
    order = (0, 2, 4, 6, 1, 3, 5, 7)
    weight = spread(scale, k) * (codes - spread(zeros, k))
    parts = {"qweight": packed(codes.t(), 4, order), "qzeros": packed(zeros.t(), 4, order), "scales": scale.t()}
    return weight, parts


def compressed(n: int, k: int, *, bits: int = 4, zeros: bool = False, order: str = "") -> Any:
    codes, scale = random_codes(n, k, bits), scales(n, k // GROUP, torch.bfloat16)
    zero = random_codes(n, k // GROUP, bits) if zeros else torch.full((n, k // GROUP), 1 << bits - 1)
    by_k = order_of(k, order)
    weight = scale.double()[:, by_k] * (codes - zero[:, by_k])
    parts = {"weight_packed": packed(codes, bits), "weight_scale": scale, "weight_shape": torch.tensor([n, k])}
    if order:
        parts["weight_g_idx"] = by_k.int()
    if zeros:
        parts["weight_zero_point"] = packed(zero.t(), bits).t()
    return weight, parts


def integers(n: int, k: int) -> Any:
    values, scale = torch.randint(-128, 128, (n, k)).to(torch.int8), scales(n, 1, torch.float32)
    return values.double() * scale, {"weight": values, "weight_scale": scale}


def int8(n: int, k: int) -> Any:
    values, largest = torch.randint(-127, 128, (n, k)).to(torch.int8), torch.rand(n) + 1e-3
    parts = {"weight": values, "SCB": largest, "weight_format": torch.tensor(0, dtype=torch.uint8)}
    return values.double() * (largest / 127)[:, None], parts


def fp8(n: int, k: int, block: tuple[int, int] = (128, 128), powers: bool = False) -> Any:
    values, shape = torch.randn(n, k).to(torch.float8_e4m3fn), (-(-n // block[0]), -(-k // block[1]))
    stored = torch.randint(118, 124, shape, dtype=torch.uint8) if powers else torch.rand(shape) / 8
    blocks = stored.view(torch.float8_e8m0fnu).double() if powers else stored
    by_row = blocks.repeat_interleave(block[0], 0)[:n].repeat_interleave(block[1], 1)[:, :k]
    return values.double() * by_row, {"weight": values, "weight_scale_inv": stored}


def floats(n: int, k: int, *, one: bool = False) -> Any:
    values, scale = torch.randn(n, k).to(torch.float8_e4m3fn), scales(1 if one else n, 1, torch.bfloat16)
    return values.double() * scale.double(), {"weight": values, "weight_scale": scale[0] if one else scale}


def in_blocks(n: int, k: int) -> Any:
    weight, parts = fp8(n, k)
    return weight, {"weight": parts["weight"], "weight_scale": parts["weight_scale_inv"]}


def hqq(n: int, k: int) -> Any:
    codes, scale, zero = random_codes(n, k), scales(n, k // GROUP), torch.rand(n, k // GROUP).half() * 15
    rows = codes.view(-1, GROUP)
    halves = rows[: len(rows) // 2] << 4 | rows[len(rows) // 2 :]
    weight = (codes - spread(zero, k)) * spread(scale, k)
    parts = {"W_q": halves.to(torch.uint8), "scale": scale.view(-1, 1), "zero": zero.view(-1, 1),
             "shape": torch.tensor([n, k]), "axis": torch.tensor(1), "nbits": torch.tensor(4)}  # fmt: skip
    notes = ("packing", "compute_dtype", "view_as_float", "quant_scale", "quant_zero", "stores_quant_config",
             "channel_wise", "optimize", "round_zero", "unpack_view_dtype", "offload_meta", "encoded_state_dict",
             "group_size")  # fmt: skip
    return weight, parts | {name: torch.tensor([1], dtype=torch.uint8) for name in notes}


def nf4(n: int, k: int, *, nested: bool = False) -> Any:
    from fastlinear.spec.int4 import TABLES

    codes, table = random_codes(n, k), torch.tensor(TABLES["nf4"])
    absmax = torch.rand(n * k // 64) / 16
    state: dict[str, Any] = {"blocksize": 64, "quant_type": "nf4", "dtype": "float16", "shape": [n, k]}
    parts: Parts = {
        "weight": (codes[:, ::2] << 4 | codes[:, 1::2]).to(torch.uint8).view(-1, 1),
        "weight.quant_map": table,
    }
    if nested:
        state |= {"nested_blocksize": 256, "nested_offset": 0.03125, "nested_dtype": "float32"}
        inner = torch.randint(256, absmax.shape).to(torch.uint8)
        numbers, outer = torch.linspace(-1, 1, 256), torch.rand(-(-len(absmax) // 256)) / 64
        parts |= {"weight.absmax": inner, "weight.nested_quant_map": numbers, "weight.nested_absmax": outer}
        absmax = numbers[inner.long()] * outer.repeat_interleave(256)[: len(inner)] + 0.03125
    else:
        parts["weight.absmax"] = absmax
    text = torch.tensor([*json.dumps(state).encode()], dtype=torch.uint8)
    parts["weight.quant_state.bitsandbytes__nf4"] = text
    return table[codes].double() * absmax.view(n, -1).double().repeat_interleave(64, 1), parts


def ct(bits: int, **more: Any) -> Any:
    return {"config_groups": {"group_0": {"weights": {"num_bits": bits, "type": "int", **more}}}, "ignore": ["lm_head"]}


# name: packer, quantization_config, what the layers are packed as
SCHEMES: dict[str, tuple[Callable[[int, int], Any], dict[str, Any], str]] = {
    "gptq v1": (gptq, {"quant_method": "gptq", "bits": 4, "sym": True}, "int4"),
    "gptq v2 that says v1": (lambda n, k: gptq(n, k, second=True), {"quant_method": "gptq", "bits": 4}, "int4"),
    "gptq zeros": (lambda n, k: gptq(n, k, sym=False), {"quant_method": "gptq", "bits": 4, "sym": False}, "int4"),
    "gptq v2 zeros": (
        lambda n, k: gptq(n, k, sym=False, second=True),
        {"quant_method": "gptq", "bits": 4, "sym": False, "checkpoint_format": "gptq_v2"},
        "int4",
    ),
    "gptq order": (lambda n, k: gptq(n, k, order="scattered"), {"quant_method": "gptq", "bits": 4}, "int4"),
    "gptq order, zeros": (
        lambda n, k: gptq(n, k, sym=False, order="scattered"),
        {"quant_method": "gptq", "bits": 4, "sym": False}, "int4",
    ),
    "gptq order, 8 bits": (
        lambda n, k: gptq(n, k, bits=8, order="scattered"), {"quant_method": "gptq", "bits": 8}, "int8g",
    ),
    "gptq uneven": (lambda n, k: gptq(n, k, order="uneven"), {"quant_method": "gptq", "bits": 4}, "fp32"),
    "gptq 8 bits": (lambda n, k: gptq(n, k, bits=8), {"quant_method": "gptq", "bits": 8}, "int8g"),
    "auto-round": (
        gptq, {"quant_method": "auto-round", "packing_format": "auto_round:auto_gptq", "bits": 4, "sym": True}, "int4",
    ),
    "auto-round awq": (
        awq, {"quant_method": "auto-round", "packing_format": "auto_round:auto_awq", "bits": 4, "sym": False}, "int4",
    ),
    "awq": (awq, {"quant_method": "awq", "bits": 4, "version": "GEMM", "zero_point": True}, "int4"),
    "compressed": (compressed, {"quant_method": "compressed-tensors", **ct(4)}, "int4"),
    "compressed zeros": (
        lambda n, k: compressed(n, k, zeros=True), {"quant_method": "compressed-tensors", **ct(4)}, "int4",
    ),
    "compressed order": (
        lambda n, k: compressed(n, k, zeros=True, order="scattered"),
        {"quant_method": "compressed-tensors", **ct(4)}, "int4",
    ),
    "compressed 8 bits": (
        lambda n, k: compressed(n, k, bits=8), {"quant_method": "compressed-tensors", **ct(8)}, "int8g",
    ),
    "integers": (integers, {"quant_method": "compressed-tensors", **ct(8)}, "w8f"),
    "fp8": (fp8, {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [128, 128]}, "fp8"),
    "fp8 of powers of two": (
        lambda n, k: fp8(n, k, (48, 32), True), {"quant_method": "fp8", "weight_block_size": [48, 32]}, "fp8",
    ),
    "fp8 in odd blocks": (
        lambda n, k: fp8(n, k, (32, 24)), {"quant_method": "fp8", "weight_block_size": [32, 24]}, "fp32",
    ),
    "fp8 by channel": (floats, {"quant_method": "compressed-tensors", **ct(8)}, "fp8"),
    "fp8 by tensor": (lambda n, k: floats(n, k, one=True), {"quant_method": "compressed-tensors", **ct(8)}, "fp8"),
    "fp8 by block": (
        in_blocks,
        {"quant_method": "compressed-tensors", **ct(8, type="float", strategy="block", block_structure=[128, 128])},
        "fp8",
    ),
    "nf4": (nf4, {"quant_method": "bitsandbytes", "load_in_4bit": True}, "int4"),
    "nf4 nested": (lambda n, k: nf4(n, k, nested=True), {"quant_method": "bitsandbytes"}, "int4"),
    "bitsandbytes int8": (int8, {"quant_method": "bitsandbytes", "load_in_8bit": True}, "w8f"),
    "hqq": (hqq, {"quant_method": "hqq"}, "int4"),
}  # fmt: skip
