"""Rows and channels that become integers outside of a product: bit for bit what fastlinear/spec/int8.py says."""

import itertools

import pytest
import torch
from torch import Tensor

import fastlinear._rows as _rows
import fastlinear._tensors as _tensors
from fastlinear._plans import RowQuantizer
from fastlinear.spec import int8
from fastlinear.spec.int8 import Rows

from .test_norms import isas

DTYPES = list(_tensors.FORMATS)
WIDTHS = [1, 7, 16, 35, 70, 1030]
ROWS = [Rows(), Rows("asymmetric"), Rows("static", 0.02, 90)]


def rows_of(k: int, dtype: torch.dtype) -> Tensor:
    """Of many sizes; one of zeros, one of denormals, one of a scale that is just none, one of halves, one of ends."""
    torch.manual_seed(k)
    x = torch.randn(40, k) * torch.logspace(-30, 30, 40)[:, None] if dtype is not torch.float16 else torch.randn(40, k)
    x[0], x[1], x[2], x[3] = 0.0, 1e-40, 2.0**-120, torch.arange(k) - 0.5
    x[4, 0], x[5, -1], x[6] = 3.0, -1e3, 127.0 * 2.0**-126
    return x.to(dtype)


def layouts(x: Tensor) -> list[Tensor]:
    """The same rows dense, apart, and as the columns of another tensor."""
    wide = torch.empty(x.shape[0], x.shape[1] + 3, dtype=x.dtype)
    wide[:, :-3] = x
    return [x, wide[:, :-3], x.t().contiguous().t()]


@pytest.mark.parametrize("isa", isas())
def test_channels(isa: str) -> None:
    """Each width, dtype and stride."""
    for k, dtype in itertools.product(WIDTHS, DTYPES):
        x = rows_of(k, dtype)
        values, scale = int8.quantize_channels(x, None)
        for given in layouts(x):
            made = _rows.quantize_channels(given, isa=isa)
            assert made is not None and torch.equal(made[0], values) and torch.equal(made[1], scale), (k, dtype)


@pytest.mark.parametrize("isa", isas())
@pytest.mark.parametrize("rows", ROWS, ids=[rows.kind for rows in ROWS])
def test_rows(rows: Rows, isa: str) -> None:
    """Each width, dtype and stride, smoothed or not, NaN and infinities among them."""
    for k, dtype, smoothed in itertools.product(WIDTHS, DTYPES, (False, True)):
        x = rows_of(k, dtype)
        x[7, k // 2], x[8, 0], x[9, -1] = torch.nan, torch.inf, -torch.inf
        how = rows._replace(smooth=torch.rand(k) + 0.5 if smoothed else None)
        u, scale, zero = int8.quantize_rows(x, how)
        for given in layouts(x):
            made = _rows.quantize_rows(given, RowQuantizer(*how), isa=isa)
            assert made is not None
            some = scale.isfinite()
            assert torch.equal(made[1].isnan(), scale.isnan()) and torch.equal(made[1][some], scale[some]), (k, dtype)
            assert torch.equal(made[0][some].int() + 128, u[some].int()), (k, dtype)
            assert torch.equal(made[2][some], zero[some])


def test_many_rows_on_threads() -> None:
    """As many as threads share."""
    x = torch.randn(700, 301)
    values, scale = int8.quantize_channels(x, None)
    made = _rows.quantize_channels(x)
    assert made is not None and torch.equal(made[0], values) and torch.equal(made[1], scale)


def test_what_it_does_not_take() -> None:
    """Another dtype, number of dimensions, kind of tensor or of rows, nothing in a row; and no channel that has no
    scale."""
    x, rows = torch.randn(3, 8), RowQuantizer("symmetric")
    odd = [x.double(), x.int(), x[0], x[None], x[:, :0], x.to("meta"), x.to_sparse(), torch._neg_view(x), None]
    for each in odd:
        assert _rows.quantize_channels(each) is None and _rows.quantize_rows(each, rows) is None
    for wrong in (RowQuantizer("groups"), RowQuantizer.rounding(torch.bfloat16)):
        assert _rows.quantize_rows(x, wrong) is None
    for number in (torch.nan, torch.inf):
        x[1, 5] = number
        assert _rows.quantize_channels(x) is None
    made = _rows.quantize_channels(torch.empty(0, 8))
    assert made is not None and made[0].shape == (0, 8) and made[1].shape == (0,)
    with pytest.raises(ValueError, match="isa is one of"):
        _rows.quantize_channels(x, isa="avx1024")
