"""Products in 16 bits between fp32 inputs and outputs: x and the weight are rounded once, and nothing else is."""

import copy
import itertools
import pickle
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import grouped
import pytest
import torch
from models import OFF, mlp
from oracle import UNIT as FINE
from oracle import check, gamma
from torch import Tensor, nn

import fastlinear
import fastlinear._kernels as _kernels
import fastlinear._plans as _plans
import fastlinear._products as _products
import fastlinear._tensors as _tensors
import fastlinear._weights as _weights
from fastlinear import FastLinear
from fastlinear.layer import linear, operator
from fastlinear.plan import candidates, decide, rivals
from fastlinear.plan.memory import Remembered
from fastlinear.spec.formats import DTYPES, FP32
from fastlinear.spec.int4 import Coding, table_in

NARROW = {name: dtype for name, dtype in DTYPES.items() if name != FP32}
EVERY_NARROW = pytest.mark.parametrize("products", NARROW.values(), ids=NARROW)
RUNNABLE = [row for row in _kernels.kernels() if row["runnable"]]
UNIT = {dtype: torch.finfo(dtype).eps / 2 for dtype in NARROW.values()}
BF16 = torch.bfloat16


def layer_of(products: torch.dtype, activation: object = None, n: int = 70, k: int = 37, **wish: Any) -> FastLinear:
    fast = FastLinear.from_linear(nn.Linear(k, n), activation, products=products, **wish)
    fast._tune = "off"
    return fast.eval()


def of_rounded(layer: FastLinear, x: Tensor) -> Tensor:
    """The layer's answer in fp64 to rounded x and weight."""
    products = DTYPES[layer.precision.products]
    y = x.to(products).double() @ layer.weight.to(products).double().t()
    return y if layer.bias is None else y + layer.bias.double()


@pytest.mark.parametrize("products", NARROW)
@pytest.mark.parametrize("kernel", RUNNABLE, ids=lambda kernel: kernel["name"])
def test_kernels_round_rows_once(kernel: dict[str, Any], products: str) -> None:
    """Every kernel that may multiply numbers of a 16-bit format gives the same bits for rows that the prologue rounds
    as for rows that torch rounded, infinities, NaN, ties and denormals included; the others refuse."""
    rows, plan = _plans.RowQuantizer.rounding(NARROW[products]), _plans.Plan(kernel["name"], 2)
    for layout, k in itertools.product(kernel["reads"], (1, 37, 96)):
        dtype = _tensors.PACKED.get(layout.split("/")[0], torch.uint8)
        if dtype is torch.int8:
            scale = torch.ones(40)
            packed = _weights.Packed(torch.randint(-127, 128, (40, k), dtype=dtype), layout, scale)
        elif dtype is torch.uint8:
            packed = grouped.pack(grouped.coded(40, k, Coding(32, table_in(layout)), layout=layout), layout)
        else:
            packed = _weights.Packed(torch.randn(40, k).to(dtype), layout)
        x = torch.randn(19, k) * torch.exp2(torch.randint(-140, 20, (19, 1)).float())
        x[3], x[4, 0], x[5, 0] = 1 + UNIT[NARROW[products]], torch.inf, torch.nan
        got, want = torch.empty(19, 40), torch.empty(19, 40)
        if kernel["rows"] not in (FP32, products):
            with pytest.raises(ValueError, match=r"does not take x of .* with rounded rows"):
                _products.run(packed, plan, _plans.Epilogue(), x, None, got, rows)
            continue
        _products.run(packed, plan, _plans.Epilogue(), x, None, got, rows)
        rounded = x.to(NARROW[products])
        rounded = rounded if kernel["rows"] == products else rounded.float()
        _products.run(packed, plan, _plans.Epilogue(), rounded, None, want)
        assert torch.equal(got.nan_to_num(7.0), want.nan_to_num(7.0)) and got[4:6].isnan().any()


@EVERY_NARROW
@pytest.mark.parametrize("activation", [None, "gelu"])
def test_the_bound(products: torch.dtype, activation: str | None) -> None:
    """Within gamma(K + 2) of the exact result of the rounded numbers; within (2 v + v^2) sum |x| |w| more of that of
    the numbers as they were."""
    for m, k, bias in itertools.product((1, 5, 33), (37, 300), (True, False)):
        stock = nn.Linear(k, 70, bias)
        layer = FastLinear.from_linear(stock, activation, products=products).eval().requires_grad_(False)
        layer._tune, x = "off", torch.randn(m, k)
        y = layer(x)
        check(y, x.to(products).float(), layer.weight.to(products).float(), layer.bias, layer.activation)
        if activation is None:
            gauge, v = x.abs().double() @ layer.weight.abs().double().t(), UNIT[products]
            exact = nn.functional.linear(x.double(), layer.weight.double(), layer.bias.double() if bias else None)
            rounding = gamma(k + 2, FINE) * ((1 + v) ** 2 * gauge + (layer.bias.abs().double() if bias else 0.0))
            assert ((y - exact).abs() <= (2 * v + v * v) * gauge + rounding).all()
            assert ((y - exact).abs() > gamma(k + 2, FINE) * gauge).any()  # it did round
        assert {plan.x for plan in layer.plans} == {FP32}


@EVERY_NARROW
def test_one_set_of_numbers(products: torch.dtype) -> None:
    """Kernels, the reference, the op and gradients see the same rounded x and weight; training sees neither."""
    layer = layer_of(products, "silu")
    x = torch.randn(2, 5, 37, requires_grad=True)
    y, want = layer(x), torch.nn.functional.silu(of_rounded(layer, x))
    assert torch.allclose(y.double(), want, rtol=1e-5, atol=1e-6)
    g = torch.randn_like(y)
    got = torch.autograd.grad(y, (x, layer.weight, layer.bias), g)
    reference = layer._reference(layer.precision, None, False).linear(x, layer.weight, layer.bias)
    expected = torch.autograd.grad(reference, (x, layer.weight, layer.bias), g)
    assert all(torch.allclose(a, b, rtol=1e-4, atol=1e-5) for a, b in zip(got, expected, strict=True))
    with torch.no_grad():
        assert torch.equal(operator.linear(layer, x), y)
        batched = torch.vmap(layer)(x)
        assert torch.allclose(batched, y, rtol=1e-5, atol=1e-6)
    plain = nn.functional.silu(nn.functional.linear(x, layer.weight, layer.bias))
    assert torch.equal(layer.train()(x), plain)


def test_inputs_of_every_float_are_rounded() -> None:
    """x in any float becomes the products' format, also under autocast; y has the format of x."""
    layer = layer_of(BF16).requires_grad_(False)
    for dtype in DTYPES.values():
        x = torch.randn(6, 37).to(dtype)
        y = layer(x)
        assert y.dtype is dtype and torch.equal(y, layer(x.to(BF16).to(dtype)))
    x = torch.randn(6, 37)
    for dtype in NARROW.values():
        with torch.autocast("cpu", dtype):
            y = layer(x)
            assert y.dtype is dtype and torch.equal(y, layer(x.to(dtype).to(BF16).to(dtype)))


@contextmanager
def switched(how: str) -> Iterator[None]:
    matmul = torch.backends.mkldnn.matmul
    before = torch.get_float32_matmul_precision()
    try:
        if how == "medium":
            torch.set_float32_matmul_precision("medium")
        else:
            matmul.fp32_precision = how
        yield
    finally:
        matmul.fp32_precision = "none"
        torch.set_float32_matmul_precision(before)
        matmul.fp32_precision = "none"


SWITCHES = {"medium": "bf16", "bf16": "bf16", "tf32": FP32, "ieee": FP32}


@pytest.mark.parametrize("how", SWITCHES)
def test_the_switch_of_torch(how: str) -> None:
    """What torch is told of fp32 products holds for fp32 layers that are converted or made then, unless another wish is
    spoken; an lm_head too, since torch means all."""
    model = nn.ModuleDict({"fc": nn.Linear(8, 8), "narrow": nn.Linear(8, 8).bfloat16(), "lm_head": nn.Linear(8, 8)})
    with switched(how):
        fast = OFF(model)
        explicit = OFF(model, products=torch.float32)
        sixteen, eight = OFF(model, dtype=torch.float16), OFF(model, quantize=fastlinear.Int8Dynamic())
        made = FastLinear(8, 8), FastLinear.from_linear(nn.Linear(8, 8))
    want = SWITCHES[how]
    assert [linear.precision_of(fast[name]).products for name in model] == [want, FP32, want]
    assert {linear.precision_of(layer).products for layer in made} == {want}
    others = [other[name] for other in (explicit, sixteen, eight) for name in ("fc", "narrow")]
    assert {linear.precision_of(layer).products for layer in others} == {FP32}
    assert linear.precision_of(OFF(model)["fc"]).products == FP32  # it is over with the switch
    assert OFF(fast)["fc"].precision.is_as(fast["fc"].precision)


def test_every_state(tmp_path: Path) -> None:
    """Frozen, pickled, copied, saved, loaded and converted anew, a model answers with the same bits, and says so."""
    model = mlp(37, 64, 9).eval().requires_grad_(False)
    fast, x = OFF(model, products=BF16), torch.randn(5, 37)
    want = fast(x)
    assert "fp32 as bf16 products" in str(fastlinear.report(fast)) and "products" in repr(fast[0])
    fastlinear.save(fast, tmp_path / "model.safetensors")
    loaded = fastlinear.load(tmp_path / "model.safetensors", mlp(37, 64, 9).eval())
    others = [copy.deepcopy(fast), pickle.loads(pickle.dumps(fast)), fastlinear.freeze(copy.deepcopy(fast)), loaded]
    others += [OFF(OFF(model), products=BF16), OFF(model, products=BF16, dtype=BF16)]
    for other in others:
        assert torch.equal(other(x), want) and linear.precision_of(other[0]).products == "bf16"
    assert torch.equal(fastlinear.unconvert(fast)(x), model(x))


def test_wishes_beside_it() -> None:
    """Weight-only int8 takes it for x alone; an lm_head is left alone as with dtype; the backend knows the option."""
    model = nn.Sequential(nn.Linear(64, 32)).eval().requires_grad_(False)
    x = torch.randn(40, 64)
    only = OFF(model, quantize=fastlinear.Int8WeightOnly(), products=BF16)
    assert torch.equal(only(x), only(x.bfloat16().float())) and not torch.equal(only(x), model(x))
    assert "w8f, bfloat16 products" in repr(only[0])
    head = OFF(nn.ModuleDict({"fc": nn.Linear(8, 8), "lm_head": nn.Linear(8, 8)}), products=BF16)
    assert not linear.is_fast(head["lm_head"]) and "lossy" in str(fastlinear.report(head)[1].reason)
    options = {"products": BF16, "tune": "off"}
    with torch.no_grad():
        compiled = torch.compile(model, backend="fastlinear", options=options)
        assert torch.equal(compiled(x), OFF(model, products=BF16)(x))
    group = fastlinear.FastLinearGroup([nn.Linear(37, 9), nn.Linear(37, 4)], products=BF16).eval().requires_grad_(False)
    x = torch.randn(3, 37)
    for layer, y in zip(group.layers, group(x), strict=True):
        assert torch.allclose(y.double(), of_rounded(layer, x), atol=1e-5)


BAD: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"products": "bf16"}, TypeError, "products must be None, torch.float32, torch.bfloat16 or torch.float16, but is"),
    ({"products": torch.float64}, ValueError, "but is torch.float64"),
    ({"products": BF16, "dtype": torch.float16}, ValueError, "are of weights packed so, not by dtype=torch.float16"),
    ({"products": BF16, "quantize": fastlinear.Int8Dynamic()}, ValueError, "are none of integers"),
]


@pytest.mark.parametrize(("wish", "error", "message"), BAD)
def test_bad_wishes(wish: dict[str, Any], error: type[Exception], message: str) -> None:
    """One sentence that names what was given, and nothing is converted."""
    model = mlp(8, 8)
    with pytest.raises(error, match=message):
        fastlinear.convert(model, inplace=True, **wish)
    assert not linear.is_fast(model[0])
    with pytest.raises(ValueError, match=r"rows are rounded to .*, not torch"):
        _plans.RowQuantizer.rounding(torch.int8)


def test_candidates_multiply_what_is_asked_for() -> None:
    """The tuner has kernels of 16-bit rows to choose from for an fp32 x where products are 16 bits, under a key of its
    own; and not otherwise."""
    for products in (FP32, *NARROW):
        layer = layer_of(NARROW.get(products, torch.float32)).requires_grad_(False)
        layer(torch.randn(33, 37))
        problem = layer.problem(layer._engine, layer._engine.packed, 32, FP32, 1)  # type: ignore[arg-type]
        rows = {row["rows"] for row in candidates.able(problem)}
        assert rows <= {FP32, products} and (f"products={products}" in problem.key()) == (products != FP32)
        known = {row["rows"] for row in RUNNABLE if problem.panels in row["reads"]}
        assert (products in rows) == (products in known)


@EVERY_NARROW
def test_torch_never_answers_in_other_numbers(products: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """torch's own linear, which would multiply x and the weight as they are, is no candidate where they are rounded:
    named, measured or remembered, it does not run. It is one where rounding changes nothing."""
    x = torch.randn(4, 37)
    for dtype, admitted in ((torch.float32, False), (products, True)):
        layer = layer_of(products).requires_grad_(False)
        layer(x.to(dtype))
        problem = layer.problem(layer._engine, layer._engine.packed, 4, _tensors.FORMATS[dtype], 1)  # type: ignore[arg-type]
        assert problem.admits_torch == admitted
        tuned = Remembered(rivals.BASELINE, {"threads": 1, "k_slices": 1}, (), None, 0.0)
        assert (decide._among_candidates(tuned, problem) is not None) == admitted
    for held, x_dtype in ((torch.float32, torch.float32), (torch.float32, products), (products, torch.float32)):
        layer = (
            fastlinear.FastLinear.from_linear(nn.Linear(37, 16).to(held), dtype=products).eval().requires_grad_(False)
        )
        layer(torch.randn(4, 37, dtype=x_dtype))
        problem = layer.problem(layer._engine, layer._engine.packed, 4, _tensors.FORMATS[x_dtype], 1)  # type: ignore[arg-type]
        assert problem.admits_torch == (held is products or x_dtype is products)
    monkeypatch.setenv("FASTLINEAR_KERNEL", rivals.BASELINE)
    layer = layer_of(products).requires_grad_(False)
    assert torch.allclose(layer(x).double(), of_rounded(layer, x), atol=1e-5)
    assert [plan.name for plan in layer.plans] and not {plan.name for plan in layer.plans} & {*rivals.NAMES}
