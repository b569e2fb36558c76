"""Mixtures of experts of transformers' models: converted, frozen, compiled, and left as they were where they must."""

import copy
import functools
import itertools
import types
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import fastlinear
from fastlinear.layer import experts, experts_frozen
from fastlinear.layer.quality import coded_snr

transformers = pytest.importorskip("transformers")

COMMON = {
    "hidden_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 99,
    "max_position_embeddings": 128,
}
CONFIGS: dict[str, dict[str, Any]] = {
    "Mixtral": {"intermediate_size": 56, "num_local_experts": 5, "num_experts_per_tok": 2},
    "Qwen2Moe": {
        "intermediate_size": 56,
        "moe_intermediate_size": 24,
        "shared_expert_intermediate_size": 40,
        "num_experts": 6,
        "num_experts_per_tok": 3,
    },
    "Qwen3Moe": {"moe_intermediate_size": 20, "head_dim": 12, "num_experts": 6, "num_experts_per_tok": 6},
    "GptOss": {"intermediate_size": 40, "head_dim": 12, "num_local_experts": 4, "num_experts_per_tok": 2},
}
# Rounding sends tokens to other experts of so small a model, and so is not held against its own numbers alone.
ERRORS: dict[Any, float] = {None: 1e-5, fastlinear.Int8Dynamic(): 0.6, fastlinear.Int4WeightOnly(): 0.9}
TOKENS = torch.arange(18).view(2, 9) * 5


@functools.cache
def _made(name: str) -> Any:
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(**COMMON, **CONFIGS[name])
    model = getattr(transformers, f"{name}ForCausalLM")(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 3:
                parameter.normal_(0.0, 0.2)  # without which experts add next to nothing
        return model, model(TOKENS).logits


def made(name: str) -> Any:
    model, logits = _made(name)
    return copy.deepcopy(model), logits


def mixtures(model: nn.Module) -> list[Any]:
    return [module for module in model.modules() if experts.are_experts(module)]


def error(y: torch.Tensor, want: torch.Tensor) -> float:
    return float((y - want).norm() / want.norm())


def test_experts_may_be_filled_later() -> None:
    """That experts were on meta is no reason that lasts, as of layers."""
    empty = made("Mixtral")[0].to("meta")
    with pytest.warns(UserWarning, match="nothing to convert"):
        fastlinear.convert(empty, tune="off", inplace=True)
    told = {row.reason for row in fastlinear.report(empty.to_empty(device="cpu"))}
    assert told == {"its parameters were on device meta when convert was called: call it again"}


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("quantize", ERRORS, ids=["plain", "int8", "int4"])
@torch.no_grad()
def test_converted(name: str, quantize: Any) -> None:
    """The model's logits and text, on the kernels alone; the original stays, and unconvert gives it back."""
    model, want = made(name)
    keys = list(model.state_dict())
    fast = fastlinear.convert(model, quantize=quantize, tune="off")
    assert all(map(experts.is_fast_experts, mixtures(fast))) and len(mixtures(fast)) == 2
    assert not any(map(experts.is_fast_experts, mixtures(model)))
    y = fast(TOKENS).logits
    assert error(y, want) < ERRORS[quantize] and not any(mixture._elsewhere for mixture in mixtures(fast))
    with FlopCounterMode(display=False):  # the specification answers
        assert error(fast(TOKENS).logits, y) < 2e-2
    assert torch.equal(fastlinear.freeze(fast)(TOKENS).logits, y) and list(fast.state_dict()) == keys
    assert not [n for n, p in fast.named_parameters() if p.dim() == 3]
    assert torch.equal(copy.deepcopy(fast)(TOKENS).logits, y)
    fast = fastlinear.convert(model, tune="off")
    told = [m.generate(TOKENS, max_new_tokens=6, do_sample=False) for m in (model, fast)]
    assert torch.equal(*told)
    again = fastlinear.unconvert(fastlinear.freeze(fast))
    assert torch.equal(again(TOKENS).logits, want)
    assert list(map(type, again.modules())) == list(map(type, model.modules()))


@torch.no_grad()
def test_compiled() -> None:
    """By our own backend, experts an op in its graph; and so a model generates on a preallocated cache."""
    model, _ = made("Mixtral")
    del model.model.layers[1:]
    model.config.num_hidden_layers = 1
    want = model(TOKENS).logits
    fast = fastlinear.convert(model, tune="off")
    compiled = torch.compile(fast, backend="fastlinear")
    assert error(compiled(TOKENS).logits, want) < 1e-5
    assert "experts" in [node.op for graph in fastlinear.report(compiled).graphs for node in graph.nodes]
    fast.forward = torch.compile(fast.forward, backend="fastlinear")
    wish: Any = {"max_new_tokens": 4, "do_sample": False, "cache_implementation": "static"}
    assert torch.equal(fast.generate(TOKENS, **wish), model.generate(TOKENS, **wish))
    assert not any(mixture._elsewhere for mixture in mixtures(fast))


@torch.no_grad()
def test_experts_that_are_handed_their_rows() -> None:
    """Llama 4's, of which each is given every token, most of them as zeros, which kernels do not multiply: the same
    logits and text, frozen and compiled, too, and the same gradients."""
    torch.manual_seed(0)
    sizes = {"intermediate_size": 56, "intermediate_size_mlp": 40, "head_dim": 12, "num_local_experts": 4}
    config = transformers.Llama4TextConfig(**COMMON, **sizes, num_experts_per_tok=1, interleave_moe_layer_step=1)
    model = transformers.Llama4ForCausalLM(config).eval()
    for mixture in mixtures(model):
        for weight in mixture.parameters():
            weight.normal_(0.0, 0.2)
    want = model(TOKENS).logits
    for quantize, most in ERRORS.items():
        fast = fastlinear.convert(model, quantize=quantize, tune="off")
        y = fast(TOKENS).logits
        assert error(y, want) < most and all(map(experts.is_fast_experts, mixtures(fast)))
        assert torch.equal(copy.deepcopy(fastlinear.freeze(fast))(TOKENS).logits, y)
        assert not any(mixture._elsewhere for mixture in mixtures(fast))
        assert torch.equal(fastlinear.unconvert(fast)(TOKENS).logits, want) or quantize is not None
    fast = fastlinear.convert(model, tune="off")
    share = fastlinear.report(fast, (TOKENS,)).share
    assert share is not None and share.fast_multiply_adds is not None and share.multiply_adds is not None
    assert share.fast_weights > 0.9 * share.weights and share.fast_multiply_adds > 0.8 * share.multiply_adds
    assert error(torch.compile(fast, backend="fastlinear")(TOKENS).logits, want) < 1e-5
    given = torch.randn(4 * 6, 48) * (torch.arange(24) % 5 < 2)[:, None]
    with torch.enable_grad():
        grads = []
        for each in (model, fast, fast.train()):
            x = given.clone().requires_grad_()
            mixtures(each)[0](x).square().sum().backward()
            grads.append((x.grad, mixtures(each)[0].down_proj.grad.clone()))
            each.zero_grad()
    for ours in grads[1:]:
        torch.testing.assert_close(ours, grads[0], rtol=1e-4, atol=1e-4)


FLAGS = list(itertools.product((False, True), repeat=4))


@pytest.mark.parametrize("flags", FLAGS, ids=["".join("-+"[flag] for flag in flags) for flags in FLAGS])
@torch.no_grad()
def test_every_form(flags: tuple[bool, ...]) -> None:
    """Transposed or not, gates in halves or in turns or none at all, biases or none: as transformers computes them."""
    transposed, concatenated, bias, gated = flags
    use = pytest.importorskip("transformers.integrations.moe").use_experts_implementation

    def interleaved(self: Any, y: torch.Tensor) -> torch.Tensor:
        return self.act_fn(y[..., ::2]) * y[..., 1::2]

    members = {} if concatenated else {"_apply_gate": interleaved}
    kind: Any = type(
        "Kind", (nn.Module,), {"__init__": _init(transposed, bias, gated), "forward": nn.Identity.forward} | members
    )
    kind = use(kind, is_concatenated=concatenated, is_transposed=transposed, has_bias=bias, has_gate=gated)
    torch.manual_seed(0)
    stock = kind(types.SimpleNamespace(_experts_implementation="batched_mm")).eval()
    fast = copy.deepcopy(stock)
    experts.adopt(fast, "off")
    x, (weights, ids) = torch.randn(9, 20), torch.randn(9, 3).softmax(-1).topk(2)
    torch.testing.assert_close(fast(x, ids, weights), stock(x, ids, weights))
    assert not fast._elsewhere
    names = list(fast.state_dict())
    experts_frozen.freeze(fast)
    torch.testing.assert_close(fast(x, ids, weights), stock(x, ids, weights))
    state = stock.state_dict()
    assert list(fast.state_dict()) == names == list(state)
    assert all(torch.equal(state[name], weight) for name, weight in fast.state_dict().items())
    experts.release(fast)
    assert type(fast) is kind


def _init(transposed: bool, bias: bool, gated: bool) -> Any:
    def init(self: Any, config: Any) -> None:
        nn.Module.__init__(self)
        self.num_experts, self.act_fn = 3, nn.GELU()
        first = "gate_up_proj" if gated else "up_proj"
        for name, n, k in ((first, 26 if gated else 13, 20), ("down_proj", 20, 13)):
            self.register_parameter(name, nn.Parameter(torch.randn(3, *((k, n) if transposed else (n, k))) / 4))
            if bias:
                self.register_parameter(f"{name}_bias", nn.Parameter(torch.randn(3, n)))

    return init


@torch.no_grad()
def test_report() -> None:
    """A row for each product of the experts, and their share of weights and of an example's multiply-adds."""
    model, _ = made("Mixtral")
    before = fastlinear.report(model, (TOKENS,))
    rows = {row.name: row for row in before}
    row = rows["model.layers.0.mlp.experts.gate_up_proj"]
    assert row.decision == "skipped" and row.reason == "convert was not called on it" and row.shape == "5x48x112"
    assert before.share is not None and before.share.fast_weights == before.share.fast_multiply_adds == 0
    fast = fastlinear.convert(model, quantize=fastlinear.Int8Dynamic(), tune="off")
    fast(TOKENS)
    for frozen in (False, True):
        fast = fastlinear.freeze(fast) if frozen else fast
        found = fastlinear.report(fast, (TOKENS,))
        rows = {row.name: row for row in found}
        for own, shape in (("gate_up_proj", "5x48x112"), ("down_proj", "5x56x48")):
            row = rows[f"model.layers.1.mlp.experts.{own}"]
            assert (row.decision, row.frozen, row.shape, row.dtype) == ("fast", frozen, shape, "float32 as int8")
            assert row.buckets[0].bucket == 8 and row.pack_mib > 0
        share = found.share
        assert share is not None and before.share.weights == share.weights
        assert before.share.multiply_adds == share.multiply_adds
        # All but the head, the routers and attention's own products.
        assert 0.9 < share.fast_weights / share.weights < 1.0
        assert share.fast_multiply_adds is not None and share.multiply_adds is not None
        attention = 18 * (48 * 48 * 2 + 48 * 24 * 2)
        assert share.fast_multiply_adds == 2 * (attention + 18 * 2 * 3 * 48 * 56)
        assert share.fast_multiply_adds + 18 * 48 * 99 < share.multiply_adds
        told = str(fastlinear.explain(fast, "model.layers.1.mlp.experts.down_proj"))
        assert told.startswith("model.layers.1.mlp.experts.down_proj: 5 experts of 56 x 48") and "8 rows" in told
        assert "gate_up_proj" in str(found) and "gate_up_proj" in found._repr_html_()


@torch.no_grad()
def test_choice() -> None:
    """include, exclude and filter_fn mean experts, too; what is fast already is told another precision."""
    model, want = made("Mixtral")
    first = "model.layers.0.mlp.experts"
    fast = fastlinear.convert(model, exclude=first)
    assert [experts.is_fast_experts(each) for each in mixtures(fast)] == [False, True]
    assert fastlinear.report(fast)[-4].reason == f"excluded by {first!r}"
    fast = fastlinear.convert(model, include=first)
    assert [experts.is_fast_experts(each) for each in mixtures(fast)] == [True, False]
    fast = fastlinear.convert(model, filter_fn=lambda module, name: not experts.are_experts(module))
    assert not any(map(experts.is_fast_experts, mixtures(fast)))
    fast = fastlinear.convert(fastlinear.convert(model, tune="off"), dtype=torch.bfloat16)
    assert {each.packed_as for each in mixtures(fast)} == {"bf16"} and 1e-4 < error(fast(TOKENS).logits, want) < 0.6


def _without(model: Any, _mixture: Any) -> None:
    del model.model.layers[0].mlp.experts.has_gate


def _normed(_model: Any, mixture: Any) -> None:
    mixture.has_post_expert_norm = True


def _spread(_model: Any, mixture: Any) -> None:
    mixture._is_expert_parallel = True


def _odd(_model: Any, mixture: Any) -> None:
    mixture.act_fn = nn.Softshrink()


def _replaced(_model: Any, mixture: Any) -> None:
    mixture.forward = lambda *_: None


def _infinite(_model: Any, mixture: Any) -> None:
    with torch.no_grad():
        mixture.down_proj[0, 0, 0] = torch.inf


def _coarse(_model: Any, mixture: Any) -> None:
    with torch.no_grad():
        mixture.gate_up_proj[..., ::32] = 3.0  # beside 0.2: the scales of all groups are for these


REASONS = {
    _without: "no class of experts that transformers hands to an implementation",
    _normed: "followed by a norm",
    _spread: "spread over processes",
    _odd: "an activation that is none of fastlinear's",
    _replaced: "its forward was replaced",
    _infinite: "its down_proj has infinities or NaN",
    _coarse: "dB of its gate_up_proj, less than the 18 that were asked for",
}


@pytest.mark.parametrize("spoil", REASONS, ids=lambda spoil: spoil.__name__.strip("_"))
def test_experts_that_are_left_alone(spoil: Any) -> None:
    """The report names them, with the reason, and their share of the weights."""
    model, _ = made("Mixtral")
    mixture = mixtures(model)[0]
    spoil(model, mixture)
    scheme = fastlinear.Int4WeightOnly(least=18) if spoil is _coarse else fastlinear.Int8Dynamic()
    fast = fastlinear.convert(model, quantize=scheme, tune="off")
    assert [experts.is_fast_experts(each) for each in mixtures(fast)] == [False, True]
    found = fastlinear.report(fast)
    (reason,) = {row.reason for row in found if row.name.startswith("model.layers.0.mlp.experts")}
    assert REASONS[spoil] in str(reason)
    assert found.share is not None
    assert ("model.layers.0.mlp.experts.gate_up_proj", 5 * 112 * 48) in found.share.slow


@pytest.mark.parametrize("name", ["Mixtral", "GptOss"])
def test_the_report_tells_the_error_of_experts(name: str) -> None:
    """In dB, of both products, against the weights as they were; frozen experts keep what was known."""
    model, _ = made(name)
    stock: Any = mixtures(model)[0]
    scheme = fastlinear.Int4WeightOnly()
    fast = fastlinear.convert(model, quantize=scheme, tune="off")
    with torch.no_grad():
        fast(TOKENS)
    found = [row.quality.weight for row in fastlinear.report(fast) if "layers.0.mlp.experts" in row.name]
    for own, told in zip(experts.names_of(stock), found, strict=True):
        weight = stock._parameters[own].detach()
        rows = weight.mT if experts.is_transposed(stock) else weight
        assert told == pytest.approx(coded_snr(rows.flatten(0, 1), scheme.coding()), abs=0.5)
    frozen = fastlinear.report(fastlinear.freeze(fast))
    assert [row.quality.weight for row in frozen if "layers.0.mlp.experts" in row.name] == found
    assert "dB" in str(frozen)
    plain = fastlinear.convert(made(name)[0], tune="off")
    with torch.no_grad():
        plain(TOKENS)
    assert {row.quality.weight for row in fastlinear.report(plain) if "experts" in row.name} == {None}


def test_training() -> None:
    """Converted experts train as they did, and what is learned is what they then compute."""
    model, _ = made("Mixtral")
    fast = fastlinear.convert(model, tune="off")
    grads = []
    for each in (model, fast):
        each.train()
        each(TOKENS, labels=TOKENS).loss.backward()
        grads.append(mixtures(each)[0].down_proj.grad)
        each.zero_grad()
    torch.testing.assert_close(*grads)
    with torch.no_grad():
        fast.eval()
        mixtures(fast)[0].down_proj.mul_(0.5)
        assert error(fast(TOKENS).logits, model.eval()(TOKENS).logits) < 1e-5
