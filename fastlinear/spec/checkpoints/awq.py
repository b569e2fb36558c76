"""AWQ, in its version gemm: all is packed along N, eight columns in another order."""

from __future__ import annotations

import torch

from fastlinear.spec.checkpoints.codes import bits_of, fields, group_of, grouped
from fastlinear.spec.checkpoints.scheme import SCALES, Config, Parts, Scheme, need
from fastlinear.spec.packed import Weight

_ORDER = (0, 4, 1, 5, 2, 6, 3, 7)  # the nibble that has column i of 8


def _awq_shape(parts: Parts, config: Config) -> tuple[int, int]:
    if str(config.get("version") or "gemm").lower() != "gemm":
        raise ValueError(f"it is of AWQ's version {config.get('version')!r}, and 'gemm' is supported")
    if bits_of(config) != 4:
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
    order = torch.tensor(_ORDER, dtype=torch.int64, device="cpu")
    codes, zeros = (
        fields(words, 4).unflatten(-1, (-1, 8))[..., order].flatten(-2) for words in (parts["qweight"], parts["qzeros"])
    )
    return grouped(codes.t().contiguous(), scales.t().contiguous(), zeros.t(), 4, group_of(k, len(scales)), None)


SCHEMES = (Scheme("AWQ", ("qweight", "qzeros", "scales"), (), _awq_shape, _awq),)
