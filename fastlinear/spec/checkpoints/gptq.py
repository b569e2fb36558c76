"""GPTQ: codes packed along K, zero points along N."""

from __future__ import annotations

import torch

from fastlinear.spec.checkpoints.codes import bits_of, check_order, fields, group_of, grouped, order_of
from fastlinear.spec.checkpoints.scheme import SCALES, Config, Parts, Scheme, need
from fastlinear.spec.packed import Weight


def _gptq_bits(parts: Parts, config: Config) -> int:
    """The config's, or, where that tells others for patterns of names, those of a layer's zero points."""
    if not config.get("dynamic") and not config.get("extra_config"):  # the latter AutoRound's
        return bits_of(config)
    words, n = (parts[name].shape[-1] if parts[name].dim() else 0 for name in ("qzeros", "qweight"))
    return bits_of({"bits": words * 32 // n if n else None})


def _gptq_shape(parts: Parts, config: Config) -> tuple[int, int]:
    bits = _gptq_bits(parts, config)
    qweight = need(parts, "qweight", (torch.int32,), None, None)
    n, k = qweight.shape[1], qweight.shape[0] * 32 // bits
    groups = len(need(parts, "scales", SCALES, None, n))
    need(parts, "qzeros", (torch.int32,), groups, n * bits // 32)
    group_of(k, groups)
    check_order(parts, "g_idx", k, groups)
    return n, k


def _gptq(parts: Parts, config: Config) -> Weight:
    """Codes are packed along K, zero points along N. Version 1 stores zero points less 1. A checkpoint that is
    symmetric tells its version by their value, whatever it says of itself."""
    bits, (_, k), scales = _gptq_bits(parts, config), _gptq_shape(parts, config), parts["scales"]
    zeros = fields(parts["qzeros"], bits).int()
    middle, mask = 1 << bits - 1, (1 << bits) - 1
    second = config.get("checkpoint_format") in ("gptq_v2", "gptq_p")
    if config.get("sym", True) and bool((zeros == middle).all()):
        second = True
    elif config.get("sym", True) and bool((zeros == middle - 1).all()):
        second = False
    zeros = zeros if second else zeros + 1 & mask
    codes = fields(parts["qweight"].t().contiguous(), bits)
    order = order_of(parts, "g_idx", k, len(scales))
    return grouped(codes, scales.t().contiguous(), zeros.t(), bits, group_of(k, len(scales)), order)


SCHEMES = (Scheme("GPTQ", ("qweight", "qzeros", "scales"), ("g_idx",), _gptq_shape, _gptq),)
