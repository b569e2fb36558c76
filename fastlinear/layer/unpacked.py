"""Weights quantized by the kernels' vectors, where torch's ops take ten times as long; and what an int8 layer answers
while its weight keeps changing: the numbers that its pack would give, without a pack.

The weight is quantized anew in each call; sums of integers are torch's own product of int8, as exact as the kernels'.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

import fastlinear._kernels as _kernels
import fastlinear._plans as _plans
import fastlinear._rows as _rows
import fastlinear._tensors as _tensors
import fastlinear._torch as _torch
from fastlinear.spec import grouping, int4, int8
from fastlinear.spec.formats import DTYPES
from fastlinear.spec.int8 import Quantized
from fastlinear.spec.precision import Precision
from fastlinear.spec.reference import Reference

_EXACT = ("avx_vnni", "avx512_vnni", "amx")  # elsewhere oneDNN's products of int8 go through sums of 16 bits


def quantized(weight: Tensor, smooth: Tensor | None) -> Quantized:
    """`quantize_weight` of spec/int8.py, at the pace that memory allows; ValueError for infinities and NaN."""
    dense = weight.detach()
    found = _rows.quantize_channels(dense if smooth is None else dense.float() / smooth)
    return int8.quantize_weight(weight, smooth) if found is None else Quantized(*found)


def coded(weight: Tensor, coding: int4.Coding) -> int4.Coded:
    """`quantize_weight` of spec/grouping.py, bit for bit; ValueError for infinities, NaN and scales too large."""
    ends = grouping.ends_of(coding) if coding.table else []
    found = _rows.quantize_groups(weight.detach(), coding, grouping.SHRUNK, ends, grouping.finer(coding))
    if found is None:
        return grouping.quantize_weight(weight, coding)
    codes, scale, offset = found
    table = int4.as_tensor(coding.table) if coding.table else None
    return int4.Coded(codes, scale, table, coding.group, offset)


def answers(precision: Precision) -> bool:
    """Whether `Unpacked` computes in this precision; codes of 4 bits are packed anew instead."""
    return precision.packed in _tensors.PACKED and precision.packed not in DTYPES


class Unpacked(NamedTuple):
    """y of x, weight and bias as they come. reference: what is computed; rows: what quantizes x, None where nothing
    does."""

    reference: Reference
    rows: _plans.RowQuantizer | None

    def __call__(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        reference = self.reference
        if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, weight, bias)):
            return reference.floats(x, weight, bias)
        q = quantized(weight.mT if reference.transposed else weight, reference.precision.smooth)
        flat = x.reshape(x.shape[:-1].numel(), x.shape[-1])
        y = self._sums(flat, q)
        y = y if bias is None else y.add_(bias)
        return reference.finish(y.reshape(*x.shape[:-1], y.shape[-1]), x.dtype)

    def _sums(self, x: Tensor, q: Quantized) -> Tensor:
        """In fp32, scaled."""
        if self.rows is None:
            return F.linear(x.float(), q.values.float()).mul_(q.scale)
        made = _rows.quantize_rows(x, self.rows)
        if made is None or not _multiplies():
            assert self.reference.precision.rows is not None
            u, scale, zero = int8.quantize_rows(x, self.reference.precision.rows)
            return int8.products(u, zero, q).float().mul_(q.scale).mul_(scale[:, None])
        u, scale, zero = made
        sums = _torch.int_mm(u, q.values.t())
        if self.rows.kind != "symmetric":  # whose zero is 128
            sums += (128 - zero)[:, None] * q.values.sum(-1, dtype=torch.int32)
        y: Tensor = sums.float().mul_(q.scale).mul_(scale[:, None])
        return y


@functools.cache
def _multiplies() -> bool:
    """Whether torch multiplies int8 exactly here."""
    return any(isa in _EXACT for isa in _kernels.cpu_info()["isas"])
