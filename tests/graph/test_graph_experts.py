"""Mixtures of experts that nobody has converted: what transformers spells out of them in a graph is fast experts."""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fastlinear
from fastlinear.graph import backend
from fastlinear.layer import experts

FEATURES, HIDDEN, COUNT, TOP_K = 24, 16, 5, 2


def _config(**more: Any) -> Any:
    own = {"hidden_size": FEATURES, "intermediate_size": HIDDEN, "num_local_experts": COUNT, "hidden_act": "silu"}
    nemotron = {"n_routed_experts": COUNT, "moe_intermediate_size": HIDDEN, "mlp_hidden_act": "relu2"}
    limits = {"swiglu_alpha": 1.702, "swiglu_limit": 7.0, "moe_latent_size": None}
    return SimpleNamespace(**{**own, **nemotron, **limits, **more})


def _of(module: str, name: str, **more: Any) -> Callable[[str], nn.Module]:
    """Experts of a class of transformers', by this implementation."""

    def made(way: str) -> nn.Module:
        pytest.importorskip("transformers", reason="transformers is an optional dependency")
        of_models: Any = __import__(f"transformers.models.{module}.modeling_{module}", fromlist=[name])
        found: nn.Module = getattr(of_models, name)(_config(_experts_implementation=way, **more))
        for parameter in found.parameters():
            nn.init.normal_(parameter, 0.0, 0.2)
        return found

    return made


# Gates in halves and taking turns, weights [out, in] and [in, out], with biases, without a gate.
CLASSES = {
    "mixtral": _of("mixtral", "MixtralExperts"),
    "gpt_oss": _of("gpt_oss", "GptOssExperts"),
    "nemotron_h": _of("nemotron_h", "NemotronHExperts"),
}
WAYS = ("grouped_mm", "batched_mm")


class Layers(nn.Module):
    """The same rows and experts' numbers to all of these."""

    def __init__(self, layers: dict[str, nn.Module]) -> None:
        super().__init__()
        self.layers = nn.ModuleDict(layers)

    def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> list[Tensor]:
        return [layer(x, ids, weights) for layer in self.layers.values()]


def routed(rows: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    best, ids = torch.randn(rows, COUNT).softmax(-1).topk(TOP_K)
    return torch.randn(rows, FEATURES, dtype=dtype), ids, best.to(dtype)


def compiled(model: nn.Module, **options: Any) -> Any:
    torch._dynamo.reset()
    return torch.compile(model, backend=backend, fullgraph=True, options={"tune": "off", **options})


def products(report: Any) -> list[Any]:
    return [row for row in report if row.experts]


@pytest.mark.parametrize(
    ("classes", "dtype", "close"),
    [
        ([*CLASSES], torch.float32, 1e-5),
        (["mixtral"], torch.bfloat16, 4e-2),
        pytest.param([*CLASSES], torch.bfloat16, 4e-2, marks=pytest.mark.exhaustive),
    ],
    ids=["fp32", "one in bf16", "all in bf16"],
)
@torch.no_grad()
def test_both_implementations_are_taken(classes: list[str], dtype: torch.dtype, close: float) -> None:
    """Experts of every form, by each of transformers' implementations, for any number of rows: what stock gives, all on
    the kernels."""
    model = Layers({f"{name} {way}": CLASSES[name](way) for name in classes for way in WAYS}).to(dtype).eval()
    fast = compiled(model)
    for rows in (1, 9, 4):  # one is a graph of its own
        given = routed(rows, dtype)
        for name, y, want in zip(model.layers, fast(*given), model(*given), strict=True):
            torch.testing.assert_close(y, want, rtol=close, atol=close, msg=lambda why, at=name: f"{at}: {why}")
    found = fastlinear.report(fast)
    assert len(products(found)) == 2 * len(model.layers)
    assert all(row.decision == "fast" and not row.elsewhere for row in products(found))
    assert len(found.graphs) == 2
    for graph in found.graphs:
        assert sum(node.why.startswith("FastExperts 'layers.") for node in graph.nodes) == 2 * len(model.layers)
    assert found.share is not None and found.share.fast_weights == found.share.weights


def _rows(x: Tensor, pairs: Tensor, up: Tensor) -> Tensor:
    return torch.bmm(up[pairs], x.repeat_interleave(TOP_K, dim=0).unsqueeze(-1)).squeeze(-1)


def _gated(y: Tensor) -> Tensor:
    gate, through = y.chunk(2, -1)
    return F.silu(gate) * through


def _down(y: Tensor, pairs: Tensor, down: Tensor) -> Tensor:
    return torch.bmm(down[pairs], y.unsqueeze(-1)).squeeze(-1)


def _sum(y: Tensor, weights: Tensor) -> Tensor:
    return (y * weights.reshape(-1).unsqueeze(-1)).view(*weights.shape, FEATURES).sum(dim=1)


def _spelled(x: Tensor, pairs: Tensor, weights: Tensor, up: Tensor, down: Tensor) -> Tensor:
    return _sum(_down(_gated(_rows(x, pairs, up)), pairs, down), weights)


def _read_twice(x: Tensor, pairs: Tensor, weights: Tensor, up: Tensor, down: Tensor) -> Tensor:
    y = _down(_gated(_rows(x, pairs, up)), pairs, down)
    return _sum(y, weights) + y.mean()


def _written_to(x: Tensor, pairs: Tensor, weights: Tensor, up: Tensor, down: Tensor) -> Tensor:
    y = _rows(x, pairs, up)
    weights.mul_(0.5)
    return _sum(_down(_gated(y), pairs, down), weights)


def _other_gate(x: Tensor, pairs: Tensor, weights: Tensor, up: Tensor, down: Tensor) -> Tensor:
    gate, through = _rows(x, pairs, up).chunk(2, -1)
    return _sum(_down(F.softsign(gate) * through, pairs, down), weights)


def _other_experts(x: Tensor, pairs: Tensor, weights: Tensor, up: Tensor, down: Tensor) -> Tensor:
    return _sum(_down(_gated(_rows(x, pairs, up)), pairs.flip(0), down), weights)


def _norm_behind(x: Tensor, pairs: Tensor, weights: Tensor, up: Tensor, down: Tensor) -> Tensor:
    return _sum(F.layer_norm(_down(_gated(_rows(x, pairs, up)), pairs, down), (FEATURES,)), weights)


def _computed(x: Tensor, pairs: Tensor, weights: Tensor, up: Tensor, down: Tensor) -> Tensor:
    return _spelled(x, pairs, weights, up * 2, down)


Spelling = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]
LEFT: tuple[Spelling, ...] = (_read_twice, _written_to, _other_gate, _other_experts, _norm_behind, _computed)


class Spelled(nn.Module):
    def __init__(self, how: Spelling = _spelled) -> None:
        super().__init__()
        self.how = how
        self.gate_up_proj = nn.Parameter(torch.randn(COUNT, 2 * HIDDEN, FEATURES))
        self.down_proj = nn.Parameter(torch.randn(COUNT, FEATURES, HIDDEN))

    def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        return self.how(x, ids.reshape(-1), weights, self.gate_up_proj, self.down_proj)


@torch.no_grad()
def test_what_is_another_thing_is_left() -> None:
    """Products that somebody else reads, a write in between, another gate, other experts behind it, a norm, weights
    that are computed: no mixture, and what the model computes."""
    model = Layers({how.__name__: Spelled(how) for how in LEFT}).eval()
    x, ids, weights = routed(7)
    want = model(x, ids, weights.clone())
    fast = compiled(model)
    torch.testing.assert_close(fast(x, ids, weights.clone()), want)
    assert all(row.decision == "skipped" for row in products(fastlinear.report(fast)))


# How a graph is asked for, and the reason that experts then give.
ASKED: dict[str, tuple[dict[str, Any], str]] = {
    "excluded": ({"exclude": "layers.a"}, "it is excluded"),
    "filtered": ({"filter_fn": lambda module, name: name != "layers.a"}, "it is refused by filter_fn"),
    "calibrated": (
        {"quantize": fastlinear.Int8Static(fastlinear.calibrate(nn.Linear(4, 4), [torch.randn(2, 4)]))},
        "experts are not calibrated",
    ),
}


@pytest.mark.parametrize("why", ASKED)
@torch.no_grad()
def test_who_is_left_out_is_told(why: str) -> None:
    """Names and reasons are those of convert."""
    options, reason = ASKED[why]
    model, given = Layers({"a": Spelled()}).eval(), routed(7)
    fast = compiled(model, **options)
    torch.testing.assert_close(fast(*given), model(*given))
    (graph,) = fastlinear.report(fast).graphs
    assert [node.why for node in graph.nodes if node.op == "bmm"] == [reason, reason]


@torch.no_grad()
def test_precisions_are_those_of_convert() -> None:
    """A scheme gives the bits that converted experts give, and 16 bits what they do."""
    model, given = Layers({"a": Spelled()}).eval(), routed(7)
    mine: dict[str, Any]
    for mine in ({"quantize": fastlinear.Int8Dynamic()}, {"dtype": torch.bfloat16}):
        own = fastlinear.FastExperts(COUNT, FEATURES, HIDDEN, quantize=mine.get("quantize"), packed=mine.get("dtype"))
        own.load_state_dict(model.layers["a"].state_dict())
        assert torch.equal(compiled(model, **mine)(*given)[0], own.eval()(*given))


@torch.no_grad()
def test_weights_may_change_and_be_others() -> None:
    """New values are seen; blocks that are compiled one by one share a graph, and each keeps its own experts."""
    blocks, given = [Spelled().eval(), Spelled().eval()], routed(7)
    torch._dynamo.reset()
    graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    for block in blocks:
        block.compile(backend=backend, options={"tune": "off"})
    for _ in range(2):
        for block in blocks:
            torch.testing.assert_close(block(*given), block.forward(*given), rtol=1e-5, atol=1e-4)
            block.down_proj.mul_(1.5)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == graphs + 1
    for block in blocks:
        assert all(row.decision == "fast" for row in fastlinear.report(block))


@torch.no_grad()
def test_switched_off_is_stock(monkeypatch: pytest.MonkeyPatch) -> None:
    """FASTLINEAR_DISABLE leaves the graph's experts to torch, in the dtype of their weights."""
    model, given = Spelled().eval(), routed(7)
    fast = compiled(model, quantize=fastlinear.Int8Dynamic())
    assert not torch.allclose(fast(*given), model(*given), rtol=1e-5, atol=1e-4)
    monkeypatch.setenv("FASTLINEAR_DISABLE", "1")
    torch.testing.assert_close(fast(*given), model(*given), rtol=1e-5, atol=1e-4)


@pytest.mark.exhaustive
@torch.no_grad()
def test_a_whole_model() -> None:
    """A Mixtral that nobody converted is one graph, of whose weights all run fast, and explain knows its experts."""
    transformers = pytest.importorskip("transformers", reason="transformers is an optional dependency")
    sizes = {"hidden_size": FEATURES, "intermediate_size": HIDDEN, "num_hidden_layers": 1, "vocab_size": 50}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "num_local_experts": COUNT}
    model = transformers.MixtralForCausalLM(transformers.MixtralConfig(**sizes, **heads)).eval()
    ids = torch.arange(14).reshape(2, 7)
    fast = compiled(model)
    torch.testing.assert_close(fast(ids).logits, model(ids).logits, rtol=1e-5, atol=1e-5)
    found = fastlinear.report(fast, (ids,))
    assert found.share is not None and found.share.fast_weights == found.share.weights
    told = fastlinear.explain(fast, "model.layers.0.mlp.experts.down_proj")
    assert told.layer.decision == "fast" and told.layer.experts == COUNT
    assert not any(map(experts.is_fast_experts, model.modules()))
