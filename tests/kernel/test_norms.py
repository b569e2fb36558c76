"""The native norms against fp64, under a bound, on every ISA that runs here; and what they do not take."""

import itertools

import pytest
import torch
from torch import Tensor

import fastlinear._kernels as _kernels
import fastlinear._rows as _rows
import fastlinear._tensors as _tensors
from fastlinear.spec import norms
from fastlinear.spec.norms import Norm

DTYPES = list(_tensors.FORMATS)
HOW = {"layer_norm": Norm(True, 1e-5), "rms_norm": Norm(False, 1e-6), "offset": Norm(False, 1e-6, 1.0)}
WIDTHS = [1, 7, 16, 70, 384, 1030]  # partial vectors, less than four, and more
UNIT = 2.0**-24


def isas() -> list[str]:
    """Those with vectors of their own that may run here."""
    found = []
    for isa in _kernels.isas():
        try:
            _rows.norm(torch.ones(1, 1), None, None, 1.0, isa=isa)
        except ValueError:
            continue
        found.append(isa)
    assert "scalar" in found
    return found


def exact(x: Tensor, weight: Tensor | None, bias: Tensor | None, how: Norm, residual: Tensor | None) -> Tensor:
    wide = (None if t is None else t.double() for t in (x, weight, bias, residual))
    wide_x, wide_weight, wide_bias, wide_residual = wide
    assert wide_x is not None
    return norms.norm(wide_x, wide_weight, wide_bias, how, wide_residual)[0]


def bound(y: Tensor, t: Tensor, weight: Tensor | None, bias: Tensor | None, how: Norm, dtype: torch.dtype) -> Tensor:
    """What y may be off by: t is rounded, means are sums of 32 partial ones at least, the rest are a few roundings."""
    steps = t.shape[-1] / 32 + 12
    mean = t.mean(-1, keepdim=True) if how.centered else torch.zeros_like(t[..., :1])
    d = (t - mean).abs()
    off = UNIT * (t.abs() + d + (steps * t.abs().mean(-1, keepdim=True) if how.centered else 0))
    square = d.square().mean(-1, keepdim=True) + how.eps
    relative = (2 * d * off).mean(-1, keepdim=True) / square + (steps + 4) * UNIT
    scale = torch.ones(()) if weight is None else (weight.double() + how.offset).abs()
    shift = torch.zeros(()) if bias is None else bias.double()
    numbers = scale * off / square.sqrt() + (y - shift).abs() * relative + UNIT * shift.abs()
    return numbers + torch.finfo(dtype).eps / 2 * y.abs() + torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps


@pytest.mark.parametrize("how", HOW.values(), ids=HOW)
@pytest.mark.parametrize("isa", isas())
def test_norms_are_within_the_bound(isa: str, how: Norm) -> None:
    """Each width, dtype and combination of operands, with rows of large mean and of little variance among them."""
    torch.manual_seed(0)
    for n, dtype, channels, added in itertools.product(WIDTHS, DTYPES, (DTYPES[0], None, "own"), (False, True)):
        x = (
            torch.randn(3, 4, n) * torch.tensor([1.0, 1e-3, 30.0, 1.0])[:, None]
            + torch.tensor([0.0, 1, 5, 40])[:, None]
        )
        x = x.to(dtype)
        residual = torch.randn(3, 4, n).to(DTYPES[n % 3]) if added else None
        kind = dtype if channels == "own" else channels
        weight, bias = (None, None) if kind is None else (torch.randn(n).to(kind), torch.randn(n).to(kind))
        bias = None if how.offset else bias
        y, kept = _rows.norm(x, weight, bias, how.eps, how.offset, how.centered, residual, True, isa=isa)
        want, t = (
            exact(x, weight, bias, how, residual),
            x.double() if residual is None else x.double() + residual.double(),
        )
        assert y.dtype is kept.dtype is dtype and y.shape == x.shape
        assert ((y.double() - want).abs() <= bound(want, t, weight, bias, how, dtype)).all(), (n, dtype, kind, added)
        torch.testing.assert_close(
            kept, x if residual is None else (x.float() + residual.float()).to(dtype), rtol=0, atol=0
        )


def test_the_specification_is_within_the_bound() -> None:
    """Plain torch in fp32 is held to the same bound as the kernels."""
    torch.manual_seed(0)
    x, weight = torch.randn(8, 200) + 3, torch.randn(200)
    for how in HOW.values():
        want = exact(x, weight, None, how, None)
        off = norms.norm(x, weight, None, how)[0].double() - want
        assert (off.abs() <= bound(want, x.double(), weight, None, how, torch.float32)).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_memory_of_its_input(dtype: torch.dtype) -> None:
    """`over` gives the same numbers in the memory of x: those of y, or of the sum, where that is kept."""
    x, residual, weight = torch.randn(5, 33).to(dtype), torch.randn(5, 33).to(dtype), torch.randn(33)
    for added, keep in ((None, False), (residual, False), (residual, True)):
        arguments = (weight, None, 1e-5, 0.0, True, added, keep)
        want, own = _rows.norm(x, *arguments), x.clone()
        got = _rows.norm(own, *arguments, over=True)
        torch.testing.assert_close(got, want, rtol=0, atol=0)
        assert (got[1] if keep else got) is own


def test_any_rows_and_threads() -> None:
    """Rows of any stride, none at all, and many on two threads: the bits of the same rows, dense and alone."""
    whole = torch.randn(300, 2, 700)
    for x in (whole[:, 0], whole[:, :, 100:], whole.transpose(0, 1), whole[:0], whole[..., ::2]):
        y = _rows.norm(x, None, None, 1e-5)
        assert torch.equal(y, _rows.norm(x.contiguous(), None, None, 1e-5)) and y.is_contiguous()
        for row, one in zip(x.reshape(-1, x.shape[-1])[:3], y.reshape(-1, x.shape[-1])[:3], strict=True):
            assert torch.equal(_rows.norm(row, None, None, 1e-5), one)


def test_odd_numbers() -> None:
    """Infinities and NaN make their row NaN, and no other; a row of one value is 0 in LayerNorm."""
    x = torch.randn(4, 40)
    x[0, 3], x[1, 39], x[2] = float("inf"), float("nan"), 7.0
    y = _rows.norm(x, None, None, 1e-5)
    assert y[:2].isnan().all() and (y[2] == 0).all() and y[3].isfinite().all()


def test_what_it_does_not_take() -> None:
    """Another dtype, device, shape or kind of tensor is left to the caller, an ISA that may not run is named."""
    x, w = torch.randn(2, 8), torch.randn(8)
    assert _rows.norm(x.double(), w, None, 1e-5) is None
    assert _rows.norm(x.to("meta"), w, None, 1e-5) is None
    assert _rows.norm(x, w[:7], None, 1e-5) is None
    assert _rows.norm(x, w, w[None], 1e-5) is None
    assert _rows.norm(x, w, w, 1e-5, residual=x[:1]) is None
    assert _rows.norm(x.to_sparse(), w, w, 1e-5) is None
    assert _rows.norm(torch._neg_view(x), w, w, 1e-5) is None
    with pytest.raises(ValueError, match=r"isa is one of scalar.* not 'avx1024'"):
        _rows.norm(x, w, None, 1e-5, isa="avx1024")
