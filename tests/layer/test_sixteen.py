"""Layers and models in 16 bits: every pairing of dtypes, in every state and on every way to get there."""

import copy
import itertools
import pickle
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import zygote
from models import OFF, PAIRINGS, VIEWS, Model, Pairing, inputs, mlp, other_kernels, same_tensors
from native import FP16_BLOCK
from oracle import FP32_SUMS, Sums, check
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

import fastlinear
import fastlinear._engine as _engine
import fastlinear._kernels as _kernels
import fastlinear._tensors as _tensors
from fastlinear import FastLinear
from fastlinear.layer import linear
from fastlinear.plan import candidates, decide, rivals
from fastlinear.plan.memory import Remembered
from fastlinear.plan.problem import Problem
from fastlinear.spec import activations
from fastlinear.spec.formats import DTYPES, FP32
from fastlinear.spec.precision import Precision

K, N = 37, 70
NARROW = [dtype for dtype in _tensors.FORMATS if dtype != torch.float32]
EVERY_PAIRING = pytest.mark.parametrize("pairing", PAIRINGS)
EVERY_NARROW = pytest.mark.parametrize("dtype", NARROW)
KERNELS = [row for row in _kernels.kernels() if row["runnable"]]


def layer_of(
    pairing: Pairing, activation: object = "gelu", bias: torch.dtype | None = torch.float32, k: int = K, n: int = N
) -> FastLinear:
    """A fast layer that does not tune, with a parameter and a pack of these dtypes."""
    stock = nn.Linear(k, n, bias is not None).to(pairing.held)
    if bias is not None:
        stock.bias = nn.Parameter(torch.randn(n).to(bias))
    fast = FastLinear.from_linear(stock, activation, dtype=None if pairing.packed == pairing.held else pairing.packed)
    fast._tune = "off"
    return fast.eval().requires_grad_(False)


def bounded(y: Tensor, layer: FastLinear, x: Tensor, sums: Sums = FP32_SUMS) -> None:
    """Holds y to the bound of a kernel for this x and this layer's packed weight."""
    assert y.dtype == x.dtype
    check(y, x, layer.weight.to(DTYPES[layer.packed_as]), layer.bias, layer.activation, sums=sums)


# ---- one layer -------------------------------------------------------------------------------------------------------


@EVERY_PAIRING
@pytest.mark.parametrize("bias", ["none", "fp32", "the weight's"])
def test_every_pairing_with_every_activation(pairing: Pairing, bias: str) -> None:
    """Any x by any weight the kernels take, and a bias of either dtype: the bound, in the dtype of x, by a kernel."""
    of_bias = {"none": None, "fp32": torch.float32, "the weight's": pairing.held}[bias]
    for activation in (None, *activations.names()):
        layer = layer_of(pairing, activation, of_bias)
        for m in (1, 5, 64):
            x = torch.randn(m, K).to(pairing.x)
            bounded(layer(x), layer, x)
        assert {(chosen.x, chosen.source) for chosen in layer.plans} == {(_tensors.FORMATS[pairing.x], "heuristic")}
        assert layer.pack_nbytes >= K * N * pairing.packed.itemsize


def strided_by_bytes(x: Tensor) -> Tensor:
    raw = torch.zeros(x.nbytes + 1, dtype=torch.uint8)
    raw[1:] = x.flatten().view(torch.uint8)
    return torch.frombuffer(memoryview(raw.numpy())[1:], dtype=x.dtype).view(x.shape)


EVERY_VIEW = {
    **VIEWS,
    "permuted batch": lambda x: x.view(3, 2, K).permute(1, 0, 2),
    "at an odd address": strided_by_bytes,
    "requires grad, unwanted": lambda x: x.requires_grad_(),
}


@pytest.mark.parametrize("view", EVERY_VIEW)
@EVERY_PAIRING
def test_inputs_of_every_form(pairing: Pairing, view: str) -> None:
    """Any shape, stride and alignment."""
    layer, x = layer_of(pairing), EVERY_VIEW[view](torch.randn(6, K).to(pairing.x))
    with torch.no_grad():
        y = layer(x)
        assert y.shape == (*x.shape[:-1], N) and y.is_contiguous()
        if y.numel():
            bounded(y, layer, x)


@EVERY_PAIRING
def test_conv1d(pairing: Pairing) -> None:
    """GPT-2's Conv1D, whose weight is [in, out], in every pairing."""
    conv = Conv1D(N, K).to(pairing.held).requires_grad_(False).eval()
    linear.adopt(conv, tune="off", precision=Precision(_tensors.FORMATS[pairing.packed]))
    x = torch.randn(2, 3, K).to(pairing.x)
    check(conv(x), x, conv.weight.t().to(pairing.packed), conv.bias)
    assert conv.pack_nbytes > 0


def test_fp16_overflows_where_it_must() -> None:
    """Large fp16 values: outputs beyond the format are infinite, sums that pass beyond it and come back are not."""
    layer = layer_of(Pairing(torch.float16, torch.float16, torch.float16), None)
    layer.weight.copy_(torch.randn(N, K) * 30)
    x = (torch.randn(64, K) * 300).half()
    y = layer(x)
    result = check(y, x, layer.weight, layer.bias)
    assert result.nonfinite > 10 and result.compared > 1000 and y.isinf().sum() >= result.nonfinite
    layer.weight.fill_(1)
    x[:, ::2], x[:, 1::2] = 60000, -60000
    y = layer(x)
    assert y.isfinite().all()
    check(y, x, layer.weight, layer.bias)


@EVERY_PAIRING
@pytest.mark.parametrize("value", [torch.inf, -torch.inf, torch.nan])
def test_infinities_and_nan(pairing: Pairing, value: float) -> None:
    """They reach the outputs that fp64 arithmetic has them in, and no others."""
    layer = layer_of(pairing, None)
    layer.weight[3] = 0
    x = torch.randn(5, K).to(pairing.x)
    x[2, K - 1] = value
    y = layer(x)
    check(y, x, layer.weight.to(pairing.packed), layer.bias)
    assert y[2].isfinite().sum() == 0 and y[[0, 1, 3, 4]].isfinite().all()


@EVERY_PAIRING
def test_threads_change_no_bit(pairing: Pairing) -> None:
    """Two threads of torch's pool compute what one does."""
    layer, x = layer_of(pairing, k=512, n=300), torch.randn(64, 512).to(pairing.x)
    expected = layer(x)
    torch.set_num_threads(2)
    assert torch.equal(layer(x), expected)
    assert {chosen.plan_threads for chosen in layer.plans} == {2}


# ---- what torch computes instead -------------------------------------------------------------------------------------


@EVERY_PAIRING
def test_training(pairing: Pairing) -> None:
    """In training torch computes in the dtype of x, and each gradient has the dtype of what it is of."""
    layer = layer_of(pairing, "tanh").requires_grad_().train()
    x = torch.randn(5, K).to(pairing.x)
    results = []
    for call in (layer, lambda x: F.linear(x, layer.weight.to(x.dtype), layer.bias.to(x.dtype)).tanh()):
        leaf = x.clone().requires_grad_()
        layer.zero_grad()
        y = call(leaf)
        y.sum().backward()
        results.append((y, leaf.grad, layer.weight.grad, layer.bias.grad))
    torch.testing.assert_close(*results, rtol=0, atol=0)
    assert [t.dtype for t in results[0]] == [pairing.x, pairing.x, pairing.held, torch.float32]
    assert layer.pack_nbytes == 0


@EVERY_PAIRING
def test_disable(pairing: Pairing, monkeypatch: pytest.MonkeyPatch) -> None:
    """FASTLINEAR_DISABLE=1 leaves every pairing to torch, in the dtype of x."""
    monkeypatch.setenv("FASTLINEAR_DISABLE", "1")
    layer, x = layer_of(pairing, "relu"), torch.randn(5, K).to(pairing.x)
    assert torch.equal(layer(x), F.linear(x, layer.weight.to(x.dtype), layer.bias.to(x.dtype)).relu())
    assert layer.pack_nbytes == 0


@EVERY_NARROW
@pytest.mark.parametrize("of_x", [torch.float64, torch.complex64, torch.long])
def test_other_inputs(dtype: torch.dtype, of_x: torch.dtype) -> None:
    """An x of a dtype without kernels is torch's own error, as in nn.Linear."""
    stock = nn.Linear(K, N, dtype=dtype).requires_grad_(False)
    fast, x = OFF(stock), torch.ones(5, K, dtype=of_x)
    with pytest.raises(RuntimeError) as expected:
        stock(x)
    with pytest.raises(RuntimeError) as error:
        fast(x)
    assert str(error.value) == str(expected.value)


@EVERY_PAIRING
def test_a_wrong_width_is_told_with_the_name(pairing: Pairing) -> None:
    """In every dtype, native or not, the error names the sizes."""
    layer = layer_of(pairing)
    for grad in (False, True):
        layer.requires_grad_(grad)
        with pytest.raises(RuntimeError, match=rf"FastLinear takes .*in_features={K}, not .*\(5, {K + 1}\)"):
            layer(torch.randn(5, K + 1).to(pairing.x))


# ---- changes of state ------------------------------------------------------------------------------------------------

CHANGES: dict[str, Callable[[FastLinear], object]] = {
    "in place": lambda m: m.weight.mul_(-2),
    ".data = t": lambda m: setattr(m.weight, "data", torch.randn_like(m.weight)),
    ".data = t of another dtype": lambda m: setattr(m.weight, "data", torch.randn(N, K, dtype=torch.float16)),
    "written through .data, and refresh": lambda m: (m.weight.data.mul_(3), fastlinear.refresh(m)),
    "a new Parameter": lambda m: setattr(m, "weight", nn.Parameter(torch.randn(N, K), requires_grad=False)),
    "to(bfloat16)": lambda m: m.to(torch.bfloat16),
    "half": lambda m: m.half(),
    "float": lambda m: m.float(),
    "half and back": lambda m: m.half().to(torch.float32),
    "load_state_dict": lambda m: m.load_state_dict({"weight": torch.ones(N, K), "bias": torch.ones(N)}),
    "load_state_dict(assign=True)": lambda m: m.load_state_dict(
        {"weight": torch.ones(N, K, dtype=torch.bfloat16), "bias": torch.ones(N)}, assign=True
    ),
    "bias replaced": lambda m: setattr(m, "bias", nn.Parameter(torch.randn(N), requires_grad=False)),
}


@EVERY_PAIRING
@pytest.mark.parametrize("change", CHANGES)
def test_changes_of_state(pairing: Pairing, change: str) -> None:
    """The very next call has the new values; they are packed as the dtype that was asked for, or the parameter's own,
    when they have stood still for the trial of a weight that changes."""
    layer, x = layer_of(pairing), torch.randn(5, K).to(pairing.x)
    with torch.no_grad():
        layer(x)
        CHANGES[change](layer.requires_grad_(False))
        if layer.bias.dtype not in (torch.float32, layer.weight.dtype):
            layer.bias = nn.Parameter(layer.bias.float())
        layer.requires_grad_(False)
        x = x.to(layer.weight.dtype) if layer.packed_as == FP32 else x
        for _ in range(2 + _engine.trial):
            bounded(layer(x), layer, x)
    assert layer._engine.packed.format == layer.packed_as and layer.pack_nbytes > 0
    asked = pairing.packed if pairing.packed != pairing.held else layer.weight.dtype
    assert DTYPES[layer.packed_as] == asked


@EVERY_PAIRING
@pytest.mark.parametrize(
    "way",
    [copy.copy, copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))],
    ids=["copy", "deepcopy", "pickle"],
)
def test_copies(pairing: Pairing, way: Callable[[FastLinear], FastLinear]) -> None:
    """Copies keep the dtype of the pack and none of its bytes."""
    layer, x = layer_of(pairing), torch.randn(5, K).to(pairing.x)
    expected = layer(x)
    other = way(layer)
    assert other.pack_nbytes == 0 and DTYPES[other.packed_as] == pairing.packed
    assert torch.equal(other(x), expected)


@EVERY_NARROW
def test_packs_of_one_parameter_lie_side_by_side(dtype: torch.dtype) -> None:
    """Layers that share a parameter share its pack in each dtype, and none drives another's out."""
    shared = nn.Linear(K, N).requires_grad_(False).eval()
    layers = [FastLinear.from_linear(shared, dtype=d) for d in (None, dtype, None, dtype)]
    x = torch.randn(5, K)
    for layer in layers:
        layer._tune = "off"
        bounded(layer(x), layer, x)
    packs = [layer._engine.packed for layer in layers]
    assert packs[0] is packs[2] and packs[1] is packs[3] and packs[0] is not packs[1]
    for layer, packed in zip(layers, packs, strict=True):
        layer(x)
        assert layer._engine.packed is packed
    assert packs[1].nbytes < 0.55 * packs[0].nbytes


@EVERY_NARROW
def test_weights_change_while_others_compute(dtype: torch.dtype) -> None:
    """Parameters of several dtypes set amid calls from other threads: each output is that of one of them."""
    layer, x = layer_of(Pairing(torch.float32, torch.float32, torch.float32), None, None), torch.randn(5, K)
    weights = [nn.Parameter(torch.randn(N, K).to(d), requires_grad=False) for d in (torch.float32, dtype)]
    wanted = [x @ weight.float().t() for weight in weights]
    failures: list[object] = []

    def work(t: int) -> None:
        for i in range(100):
            if t == 0:
                layer.weight = weights[i % 2]
            y = layer(x)
            if not any(torch.allclose(y, each, atol=1e-2) for each in wanted):
                failures.append(y)

    threads = [threading.Thread(target=work, args=(t,)) for t in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures


# ---- models ----------------------------------------------------------------------------------------------------------


@EVERY_NARROW
@pytest.mark.parametrize("inplace", [False, True])
def test_models_of_16_bits(dtype: torch.dtype, inplace: bool) -> None:
    """convert(model.to(dtype)) keeps parameters, state dict and dtypes, and is as near to fp64 as the stock model."""
    model, x = Model(3).eval().to(dtype), inputs().to(dtype)
    state = {key: value.clone() for key, value in model.state_dict().items()}
    exact = copy.deepcopy(model).double()
    with torch.no_grad():
        want, stock = exact(x.double()), model(x)
        fast = OFF(model, inplace=inplace)
        y = fast(x)
    assert y.dtype == dtype and same_tensors(fast.state_dict(), state)
    assert all(layer._engine.packed.dtype == dtype for layer in fast.modules() if linear.is_fast(layer))
    assert (y - want).abs().max() <= (stock - want).abs().max() + torch.finfo(dtype).eps * want.abs().max()


@EVERY_NARROW
@pytest.mark.parametrize("inplace", [False, True])
def test_convert_packs_in_16_bits(dtype: torch.dtype, inplace: bool) -> None:
    """convert(model, dtype=...) rounds nothing but the packed weights: activations and parameters stay as they come."""
    model, x = Model(3).eval(), inputs()
    state = {key: value.clone() for key, value in model.state_dict().items()}
    parameters = dict(model.named_parameters())
    rounded = copy.deepcopy(model)
    for layer in rounded.modules():
        if isinstance(layer, nn.Linear):
            layer.weight.data = layer.weight.data.to(dtype).float()
    fast = OFF(model, dtype=dtype, inplace=inplace)
    with torch.no_grad():
        torch.testing.assert_close(fast(x), rounded(x))
    assert same_tensors(fast.state_dict(), state)
    assert all(parameter is parameters[name] for name, parameter in fast.named_parameters())
    assert all(layer._engine.packed.dtype == dtype for layer in fast.modules() if linear.is_fast(layer))


@EVERY_NARROW
def test_converting_once_more(dtype: torch.dtype) -> None:
    """A fast model takes another dtype, keeping its activations; without one it stays as it is; unconvert undoes it."""
    stock, x = mlp(8, 16, 8).eval(), torch.randn(5, 8)
    other = next(d for d in NARROW if d != dtype)
    fast = OFF(stock)
    again = OFF(fast, dtype=dtype)
    assert [DTYPES[layer.packed_as] for layer in (again[0], again[2])] == [dtype] * 2
    assert [DTYPES[layer.packed_as] for layer in (fast[0], fast[2])] == [torch.float32] * 2
    kinds = [OFF(again), OFF(again, dtype=other)]
    assert [DTYPES[fast[0].packed_as] for fast in kinds] == [dtype, other]
    part = OFF(fast, dtype=dtype, include="2")
    assert [DTYPES[layer.packed_as] for layer in (part[0], part[2])] == [torch.float32, dtype]
    sums = OFF(again, accumulate="fp16")
    assert sums[0].precision == Precision(_tensors.FORMATS[dtype], "fp16")
    with torch.no_grad():
        torch.testing.assert_close(again(x), stock(x), rtol=0.05, atol=0.05)
    assert str(fastlinear.unconvert(again)) == str(stock) and again.state_dict().keys() == stock.state_dict().keys()
    assert vars(again[0]).keys() == vars(stock[0]).keys()


@EVERY_NARROW
def test_a_failing_example_is_undone(dtype: torch.dtype) -> None:
    """A model in place that fails to tune keeps the dtypes that it had."""
    fast = OFF(mlp(8, 8).eval())
    with pytest.raises(RuntimeError):
        fastlinear.convert(fast, dtype=dtype, inplace=True, tune="now", example_inputs=torch.zeros(3, 9))
    assert fast[0].packed_as == FP32


ALLOWED = "dtype must be None, torch.bfloat16 or torch.float16, but is"
BAD: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"dtype": torch.float32}, ValueError, f"{ALLOWED} torch.float32"),
    ({"dtype": torch.float64}, ValueError, f"{ALLOWED} torch.float64"),
    ({"dtype": "bfloat16"}, TypeError, f"{ALLOWED} 'bfloat16'"),
    ({"dtype": [torch.float16]}, TypeError, rf"{ALLOWED} \[torch.float16\]"),
    ({"accumulate": "bf16"}, ValueError, "accumulate must be 'fp32' or 'fp16', but is 'bf16'"),
    ({"accumulate": torch.float16}, ValueError, "accumulate must be 'fp32' or 'fp16', but is torch.float16"),
    ({"accumulate": ["fp16"]}, ValueError, "accumulate must be 'fp32' or 'fp16', but is"),
]


@pytest.mark.parametrize(("arguments", "error", "message"), BAD)
def test_bad_arguments(arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    """One clear error that names what was given and what is allowed, before anything has changed."""
    model = mlp(8, 8)
    before = str(model)
    with pytest.raises(error, match=message):
        fastlinear.convert(model, inplace=True, **arguments)
    assert str(model) == before
    with pytest.raises(error, match=message):
        FastLinear.from_linear(nn.Linear(8, 8), **arguments)
    if "accumulate" in arguments:
        with pytest.raises(error, match=message):
            FastLinear(8, 8, **arguments)


# ---- which kernel runs -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kernel", KERNELS, ids=lambda row: row["name"])
@EVERY_PAIRING
def test_kernel_override(pairing: Pairing, kernel: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """FASTLINEAR_KERNEL runs what its kernel can, whatever the batch size and its sums; other layers go the ordinary
    way."""
    monkeypatch.setenv("FASTLINEAR_KERNEL", kernel["name"])
    layer = layer_of(pairing)
    of_x, packed = (_tensors.FORMATS[dtype] for dtype in (pairing.x, pairing.packed))
    able = packed in [layout.split("/")[0] for layout in kernel["reads"]] and kernel["rows"] in ("fp32", of_x)
    for m in (1, 5, 64):
        x = torch.randn(m, K).to(pairing.x)
        bounded(layer(x), layer, x, Sums(FP16_BLOCK) if able and kernel["accumulate"] == "fp16" else FP32_SUMS)
    assert {chosen.source for chosen in layer.plans} == {"override" if able else "heuristic"}
    assert ({chosen.name for chosen in layer.plans} == {kernel["name"]}) or not able


@pytest.mark.parametrize("way", rivals.NAMES)
@EVERY_PAIRING
def test_torchs_own_ways(pairing: Pairing, way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """torch/linear does every pairing whose weight is not rounded to what neither it nor x is in; those that pack do
    what they can, never a weight that is packed in 16 bits elsewhere; nothing fails."""
    monkeypatch.setenv("FASTLINEAR_KERNEL", way)
    layer, x = layer_of(pairing, "relu"), torch.randn(5, K).to(pairing.x)
    eps = max(torch.finfo(pairing.x).eps, 1e-6)
    formula = F.linear(x, layer.weight.to(x.dtype), layer.bias.to(x.dtype)).relu()
    torch.testing.assert_close(layer(x), formula, rtol=4 * eps, atol=4 * torch.finfo(pairing.packed).eps)
    (chosen,) = layer.plans
    same = pairing.x == pairing.packed == pairing.held
    assert chosen.name == way or way != rivals.BASELINE or pairing.packed not in (pairing.held, pairing.x)
    assert chosen.name != way or way == rivals.BASELINE or same


# ---- tuning ----------------------------------------------------------------------------------------------------------


def problem_of(pairing: Pairing, m: int = 5, accumulate: str = "fp32") -> Problem:
    x, held, packed = (_tensors.FORMATS[dtype] for dtype in pairing)
    return Problem(
        m=m,
        n=N,
        k=K,
        x=x,
        packed=packed,
        held=held,
        accumulate=accumulate,
        bias=True,
        activation=None,
        transposed=False,
        threads=1,
    )


def test_no_two_problems_share_a_key() -> None:
    """What differs in any format is measured and remembered apart."""
    problems = [problem_of(p.values[0], accumulate=a) for p, a in itertools.product(PAIRINGS, ("fp32", "fp16"))]
    assert len({problem.key() for problem in problems}) == len(problems)


@EVERY_PAIRING
def test_tuning_measures_what_fits(pairing: Pairing) -> None:
    """Every kernel that reads the pack, and torch/linear where that multiplies the same numbers, are measured, and the
    choice is within the bound."""
    n = 32 + PAIRINGS.index(next(p for p in PAIRINGS if p.values[0] == pairing))  # a shape of its own, not tuned before
    layer, x = layer_of(pairing, n=n), torch.randn(40, K).to(pairing.x)
    layer._tune = "lazy"
    y = layer(x)
    (chosen,) = layer.plans
    measured = {name.split()[0] for name, _ in chosen.table}
    natives = {c.name for c in candidates.native_candidates(problem_of(pairing, 48))}
    torchs = {rivals.BASELINE} if pairing.packed in (pairing.held, pairing.x) else set()
    assert natives | torchs <= measured and chosen.source == "tuned"
    assert not measured & {"torch/mkl", "torch/mkldnn"} or pairing.x == pairing.packed == pairing.held
    if chosen.name in natives:
        bounded(y, layer, x)


CHILD = """
import math, sys, torch
from fastlinear.plan import race, waits
from fastlinear import FastLinear
from torch import nn

waits.Waits.__call__ = lambda self: 0.0
race.PHASES = race.UNSTEADY = race.BEATEN = math.inf  # other tests keep the machine busy
for held, packed, x in [(torch.float32, None, torch.float32), (torch.bfloat16, None, torch.bfloat16),
                        (torch.float16, None, torch.float32), (torch.float32, torch.float16, torch.bfloat16)]:
    layer = FastLinear.from_linear(nn.Linear(64, 48, dtype=held), dtype=packed).eval().requires_grad_(False)
    layer(torch.randn(8, 64, dtype=x))
    print(*((c.source, c.name) for c in layer.plans))
"""


def test_a_second_process_finds_what_was_tuned(tmp_path: Any) -> None:
    """Plans of every format come from the file afterwards, each its own; what was too noisy to tell is tuned again."""
    first, second = (zygote.checked(CHILD, FASTLINEAR_CACHE_DIR=str(tmp_path)) for _ in range(2))
    assert first.count("'tuned'") == 4
    both = list(zip(first.splitlines(), second.splitlines(), strict=True))
    found = [(a, b) for a, b in both if "'cache'" in b]
    assert found and all(b == a.replace("'tuned'", "'cache'") for a, b in found)


def test_a_tampered_cache_breaks_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """A name that runs here, but not for this problem, is tuned anew; a way that torch refuses becomes torch/linear."""
    pairing = Pairing(torch.float32, torch.float16, torch.float16)
    layer, x = layer_of(pairing, n=31), torch.randn(5, K)
    wrong = next(row["name"] for row in KERNELS if not any(r.startswith("fp16") for r in row["reads"]))
    for name, source in ((wrong, "tuned"), ("torch/mkl", "equal")):
        problem = problem_of(pairing)._replace(n=31, activation=layer.activation)
        decide.cache().put(problem.key(), Remembered(name, {"threads": 1, "k_slices": 1}))
        layer._tune = "lazy"
        layer._reset()
        y = layer(x)
        assert [chosen.source for chosen in layer.plans] == [source]
        torch.testing.assert_close(y, F.gelu(F.linear(x, layer.weight.float(), layer.bias)), rtol=1e-4, atol=1e-4)


def test_fp16_sums_are_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """Kernels that accumulate in fp16 are candidates with accumulate="fp16" only, on a CPU that has them."""
    table = [{**row, "runnable": True} for row in _kernels.kernels()]
    coarse = {row["name"] for row in table if row["accumulate"] == "fp16"}
    half = Pairing(torch.float16, torch.float16, torch.float16)
    assert problem_of(half).panels  # those of this CPU, which are not remembered for the other
    monkeypatch.setattr(_kernels, "kernels", lambda: table)
    with other_kernels():
        for m in (1, 64, 512):
            names = {c.name for c in candidates.native_candidates(problem_of(half, m))}
            assert not names & coarse and candidates.heuristic(problem_of(half, m)).name in names
            names = {c.name for c in candidates.native_candidates(problem_of(half, m, "fp16"))}
            assert names & coarse == coarse
    assert FastLinear(8, 8, accumulate="fp16")._precision.accumulate == "fp16"
