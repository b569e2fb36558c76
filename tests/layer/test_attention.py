"""nn.MultiheadAttention with layers of its own: the same numbers whatever it is asked for, and torch's names."""

import copy
import itertools
import pickle
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from models import OFF
from torch import Tensor, nn
from torch.nn.utils import prune

import fastlinear
from fastlinear import FastLinear
from fastlinear.layer.attention import FastMultiheadAttention
from fastlinear.layer.frozen import is_frozen

B, L, S, E, H = 3, 5, 7, 16, 4


def attention(**how: Any) -> nn.MultiheadAttention:
    module = nn.MultiheadAttention(E, H, **how).eval()
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.3)
    return module


def inputs(module: nn.MultiheadAttention, kind: str, alone: bool) -> tuple[Tensor, Tensor, Tensor]:
    def one(length: int) -> Tensor:
        x = torch.randn(B, length, E)
        return x[0] if alone else x if module.batch_first else x.transpose(0, 1).contiguous()

    q, k, v = one(L), one(S), one(S)
    return {"self": (q, q, q), "memory": (q, k, k), "apart": (q, k, v)}[kind]


def masks(kind: str, alone: bool, which: str, padding: str) -> dict[str, Any]:
    keys, batch, found = L if kind == "self" else S, 1 if alone else B, {}
    if which != "none":
        shape = (L, keys) if which.endswith("2") else (batch * H, L, keys)
        mask = torch.rand(shape) > 0.7 if which.startswith("bool") else torch.randn(shape)
        found["attn_mask"] = mask.index_fill(-1, torch.tensor([0]), 0)
    if padding != "none":
        away = torch.zeros((keys,) if alone else (B, keys), dtype=torch.bool)
        away[..., -1] = True
        found["key_padding_mask"] = away if padding == "bool" else away.float() * -1e9
    return found


CASES = [
    case
    for case in itertools.product(
        ("self", "memory", "apart"),
        (False, True),
        (False, True),
        ("none", "bool2", "bool3", "float2", "float3"),
        ("none", "bool", "float"),
    )
    if "none" in case[3:] or case[3][:4] == case[4][:4]
]


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize(
    "how",
    [
        {},
        {"batch_first": True},
        {"bias": False, "add_zero_attn": True},
        {"add_bias_kv": True, "batch_first": True},
        {"add_bias_kv": True, "add_zero_attn": True},
    ],
    ids=lambda how: "+".join(how) or "plain",
)
def test_it_answers_as_torchs(how: dict[str, Any], grad: bool) -> None:
    """For every way to call it, a sample of their products: outputs and weights, averaged or not."""
    stock = attention(**how)
    fast = OFF(stock)
    assert type(fast) is FastMultiheadAttention and isinstance(fast.in_proj, FastLinear)
    for kind, alone, weights, which, padding in random.Random(str(how)).sample(CASES, 40):
        given, more = inputs(stock, kind, alone), masks(kind, alone, which, padding)
        with torch.set_grad_enabled(grad):
            for average in (False, True) if weights else (True,):
                options = {"need_weights": weights, "average_attn_weights": average, **more}
                for ours, theirs in zip(fast(*given, **options), stock(*given, **options), strict=True):
                    assert (ours is None) == (theirs is None) == (not weights and ours is None)
                    if ours is not None:
                        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("weights", [False, True])
def test_the_causal_hint(weights: bool, padded: bool) -> None:
    """With the mask it is a hint for; without one, torch's own error."""
    stock = attention(batch_first=True)
    fast, x = OFF(stock), torch.randn(B, L, E)
    options: dict[str, Any] = {"is_causal": True, "need_weights": weights}
    if padded:
        options["key_padding_mask"] = torch.zeros(B, L).index_fill(1, torch.tensor([L - 1]), -1e9)
    mask = nn.Transformer.generate_square_subsequent_mask(L)
    for ours, theirs in zip(
        fast(x, x, x, attn_mask=mask, **options), stock(x, x, x, attn_mask=mask, **options), strict=True
    ):
        if theirs is not None:
            torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    for module in (stock, fast):
        with pytest.raises(RuntimeError, match="Need attn_mask"):
            module(x, x, x, **options)


@pytest.mark.parametrize(
    "shapes", [((L, B, E + 1),) * 3, ((L, B, E), (S, B, E), (L, B, E)), ((L, E), (L, B, E), (L, B, E))]
)
def test_bad_input_gets_torchs_error(shapes: Any) -> None:
    """Of what torch refuses nothing is computed, and the error is the same."""
    stock = attention()
    given = [torch.randn(shape) for shape in shapes]
    with pytest.raises((RuntimeError, AssertionError)) as theirs:
        stock(*given)
    with pytest.raises(type(theirs.value)) as ours:
        OFF(stock)(*given)
    assert str(ours.value) == str(theirs.value)


def test_gradients_and_training() -> None:
    """In training, dropout included, with the gradients that torch's has; to keys of another sequence, too."""
    for kind, dropout in itertools.product(("self", "memory"), (0.0, 0.5)):
        stock = attention(dropout=dropout).train()
        fast = OFF(copy.deepcopy(stock))
        given = inputs(stock, kind, alone=False)
        grads = []
        for module in (stock, fast):
            torch.manual_seed(1)
            module(*given, need_weights=False)[0].square().sum().backward()
            grads.append([p.grad for p in module.parameters()])
        for a, b in zip(*grads, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


SCHEMES: dict[str, dict[str, Any]] = {
    "fp32": {},
    "int8": {"quantize": fastlinear.Int8Dynamic()},
    "int8 weights": {"quantize": fastlinear.Int8WeightOnly()},
    "int4 weights": {"quantize": fastlinear.Int4WeightOnly()},
    "bf16 products": {"products": torch.bfloat16},
}


@pytest.mark.parametrize("scheme", SCHEMES)
def test_it_is_frozen_saved_and_loaded(scheme: str, tmp_path: Path) -> None:
    """Bit for bit, under torch's names, in self-attention and to another sequence; and it finds its way back."""
    stock = nn.Sequential()
    stock.add_module("attention", attention(batch_first=True))
    names = list(stock.state_dict())
    fast = OFF(stock, **SCHEMES[scheme])
    frozen = fastlinear.freeze(OFF(stock, **SCHEMES[scheme]))
    fastlinear.save(frozen, tmp_path / "m.safetensors")
    with torch.device("meta"):
        empty = nn.Sequential()
        empty.add_module("attention", nn.MultiheadAttention(E, H, batch_first=True))
    loaded = fastlinear.load(tmp_path / "m.safetensors", empty.eval())
    others = [frozen, loaded, copy.deepcopy(frozen), pickle.loads(pickle.dumps(frozen))]
    assert all(list(each.state_dict()) == names for each in (fast, *others))
    x, memory = torch.randn(B, L, E), torch.randn(B, S, E)
    with torch.no_grad():
        for given in ((x, x, x), (x, memory, memory)):
            want = fast.attention(*given, need_weights=False)[0]
            for each in others:
                assert torch.equal(each.attention(*given, need_weights=False)[0], want)
    restored = fastlinear.unconvert(frozen)
    assert type(restored.attention) is nn.MultiheadAttention and str(restored) == str(stock)
    assert list(restored.state_dict()) == names and [n for n, _ in restored.named_parameters()] == names
    if scheme == "fp32":
        for name, tensor in restored.state_dict().items():
            assert torch.equal(tensor, stock.state_dict()[name])


def test_a_file_of_another_model_leaves_an_attention_as_it_was(tmp_path: Path) -> None:
    """It was opened for the file, which then did not fit."""
    fastlinear.save(OFF(attention()), tmp_path / "m.safetensors")
    other = nn.MultiheadAttention(E, H, add_bias_kv=True)
    before = str(other), list(other.state_dict())
    with pytest.raises(fastlinear.FormatError, match="bias_k"):
        fastlinear.load(tmp_path / "m.safetensors", other)
    assert type(other) is nn.MultiheadAttention and (str(other), list(other.state_dict())) == before


def test_state_dicts_and_changes_reach_it() -> None:
    """State dicts go both ways, also assigned; a parameter that changes in place, or is replaced by torch's name for
    it, is seen, in self-attention and to another sequence."""
    stock, other = attention(batch_first=True), attention(batch_first=True)
    fast, x, memory = OFF(stock), torch.randn(B, L, E), torch.randn(B, S, E)

    def check(like: nn.Module) -> None:
        with torch.no_grad():
            for given in ((x, x, x), (x, memory, memory)):
                torch.testing.assert_close(fast(*given)[0], like(*given)[0], rtol=1e-5, atol=1e-5)

    check(stock)
    fast.load_state_dict(other.state_dict())
    check(other)
    fast.load_state_dict(attention(batch_first=True).state_dict() | other.state_dict(), assign=True)
    check(other)
    other.load_state_dict(fast.state_dict())
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(1.5)
        fast.in_proj_weight.mul_(1.5)
        fast.in_proj_bias.data *= 1.5
        fast.out_proj.weight.mul_(1.5)
        fast.out_proj.bias.mul_(1.5)
    check(other)
    fast.in_proj_weight = nn.Parameter(torch.ones(3 * E, E))
    assert "in_proj_weight" in fast.state_dict() and bool((fast.in_proj.weight == 1).all())
    with pytest.raises(RuntimeError, match="in_proj"):
        fast.load_state_dict({"out_proj.bias": torch.zeros(E)})


def test_who_computes_or_watches_the_projection_is_heard_by_other_sequences() -> None:
    """A pruned in_proj and hooks of it count where keys are of another sequence, too, where its thirds run apart."""
    fast, x, memory, seen = OFF(attention()), torch.randn(L, B, E), torch.randn(S, B, E), list[Any]()
    with torch.no_grad():
        fast(x, memory, memory)
        prune.l1_unstructured(fast.in_proj, "weight", 0.5)
        pruned = fast(x, memory, memory)[0]
        prune.remove(fast.in_proj, "weight")
        torch.testing.assert_close(fast(x, memory, memory)[0], pruned, rtol=1e-5, atol=1e-5)
        fast.in_proj.register_forward_hook(lambda *given: seen.append(given))
        fast(x, memory, memory)
    assert len(seen) == 3


def test_what_is_excluded_stays_torchs() -> None:
    """By the name of the attention, of its output projection, or its type: as a whole or not at all."""
    for how in ({"exclude": "0"}, {"exclude": "0.out_proj"}, {"exclude": nn.MultiheadAttention}):
        model = nn.Sequential(attention(), nn.Linear(E, E))
        fast = OFF(model, **how)
        assert type(fast[0]) is nn.MultiheadAttention and type(fast[1]) is FastLinear
        assert {row.name: row.decision for row in fastlinear.report(fast)}["0.out_proj"] == "skipped"


def test_a_script_gets_torchs_class() -> None:
    """torch.jit.script compiles nn.MultiheadAttention over the same parameters."""
    stock, x = attention(), torch.randn(L, B, E)
    scripted = torch.jit.script(OFF(stock))  # type: ignore[no-untyped-call]
    torch.testing.assert_close(scripted(x, x, x)[0], stock(x, x, x)[0])


@pytest.mark.parametrize("freeze", [False, True])
def test_parameters_are_lent_by_torchs_names(freeze: bool) -> None:
    """functional_call gives it others, and takes them back, frozen or not."""
    stock, x = attention().eval(), torch.randn(L, B, E)
    others = {name: 0.5 * parameter.detach() for name, parameter in stock.named_parameters()}
    fast = OFF(stock)
    with torch.no_grad():
        if freeze:
            fastlinear.freeze(fast)
        y, _ = fast(x, x, x)
        lent, _ = torch.func.functional_call(fast, others, (x, x, x))
        torch.testing.assert_close(lent, torch.func.functional_call(stock, others, (x, x, x))[0])
        assert torch.equal(fast(x, x, x)[0], y) and is_frozen(fast.in_proj) is freeze
