"""Weights that become codes in groups: bit for bit what fastlinear/spec/grouping.py says."""

import itertools

import pytest
import torch
from grouped import WEIGHTS
from torch import Tensor

import fastlinear._rows as _rows
import fastlinear._tensors as _tensors
from fastlinear.layer import unpacked
from fastlinear.spec import grouping
from fastlinear.spec.int4 import TABLES, Coding

from .test_norms import isas

DTYPES = list(_tensors.FORMATS)
# In groups that K ends in and not, in one that is longer than K, and in as short ones as there are.
SIZES = [(16, 48), (32, 45), (64, 64), (256, 300), (512, 300)]
CODINGS = [
    Coding(group, table, scales, offsets)
    for (table, scales, offsets), (group, _) in zip(
        itertools.product((*TABLES.values(), ()), DTYPES, (False, True)), itertools.cycle(SIZES), strict=False
    )
]
every_coding = pytest.mark.parametrize("coding", CODINGS, ids=lambda coding: coding.layout(str(coding.numbers[:2])))


def made(weight: Tensor, coding: Coding, isa: str | None = None) -> tuple[Tensor, Tensor, Tensor | None] | None:
    ends = grouping.ends_of(coding) if coding.table else []
    return _rows.quantize_groups(weight, coding, grouping.SHRUNK, ends, grouping.finer(coding), isa)


def weights(k: int, dtype: torch.dtype) -> Tensor:
    """Rows of all kinds, and some whose scales are denormals, or none."""
    r = torch.randn(4, k, generator=torch.Generator().manual_seed(k))
    rows = torch.cat([*(weight(r) for weight in WEIGHTS.values()), r * 1e-39, (r > 1) * r * 1e-44])
    rows = rows.nan_to_num().clamp(-1e4, 1e4)  # scales of fp16 are finite
    return rows.to(dtype)


@every_coding
def test_codes(coding: Coding) -> None:
    """Each table, scale and size, on each ISA, of each dtype in turn."""
    k = dict(SIZES)[coding.group]
    for dtype in DTYPES:
        w = weights(k, dtype)
        wanted = grouping.quantize_weight(w, coding)
        for isa in isas():
            found = made(w, coding, isa)
            assert found is not None
            for ours, theirs in zip(found, (wanted.codes, wanted.scale, wanted.offset), strict=True):
                assert (ours is None and theirs is None) or torch.equal(ours, theirs), (isa, dtype)


def test_rows_apart_and_many_on_threads() -> None:
    w = torch.randn(301, 700)
    for given in (w, w.t()[:, ::2], w[::3, :64]):
        found, wanted = made(given, Coding()), grouping.quantize_weight(given, Coding())
        assert found is not None and torch.equal(found[0], wanted.codes) and torch.equal(found[1], wanted.scale)


def test_what_it_does_not_take() -> None:
    """Another dtype, number of dimensions or kind of tensor, nothing in a row, scales that it does not write; numbers
    that no scale holds, of which the specification tells."""
    x = torch.randn(3, 64)
    for each in (x.double(), x[0], x[None], x[:, :0], x.to("meta"), x.to_sparse(), torch._neg_view(x)):
        assert made(each, Coding()) is None
    assert made(x, Coding(scales=torch.float8_e8m0fnu)) is None
    for number in (torch.nan, torch.inf, -torch.inf):
        x[1, 40] = number
        assert made(x, Coding()) is None and made(x, Coding(offsets=True)) is None
        with pytest.raises(ValueError, match=r"at \[1, 40\]"):
            unpacked.coded(x, Coding())
    assert made(torch.full((2, 32), 1e7), Coding()) is None
    with pytest.raises(ValueError, match="isa is one of"):
        made(torch.randn(3, 64), Coding(), "avx1024")
