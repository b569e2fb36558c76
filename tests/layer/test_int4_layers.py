"""Layers of 4-bit weights: one set of numbers whoever computes, frozen, saved, copied and differentiated."""

import copy
import io
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from models import OFF
from torch import Tensor, nn
from torch.autograd import forward_ad

import fastlinear
import fastlinear._kernels as _kernels
from fastlinear import FastLinear, Int4Dynamic, Int4WeightOnly
from fastlinear.spec import grouping, int4

SCHEMES = [
    Int4WeightOnly(),
    Int4WeightOnly(16, "nf4", True, torch.bfloat16),
    Int4WeightOnly(128, "fp4", scales=torch.float32),
    Int4WeightOnly(1024, "iq4_nl"),
]
every_scheme = pytest.mark.parametrize("scheme", SCHEMES, ids=repr)
K, N = 75, 40


def stock() -> nn.Sequential:
    generator = torch.Generator().manual_seed(2)
    model = nn.Sequential(nn.Linear(K, N), nn.GELU(), nn.Linear(N, 7, bias=False)).eval()
    for parameter in model.parameters():
        parameter.data.normal_(generator=generator)
    return model


def rounded(model: nn.Sequential, scheme: Int4WeightOnly) -> nn.Sequential:
    """The stock model with the numbers of its weights as codes have them."""
    model = copy.deepcopy(model)
    for layer in (model[0], model[2]):
        layer.weight.data = int4.dequantize(grouping.quantize_weight(layer.weight, scheme.coding()))
    return model


def close(a: Tensor, b: Tensor) -> bool:
    return torch.allclose(a, b, rtol=1e-4, atol=1e-4 * float(b.detach().abs().max()))


@every_scheme
@pytest.mark.parametrize("m", [1, 3, 70])
def test_every_way_computes_the_same_numbers(scheme: Int4WeightOnly, m: int) -> None:
    """The kernels, frozen or not, torch's ops where those cannot run, and the stock model on the rounded weights."""
    model, x = stock(), torch.randn(m, K)
    fast = OFF(model, quantize=scheme)
    want = rounded(model, scheme)(x)
    frozen = fastlinear.freeze(copy.deepcopy(fast))
    for layer in (fast, frozen):
        with torch.no_grad():
            assert close(layer(x), want)
            with forward_ad.dual_level():
                assert close(layer(x), want)
            if m == 1:
                assert close(torch.compile(layer, backend="eager")(x), want)
        assert close(layer(x), want)  # in grad mode
        assert {plan.name.split("/")[0] for plan in layer[0].plans} <= {"int4", "fp32"}
    y = fast(x.to(torch.bfloat16))
    assert y.dtype is torch.bfloat16
    assert torch.allclose(y.float(), want, rtol=0.05, atol=0.05 * float(want.abs().max()))


@every_scheme
def test_gradients_go_through_the_codes(scheme: Int4WeightOnly) -> None:
    """dx is that of the rounded weights, whether the layer is frozen or not."""
    model, x = stock(), torch.randn(5, K)
    fast = OFF(model, quantize=scheme)
    for each in (fast, fastlinear.freeze(copy.deepcopy(fast))):
        of_fast, of_stock = x.clone().requires_grad_(), x.clone().requires_grad_()
        each(of_fast).square().sum().backward()
        rounded(model, scheme)(of_stock).square().sum().backward()
        assert close(of_fast.grad, of_stock.grad)  # type: ignore[arg-type]


@every_scheme
def test_frozen_layers_travel(scheme: Int4WeightOnly, tmp_path: Path) -> None:
    """Pickles of every protocol, torch.save, deepcopy and files keep every bit, and the scheme that made it."""
    model, x = stock(), torch.randn(2, K)
    frozen = OFF(model, quantize=scheme, freeze=True)
    with torch.inference_mode():
        y = frozen(x)
    buffer = io.BytesIO()
    torch.save(frozen, buffer)
    buffer.seek(0)
    fastlinear.save(frozen, tmp_path / "frozen")
    fastlinear.save(OFF(model, quantize=scheme), tmp_path / "held")
    copies: list[Any] = [pickle.loads(pickle.dumps(frozen, protocol)) for protocol in (2, pickle.HIGHEST_PROTOCOL)]
    copies += [torch.load(buffer, weights_only=False), copy.deepcopy(frozen)]
    copies += [fastlinear.load(tmp_path / name, stock()) for name in ("frozen", "held")]
    for other in copies:
        assert torch.equal(other[0].weight, frozen[0].weight)
        assert other[0].packed_as == "int4"
        with torch.inference_mode():
            assert close(other(x), y)
    for loaded in copies[-2:]:
        assert loaded[0].precision.coding == scheme.coding()
    assert torch.equal(fastlinear.unfreeze(frozen)[0].weight, rounded(model, scheme)[0].weight)


DYNAMIC = [
    Int4Dynamic(),
    Int4Dynamic(16, "iq4_nl", True, torch.bfloat16, by_row=True),
    Int4Dynamic(128, "fp4", scales=torch.float32),
]


@pytest.mark.parametrize("scheme", DYNAMIC, ids=repr)
@pytest.mark.parametrize("m", [1, 20])
def test_integer_products_are_one_set_of_numbers(scheme: Int4Dynamic, m: int, tmp_path: Path) -> None:
    """The kernels, frozen or not, loaded from a file, in torch's ops and under a tracer: what the specification says of
    the quantized inputs and weight; gradients are those of them. No plan is of floats."""
    model, x = stock()[:1], torch.randn(m, K)
    fast = OFF(model, quantize=scheme)
    coded, kind = grouping.quantize_weight(model[0].weight, scheme.coding()), scheme.rows("").kind
    want = int4.linear(x, coded, kind) + model[0].bias
    frozen = fastlinear.freeze(copy.deepcopy(fast))
    fastlinear.save(frozen, tmp_path / "frozen")
    loaded = fastlinear.load(tmp_path / "frozen", stock()[:1])
    for each in (fast, frozen, loaded, copy.deepcopy(fast)):
        with torch.no_grad():
            assert close(each(x), want)
            with forward_ad.dual_level():
                assert close(each(x), want)
            if m == 1:
                assert close(torch.compile(each, backend="eager")(x), want)
            y = each(x.to(torch.bfloat16))
        assert y.dtype is torch.bfloat16 and torch.allclose(y.float(), want, atol=0.05 * float(want.abs().max()))
        assert all(_rows_of(plan.name) == "int8" for plan in each[0].plans)
        assert each[0].precision.rows is not None and each[0].precision.rows.kind == kind
    given = x.clone().requires_grad_()
    fast(given).sum().backward()
    assert close(given.grad, int4.dequantize(coded).sum(0).expand(m, -1))  # type: ignore[arg-type]


def _rows_of(kernel: str) -> str:
    return next(str(row["rows"]) for row in _kernels.rows() if row["name"] == kernel)


def test_integer_products_err_by_eight_bits_of_a_group() -> None:
    """One large input costs the others of its group their precision, by_row all of its row."""
    model, x = nn.Linear(256, 64, bias=False).eval(), torch.randn(4, 256)
    exact = int4.dequantize(grouping.quantize_weight(model.weight, Int4Dynamic().coding()))
    with torch.inference_mode():
        error = [(OFF(model, quantize=Int4Dynamic(by_row=row))(x) - x @ exact.t()).norm() for row in (False, True)]
        assert error[0] < error[1] < 0.02 * float((x @ exact.t()).norm())
        x[:, 3] = 300.0
        error = [(OFF(model, quantize=Int4Dynamic(by_row=row))(x) - x @ exact.t()).norm() for row in (False, True)]
        assert error[0] < 0.6 * error[1]


def test_memory_is_that_of_the_bits() -> None:
    """4.5 bits a weight in groups of 32, 4.125 in groups of 128, and 2 % for the rest."""
    layer = nn.Linear(1024, 512, bias=False).eval()
    for group, bits in ((32, 4.5), (128, 4.125)):
        frozen = OFF(layer, quantize=Int4WeightOnly(group), freeze=True)
        assert frozen.pack_nbytes <= 1.02 * bits / 8 * 1024 * 512


def test_a_layer_that_loses_too_much_stays_as_it_is() -> None:
    """`least` is held against each layer's own weight, and the report tells of what it turned away."""
    model = stock()
    with torch.no_grad():
        model[2].weight.fill_(1.0)  # which codes hold exactly
    fast = OFF(model, quantize=Int4WeightOnly(least=30.0))
    first, second = fastlinear.report(fast)
    assert not isinstance(fast[0], FastLinear) and isinstance(fast[2], FastLinear)
    assert second.decision != "skipped" and first.reason is not None
    assert "4 bits keep" in first.reason and "less than the 30 that were asked for" in first.reason
    fast = OFF(model, quantize=Int4WeightOnly(least=15.0))
    with torch.inference_mode():
        fast(torch.randn(1, K))
    noise = [layer.quality.weight for layer in fastlinear.report(fast)]
    assert noise[0] is not None and 15 < noise[0] < 30 and noise[1] == torch.inf


def test_a_weight_that_changes_is_coded_again() -> None:
    model, x = stock(), torch.randn(1, K)
    fast = OFF(model, quantize=Int4WeightOnly())
    with torch.no_grad():
        before = fast(x)
        model[0].weight.neg_()
        for _ in range(20):
            after = fast(x)
        assert close(after, rounded(model, Int4WeightOnly())(x)) and not close(before, after)


def test_odd_weights_are_left_alone() -> None:
    """Infinities and NaN, and int8 weights of others, cannot be 4 bits; the reason tells."""
    model = stock()
    with torch.no_grad():
        model[0].weight[3, 4] = torch.nan
    fast = OFF(model, quantize=Int4WeightOnly())
    assert "infinities or NaN" in str(fastlinear.report(fast)[0].reason)


@pytest.mark.parametrize(
    ("options", "error", "about"),
    [
        ({"group": 8}, ValueError, "a power of two from 16 on, but is 8"),
        ({"group": 48}, ValueError, "a power of two"),
        ({"group": 32.0}, TypeError, "must be an int"),
        ({"group": True}, TypeError, "must be an int"),
        ({"table": "int3"}, ValueError, "'int4', 'nf4', 'fp4', 'iq4_nl', but is 'int3'"),
        ({"offsets": 1}, TypeError, "must be True or False"),
        ({"scales": torch.int8}, ValueError, r"one of torch\.float32"),
        ({"least": "20"}, TypeError, "a number of decibels or None"),
    ],
)
def test_bad_schemes_are_refused(options: dict[str, Any], error: type[Exception], about: str) -> None:
    with pytest.raises(error, match=about):
        Int4WeightOnly(**options)
    if "table" not in options:
        with pytest.raises(error, match=about):
            Int4Dynamic(**options)


def test_bad_dynamic_schemes_are_refused() -> None:
    with pytest.raises(ValueError, match="must be 'int4', 'fp4', 'iq4_nl', but is 'nf4'"):
        Int4Dynamic(table="nf4")
    with pytest.raises(TypeError, match="must be True or False, but is 1"):
        Int4Dynamic(by_row=1)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="none of integers"):
        OFF(stock(), quantize=Int4Dynamic(), products=torch.bfloat16)
