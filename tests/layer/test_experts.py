"""FastExperts: what a mixture of experts computes on packed weights, in every way a module may be run."""

import copy
import pickle
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrize, prune
from torch.utils.flop_counter import FlopCounterMode

import fastlinear
import fastlinear._environment as environment
import fastlinear._experts as _experts
import fastlinear._plans as _plans
from fastlinear import FastExperts
from fastlinear.layer import experts_frozen, experts_module
from fastlinear.layer.packs import pack_apart
from fastlinear.plan import table
from fastlinear.spec.experts import Form, computed, spelling_of
from fastlinear.spec.packed import numbers
from fastlinear.spec.precision import Precision

E, K, HIDDEN = 5, 40, 27
FORMATS: dict[str, dict[str, Any]] = {
    "fp32": {},
    "bf16": {"dtype": torch.bfloat16},
    "fp16": {"dtype": torch.float16},
    "fp32 as bf16": {"packed": torch.bfloat16},
    "products": {"products": torch.bfloat16},
    "int8": {"quantize": fastlinear.Int8Dynamic()},
    "int8 asymmetric": {"quantize": fastlinear.Int8Dynamic(asymmetric=True)},
    "w8f": {"quantize": fastlinear.Int8WeightOnly()},
    "int4": {"quantize": fastlinear.Int4WeightOnly(group=16)},
    "mxfp4": {"quantize": fastlinear.Int4WeightOnly(table="fp4")},
    "int4 dynamic": {"quantize": fastlinear.Int4Dynamic()},
    "int4 bf16": {"quantize": fastlinear.Int4WeightOnly(), "dtype": torch.bfloat16},
}
ROUNDING = {torch.float32: 2e-6, torch.bfloat16: 8e-3, torch.float16: 1e-3}
ACTIVATIONS = ["silu", "gelu", ("swiglu_oai", 1.702, 7.0), ("swiglu_limited", 2.0)]


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


def made(bias: bool = True, **options: Any) -> FastExperts:
    """With kernels by rule: what is measured is no other number."""
    module = FastExperts(E, K, HIDDEN, bias, **options).eval()
    module._tune = "off"
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            parameter.normal_(0.0, 1.0 if name.endswith("bias") else 0.3)
    return module


def routed(tokens: int, top_k: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    """x, and for each token `top_k` of the experts with weights that add up to 1."""
    scores = torch.randn(tokens, E)
    weights, ids = scores.softmax(-1).topk(top_k, -1)
    return torch.randn(tokens, K).to(dtype), ids, weights / weights.sum(-1, keepdim=True)


def plainly(module: FastExperts, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
    """As the formula has it, pair by pair, in fp64 on the numbers of the packs, of floating-point rows."""
    first, second, first_bias, second_bias = module.tensors()
    form = module.form()
    unpacked = [
        torch.stack([numbers(pack_apart(w, module.precision, gated)) for w in held.detach()]).double()
        for held, gated in ((first, True), (second, False))
    ]
    y = torch.zeros(len(x), K, dtype=torch.float64)
    for token, row in enumerate(x.double()):
        for place, expert in enumerate(ids[token].tolist()):
            if expert < E:
                sums = unpacked[0][expert] @ row + (0.0 if first_bias is None else first_bias[expert].double())
                hidden = _gate(form, *sums.chunk(2)).to(x.dtype).double()
                made = unpacked[1][expert] @ hidden
                made = made + (0.0 if second_bias is None else second_bias[expert].double())
                y[token] += weights[token, place].double() * made
    return y.detach()


def _gate(form: Form, gate: Tensor, through: Tensor) -> Tensor:
    name, params = form.program or ("", ())
    if name == "swiglu_oai":
        alpha, limit = params
        gate, through = gate.clamp(max=limit), through.clamp(-limit, limit)
        return gate * torch.sigmoid(alpha * gate) * (through + 1)
    if name == "swiglu_limited":
        return F.silu(gate.clamp(max=params[0])) * through.clamp(-params[0], params[0])
    return {"swiglu": F.silu, "geglu": F.gelu}[name](gate) * through


def error(y: Tensor, want: Tensor) -> float:
    return float((y.double() - want.double()).norm() / want.double().norm())


@pytest.mark.parametrize("bias", [False, True], ids=["nobias", "bias"])
@pytest.mark.parametrize("activation", ACTIVATIONS, ids=str)
def test_the_formula(activation: Any, bias: bool) -> None:
    """Pair by pair in fp64: each gate, with and without biases, one token and many, one expert of each and all."""
    module = made(bias, activation=activation)
    for tokens, top_k in ((1, 1), (1, E), (7, 2), (40, 3)):
        given = routed(tokens, top_k)
        with torch.no_grad():
            y = module(*given)
        assert y.shape == (tokens, K) and not module._elsewhere
        assert error(y, plainly(module, *given)) < ROUNDING[torch.float32]


@pytest.mark.parametrize("options", FORMATS.values(), ids=FORMATS)
def test_formats(options: dict[str, Any]) -> None:
    """Every format gives, on the kernels, what its specification says of the very numbers; so do gradients' forward,
    the traceable form, and frozen experts, bit for bit."""
    module = made(**options)
    for tokens, top_k in ((1, 2), (33, 3)):
        given = routed(tokens, top_k, module.held)
        with torch.no_grad():
            y = module(*given)
            x, ids, weights = given
            tight = 1e-5 if module.precision.rows is None else 2e-3  # an integer may lie between two
            assert error(y, computed(module.form(), x, ids, weights, *module.tensors())) < max(
                tight, ROUNDING[module.held]
            )
            assert error(module.in_torch(*given, dense=True), y) < max(tight, ROUNDING[module.held])
            if module.precision.rows is None and module.precision.products == "fp32":
                assert error(y, plainly(module, *given)) < 2 * ROUNDING[module.held]
    before = module(*given)
    assert before.requires_grad and torch.equal(before, y)
    fastlinear.freeze(module)
    assert not [*module.parameters()][2:] and not module._elsewhere
    with torch.no_grad():
        assert torch.equal(module(*given), y)
    assert spelling_of(module.form().spelled()) == module.form()


@pytest.mark.parametrize("quantize", [None, fastlinear.Int8Dynamic()], ids=str)
def test_experts_without_rows(quantize: Any) -> None:
    """All rows with one expert, tokens that go to none, the same expert twice, and no tokens at all."""
    module = made(quantize=quantize)
    x, ids, weights = routed(9, 2)
    for chosen in (
        torch.full_like(ids, 3),
        torch.full_like(ids, E),
        torch.where(torch.arange(2) == 0, ids, E),
        ids[:0],
    ):
        given = x[: len(chosen)], chosen, weights[: len(chosen)]
        with torch.no_grad():
            y = module(*given)
        want = computed(module.form(), *given, *module.tensors())
        torch.testing.assert_close(y, want, rtol=2e-3, atol=1e-4)
    assert not module(x, torch.full_like(ids, E), weights).any() and not module._elsewhere


def test_other_experts_are_not_touched() -> None:
    """An expert that no row goes to may hold anything."""
    module = made()
    x, ids, weights = routed(1, 2)
    with torch.no_grad():
        y = module(x, ids, weights)
        for expert in {*range(E)} - {*ids[0].tolist()}:
            module.gate_up_proj[expert] = torch.nan
            module.down_proj[expert] = torch.nan
        assert torch.equal(module(x, ids, weights), y)


def test_the_sum_is_in_the_order_of_the_places() -> None:
    """Bits depend on what each token is given, never on other tokens' experts or on which expert ran first."""
    module = made(dtype=torch.bfloat16)
    x, ids, weights = routed(16, 4, torch.bfloat16)
    with torch.no_grad():
        y = module(x, ids, weights)
        order = torch.randperm(16)
        assert torch.equal(module(x[order], ids[order], weights[order]), y[order])
        for threads in (1, 2):
            torch.set_num_threads(threads)
            assert torch.equal(module(x, ids, weights), y)


def test_many_tokens_are_cut() -> None:
    """What lies between the products is bounded: the rest of the tokens wait, and nothing changes but the plan."""
    module = made()
    given = routed(50, 2)
    with torch.no_grad():
        want = module(*given)
        limit, experts_module._BETWEEN = experts_module._BETWEEN, 4 * 1024
        try:
            torch.testing.assert_close(module(*given), want)
        finally:
            experts_module._BETWEEN = limit


@pytest.mark.parametrize("frozen", [False, True], ids=["", "frozen"])
@pytest.mark.parametrize("quantize", [None, fastlinear.Int8Dynamic()], ids=str)
def test_gradients(quantize: Any, frozen: bool) -> None:
    """In eval mode those of the specification: of x, of the routing weights, and of the experts' own."""
    module = made(quantize=quantize)
    twin = copy.deepcopy(module)
    if frozen:
        fastlinear.freeze(module)
    x, ids, weights = routed(7, 2)
    g = torch.randn(7, K)
    found = []
    for form, mine in ((None, module), (twin.form(), twin)):
        leaves = [x.clone().requires_grad_(), weights.clone().requires_grad_()]
        y = (
            mine(leaves[0], ids, leaves[1])
            if form is None
            else computed(form, leaves[0], ids, leaves[1], *twin.tensors())
        )
        parameters = [p for name, p in mine.named_parameters() if not frozen or name.endswith("bias")]
        found.append(torch.autograd.grad(y, [*leaves, *parameters], g))
    assert all(a is not None and a.abs().sum() > 0 for a in found[0]) and not module._elsewhere
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_training_and_what_goes_elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """Training computes on the plain parameters; the report counts who went elsewhere, and why."""
    module = made(quantize=fastlinear.Int8Dynamic())
    given = routed(7, 2)
    with torch.no_grad():
        plain = computed(module._form._replace(precision=Precision()), *given, *module.tensors())
        torch.testing.assert_close(module.train()(*given), plain)
        module.eval()
        monkeypatch.setenv("FASTLINEAR_DISABLE", "1")
        torch.testing.assert_close(module(*given), plain)
        monkeypatch.delenv("FASTLINEAR_DISABLE")
        assert not environment.disabled()
        y = module(*given)
        with FlopCounterMode(display=False):
            torch.testing.assert_close(module(*given), y, rtol=2e-3, atol=1e-3)
        torch.testing.assert_close(module(given[0].double(), *given[1:]).float(), y, rtol=2e-3, atol=1e-3)
    reasons = {"training", "FASTLINEAR_DISABLE", "_FlopCounterMode", "an input of torch.float64"}
    assert module._elsewhere == dict.fromkeys(reasons, 1)
    assert dict(fastlinear.report(module)[0].elsewhere) == module._elsewhere


def test_other_ways_to_call() -> None:
    """vmap over a batch of tokens, export and autocast compute the same."""
    module = made()
    x, ids, weights = routed(6, 2)
    with torch.no_grad():
        y = module(x, ids, weights)
        batch = [t.view(2, 3, -1) for t in (x, ids, weights)]
        torch.testing.assert_close(torch.vmap(module)(*batch).view(6, K), y, rtol=1e-5, atol=1e-5)
        exported = torch.export.export(module, (x, ids, weights)).module()
        torch.testing.assert_close(exported(x, ids, weights), y, rtol=1e-5, atol=1e-5)
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(module(x, ids, weights), y)
            assert error(module(x.bfloat16(), ids, weights), y) < 2e-2


class _Twice(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return 2 * weight


@pytest.mark.parametrize("name", ["gate_up_proj", "down_proj"])
def test_a_weight_that_is_computed(name: str) -> None:
    """A parametrization, as adapters for experts are, is what calls and copies compute, and goes as it came."""
    module, given = made(), routed(6, 2)
    with torch.no_grad():
        y = module(*given)
        parametrize.register_parametrization(module, name, _Twice())
        twice = copy.deepcopy(module)
        got = module(*given)
        assert torch.equal(twice(*given), got) and fastlinear.report(module)[0].decision == "fast"
        parametrize.remove_parametrizations(module, name, leave_parametrized=False)
        assert torch.equal(module(*given), y)
        getattr(module, name).mul_(2.0)
        torch.testing.assert_close(got, module(*given), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("name", ["gate_up_proj", "down_proj"])
def test_a_pruned_weight(name: str, frozen: bool) -> None:
    """What torch's pruning leaves of a weight is what calls compute, of frozen experts too, and stays once it is
    permanent."""
    module, given = made(), routed(6, 2)
    with torch.no_grad():
        y = module(*given)
        if frozen:
            fastlinear.freeze(module)
        prune.l1_unstructured(module, name, 0.5)
        got = module(*given)
        assert not torch.equal(got, y) and int((getattr(module, name) == 0).sum()) == getattr(module, name).numel() // 2
        prune.remove(module, name)
        torch.testing.assert_close(module(*given), got, rtol=1e-5, atol=1e-5)


def test_changes_of_weights_are_seen() -> None:
    """In place, through .data, by a new Parameter and in a bias; weights that never rest are left to torch."""
    module = made()
    given = routed(7, 2)
    with torch.no_grad():

        def check() -> None:
            torch.testing.assert_close(module(*given), computed(module.form(), *given, *module.tensors()))

        check()
        module.down_proj.mul_(2.0)
        check()
        module.gate_up_proj.data.neg_()
        check()
        module.gate_up_proj = torch.nn.Parameter(torch.randn_like(module.gate_up_proj))
        check()
        module.gate_up_proj_bias.add_(1.0)
        check()
        for _ in range(12):
            module.down_proj.mul_(1.01)
            check()
    assert set(module._elsewhere) == {"its weight keeps changing"}


@pytest.mark.parametrize(
    "options", [FORMATS[name] for name in ("fp32", "int8", "mxfp4")], ids=["fp32", "int8", "mxfp4"]
)
def test_copies_and_frozen_weights(options: dict[str, Any]) -> None:
    """Copies, pickles and state dicts of frozen experts, and what makes them Parameters again."""
    module = made(**options)
    given = routed(7, 2)
    with torch.no_grad():
        y, names = module(*given), list(module.state_dict())
        copied, unpickled = copy.deepcopy(module), pickle.loads(pickle.dumps(module))
        fastlinear.freeze(module)
        for twin in (copied, unpickled, copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
            assert torch.equal(twin(*given), y) and list(twin.state_dict()) == names
        assert experts_frozen.are_frozen(pickle.loads(pickle.dumps(module))) and list(module.state_dict()) == names
        other = made(**options)
        other.load_state_dict(module.state_dict())
        torch.testing.assert_close(other(*given), y, rtol=3e-2, atol=2e-2)
        frozen = copy.deepcopy(module)
        module.load_state_dict(other.state_dict())
        assert not experts_frozen.are_frozen(module) and torch.equal(module.down_proj, other.down_proj)
        frozen.down_proj.mul_(2.0)  # of what is lent
        assert not experts_frozen.are_frozen(frozen)
        torch.testing.assert_close(frozen.down_proj, 2 * other.down_proj)
        fastlinear.freeze(other)
        assert not experts_frozen.are_frozen(other.double()) and other.down_proj.dtype is torch.float64


@pytest.mark.parametrize("frozen", [False, True], ids=["", "frozen"])
def test_the_op(frozen: bool) -> None:
    """torch's own check of the op, its gradients included; and for tensors that are no module's it is the formula."""
    module = made(**FORMATS["int8" if frozen else "fp32"])
    if frozen:
        fastlinear.freeze(module)
    x, ids, weights = routed(4, 2)
    with torch.no_grad():
        y = module(x, ids, weights)
    arguments = (x.requires_grad_(), ids, weights, *module.tensors(), module._spelled, module._handle)
    tests = ("test_schema", "test_faketensor", "test_autograd_registration", "test_aot_dispatch_dynamic")
    torch.library.opcheck(torch.ops.fastlinear.experts.default, arguments, test_utils=tests)
    alone = torch.ops.fastlinear.experts(*arguments[:-1], 0)
    torch.testing.assert_close(alone, y, rtol=2e-3, atol=1e-3)


def test_compiled() -> None:
    """One graph, whatever the number of tokens; the kernels answer."""
    module = made()
    compiled = torch.compile(module, backend="fastlinear", fullgraph=True, dynamic=True)
    with torch.no_grad():
        for tokens in (3, 8):
            given = routed(tokens, 2)
            assert torch.equal(compiled(*given), module(*given))
    assert not module._elsewhere


def bad() -> list[tuple[Any, str]]:
    return [*_bad()]


def _bad() -> Iterator[tuple[Any, str]]:
    yield (
        lambda m, x, i, w: FastExperts(E, K, HIDDEN, activation="mish"),
        "one of sigmoid, relu, .* but was given 'mish'",
    )
    yield lambda m, x, i, w: m(x, i.clone().fill_(E + 1), w), f"ids are 0 to {E}"
    yield lambda m, x, i, w: m(x, i.clone().fill_(-1), w), f"ids are 0 to {E}"
    packs = [pack_apart(torch.randn(n, K), Precision("fp32")) for n in (16, 32)]
    yield lambda m, x, i, w: _experts.Projection(packs, _plans.Epilogue()), "experts are alike"
    yield lambda m, x, i, w: _experts.Projection((), _plans.Epilogue()), "no experts"
    yield lambda m, x, i, w: _experts.Projection(packs[:1], _plans.Epilogue(), torch.zeros(1, 3)), r"bias must be .*16"
    assert table.layout("fp32") == packs[0].layout


@pytest.mark.parametrize(("call", "message"), bad(), ids=range(6))
def test_bad_use(call: Any, message: str) -> None:
    """The message names what was given and what is allowed."""
    with pytest.raises((ValueError, IndexError), match=message), torch.no_grad():
        call(made(), *routed(3, 2))
