"""The backend as torch.compile knows it: its name, its options, what recompiles, and parameters that change."""

import gc
import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import zygote
from torch import Tensor, nn

import fastlinear
from fastlinear.graph import operators
from fastlinear.graph.options import Options

from .test_graph_fusion import Net, check, compiled, nodes

ROOT = Path(__file__).resolve().parents[2]


def _three(m: Any, x: Tensor) -> Tensor:
    return torch.cat((m.a(x), m.b(x), m.c(x).relu()), -1)


def _run(fast: Any, model: nn.Module, x: Tensor, tolerance: float = 1e-5) -> None:
    with torch.no_grad():
        torch.testing.assert_close(fast(x), model(x), rtol=tolerance, atol=tolerance)


def test_the_name_works_without_an_import() -> None:
    """The entry point of the installed package makes backend="fastlinear" known to torch.compile before anybody imports
    it."""
    program = """
import sys, torch
model = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.ReLU()).eval()
assert "fastlinear" not in sys.modules and "fastlinear" in torch._dynamo.list_backends()
fast, x = torch.compile(model, backend="fastlinear", options={"tune": "off"}), torch.randn(2, 8)
with torch.no_grad():
    torch.testing.assert_close(fast(x), model(x))
import fastlinear
assert [row.activation.name for row in fastlinear.report(fast)] == ["relu"]
"""
    zygote.checked(program)


def test_a_graph_changes_no_other_model() -> None:
    """The first call of a converted model after the first graph of a process has its activation fused, as any other:
    nothing that the backend does patches nn.Module.__call__, which would have that call go round the layers' slots."""
    program = """
import torch, fastlinear
from torch import nn
model = nn.Sequential(nn.Linear(8, 8), nn.ReLU()).eval()
with torch.no_grad():
    torch.compile(model, backend="fastlinear", options={"tune": "off"})(torch.randn(2, 8))
    fast = fastlinear.convert(nn.Sequential(nn.Linear(8, 8), nn.SiLU()).eval(), tune="off")
    nn.functional.silu = None
    fast(torch.randn(2, 8))
"""
    zygote.checked(program, imported="fastlinear")


# name -> options, and what the message says beside
WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "unknown": ({"dtpye": torch.bfloat16}, "no option 'dtpye'; it has dtype, accumulate, quantize"),
    "freeze": ({"freeze": True}, "compile a frozen model"),
    "tune": ({"tune": "now"}, "'lazy', 'off' in a graph, but is 'now'"),
    "fuse": ({"fuse": 1}, "fuse must be True or False, but is 1"),
    "dtype": ({"dtype": torch.float64}, "dtype must be None"),
    "both": ({"dtype": torch.bfloat16, "quantize": fastlinear.Int8Dynamic()}, "not by both"),
    "quantize": ({"quantize": "int8"}, "quantize must be None or one of"),
    "include": ({"include": 3}, "include takes names"),
    "filter_fn": ({"filter_fn": "a"}, "filter_fn must be a function"),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_options(name: str) -> None:
    """An option that the backend does not know, or of a wrong kind, is named with what is allowed."""
    given, message = WRONG[name]
    with pytest.raises(torch._dynamo.exc.BackendCompilerFailed, match=message), torch.no_grad():
        compiled(Net(_three), **given)(torch.randn(2, 8))


def test_a_mode_is_refused() -> None:
    """Inductor's modes mean nothing here, and are not swallowed."""
    fast = torch.compile(Net(_three), backend=fastlinear.graph.backend, mode="max-autotune")
    with pytest.raises(torch._dynamo.exc.BackendCompilerFailed, match="mode='max-autotune' means nothing"):
        fast(torch.randn(2, 8))


def test_options_are_those_of_convert() -> None:
    """A model can be compiled with the words that it would be converted with, but for those of modules that no graph
    has."""
    known = set(inspect.signature(fastlinear.convert).parameters)
    assert set(Options._fields) == known - {"model", "inplace", "example_inputs", "embeddings"}


# options -> which of the layers a, b and c stay torch's, and a part of the reason
CHOICES: list[tuple[dict[str, Any], str, str]] = [
    ({"exclude": "a"}, "a", "it is excluded"),
    ({"include": ["a", "b"]}, "c", "not among the included"),
    ({"include": "?", "exclude": ["b"]}, "b", "it is excluded"),
    ({"exclude": nn.Linear}, "abc", "it is excluded"),
    ({"filter_fn": lambda layer, name: layer.out_features == 8}, "c", "refused by filter_fn"),
    ({"filter_fn": lambda layer, name: name != "a"}, "a", "refused by filter_fn"),
]


@pytest.mark.parametrize(("given", "left", "reason"), CHOICES)
def test_layers_are_chosen_as_in_convert(given: dict[str, Any], left: str, reason: str) -> None:
    """include, exclude and filter_fn choose layers by the names that the model has for them."""
    told = [node for node in nodes(check(Net(_three), **given)) if node.op == "linear"]
    assert [node.outcome for node in told] == ["torch" if name in left else "fast" for name in "abc"]
    assert all(reason in node.why for node in told if node.outcome == "torch")


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.fc = nn.Embedding(20, 8), nn.Linear(8, 8)
        self.out, self.lm_head = nn.Linear(8, 20, bias=False), nn.Linear(8, 20)
        self.out.weight = self.embedding.weight

    def forward(self, ids: Tensor) -> Tensor:
        x = self.fc(self.embedding(ids)).relu()
        return self.out(x) + self.lm_head(x)


@pytest.mark.parametrize("given", [{"dtype": torch.bfloat16}, {"quantize": fastlinear.Int8Dynamic()}], ids=str)
def test_lossy_packs_are_explicit(given: dict[str, Any]) -> None:
    """Rounded to 16 or 8 bits is what was asked to be, and not a shared weight or an lm_head, unless it is named."""
    model, ids = Tied().eval(), torch.arange(6).reshape(2, 3)
    for more, expected in (({}, ["fast", "torch", "torch"]), ({"include": ["fc", "lm_head", "out"]}, ["fast"] * 3)):
        fast = compiled(model, **given, **more)
        _run(fast, model, ids, 0.05)
        told = [node for node in nodes(fast) if node.op == "linear"]
        assert [node.outcome for node in told] == expected
        assert all("is lossy" in node.why for node in told if node.outcome == "torch")
    (row, *_) = fastlinear.report(fast)
    assert row.dtype in ("float32 as bfloat16", "float32 as int8")


class Router(nn.Module):
    """As transformers has it: no linear layer, and a choice that rounding its weight may change."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, 64))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight).softmax(-1)


class Mixed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc, self.gate, self.attention = nn.Linear(64, 64), Router(), nn.MultiheadAttention(64, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = F.linear(self.fc(x), self.fc.weight)
        return self.attention(x, x, x, need_weights=False)[0].mean(-1, keepdim=True) * self.gate(x)


@pytest.mark.parametrize(
    "given",
    [{"dtype": torch.bfloat16}, {"quantize": fastlinear.Int8Dynamic()}, {"quantize": fastlinear.Int4WeightOnly()}],
    ids=str,
)
def test_what_convert_leaves_stays(given: dict[str, Any]) -> None:
    """A router's weight is rounded by neither, unless it is named; by both the weights of linear layers and attention
    are, whoever calls them, and no pack of the weight's own format is lossy."""
    model, x = Mixed().eval(), torch.randn(3, 64)
    fast = fastlinear.convert(model, **given)
    converted = [name for name, module in fast.named_modules() if isinstance(module, fastlinear.FastLinear)]
    assert converted == ["fc", "attention.in_proj", "attention.out_proj"]
    for more, left in (({}, ["Router"]), ({"include": ["fc", "gate", "attention"]}, [])):
        graph = compiled(model, **given, **more)
        _run(graph, model, x, 0.3)
        told = [node.why for node in nodes(graph) if node.op == "linear" and node.outcome == "torch"]
        assert [why.split(",")[0].split()[-1] for why in told] == left
    graph = compiled(model)
    _run(graph, model, x)
    assert all(node.outcome == "fast" for node in nodes(graph) if node.op == "linear")


def test_calibrated_layers_are_static() -> None:
    """Int8Static finds each layer's range by its name; what the calibration does not know stays torch's."""
    model, x = Net(lambda m, x: m.c(m.a(x).relu())), torch.randn(40, 8)
    calibration = fastlinear.calibrate(model, [x])
    fast = compiled(model, quantize=fastlinear.Int8Static(calibration))
    _run(fast, model, x, 0.05)
    assert [layer[0].precision.scheme for layer in fastlinear.report(fast).graphs[0].layers] == ["static", "static"]


def test_batch_and_sequence_are_dynamic() -> None:
    """Torch's own two recompilations, of a batch and of a sequence that is not always the same, and no more."""
    model = Net(lambda m, x: (m.a(x).relu() + m.b(x)).unflatten(-1, (2, 4)).transpose(1, 2))
    fast = compiled(model)
    for shape in ((1, 3), (2, 3), (5, 3), (4, 7), (3, 9), (6, 2), (7, 11), (2, 64)):
        _run(fast, model, torch.randn(*shape, 8))
    graphs = fastlinear.report(fast).graphs
    assert len(graphs) <= 3
    assert len({id(layer) for graph in graphs for layer, _ in graph.layers}) == 2, "graphs share their layers"


def _optimizer(model: nn.Module, **options: Any) -> None:
    with torch.enable_grad():
        model(torch.randn(4, 8)).pow(2).sum().backward()
    torch.optim.Adam(model.parameters(), lr=0.1, **options).step()


def _others(model: nn.Module) -> dict[str, Tensor]:
    return {name: torch.randn_like(t) for name, t in model.state_dict().items()}


def _double(model: nn.Module) -> None:
    for parameter in model.parameters():
        parameter.data = parameter.data * 2


def _through_data(model: nn.Module) -> None:
    for parameter in model.parameters():
        parameter.data.mul_(-1)


def _new_parameters(model: nn.Module) -> None:
    for layer in (model.a, model.b, model.c):
        layer.weight = nn.Parameter(torch.randn_like(layer.weight))
        layer.bias = nn.Parameter(torch.randn_like(layer.bias))


CHANGES: dict[str, Callable[[nn.Module], Any]] = {
    "optimizer": _optimizer,
    "fused optimizer": lambda model: _optimizer(model, fused=True),
    "load_state_dict": lambda model: model.load_state_dict(_others(model)),
    "assign": lambda model: model.load_state_dict(_others(model), assign=True),
    "data": _double,
    "through data": _through_data,
    "new parameters": _new_parameters,
    "one bias": lambda model: model.b.bias.data.add_(3),
}


@pytest.mark.parametrize("name", CHANGES)
def test_parameters_may_change(name: str) -> None:
    """No answer is stale: not a layer's, nor a group's, whatever changed which of its parameters."""
    model, x = Net(_three), torch.randn(4, 8)
    fast = compiled(model)
    _run(fast, model, x)
    for _ in range(3):
        CHANGES[name](model)
        _run(fast, model, x)
        _run(fast, model, x)
    assert len(fastlinear.report(fast).graphs) == 1


def test_one_graph_of_many_modules() -> None:
    """Blocks that are compiled one by one share a graph, and each has its own packed weights in it."""
    blocks = nn.ModuleList([Net(_three) for _ in range(4)])
    for block in blocks:
        block.compile(backend=fastlinear.graph.backend, options={"tune": "off"})
    x = torch.randn(4, 8)
    with torch.no_grad():
        for _ in range(3):
            for block in blocks:
                torch.testing.assert_close(block(x), block.forward(x))
    assert len(fastlinear.report(blocks).graphs) == 1


def test_a_layer_goes_with_its_graph() -> None:
    """Packed weights do not outlive what was compiled."""
    gc.collect()
    before = len(operators._known)
    fast = check(Net(_three))
    assert len(operators._known) == before + 3
    del fast
    torch._dynamo.reset()
    gc.collect()
    assert len(operators._known) == before


@pytest.mark.parametrize("inside", [False, True])
def test_autocast(inside: bool) -> None:
    """Under autocast, around the call or within the model, products are bf16 as they would be without the backend."""

    def forward(m: Any, x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=inside):
            return m.a(x).relu() + m.b(x)

    model, x = Net(forward if inside else lambda m, x: m.a(x).relu() + m.b(x)), torch.randn(4, 8)
    fast = compiled(model)
    with torch.autocast("cpu", torch.bfloat16, enabled=not inside), torch.no_grad():
        y, want = fast(x), model(x)
    assert y.dtype is want.dtype is torch.bfloat16
    torch.testing.assert_close(y, want, rtol=0.02, atol=0.02)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_other_dtypes(dtype: torch.dtype) -> None:
    """A dtype without kernels stays torch's, with the reason; 16 bits run natively."""
    model, x = Net(_three).to(dtype), torch.randn(4, 8).to(dtype)
    fast = compiled(model)
    _run(fast, model, x, 0.03 if dtype.itemsize == 2 else 1e-9)
    told = {node.outcome for node in nodes(fast) if node.op == "linear"}
    assert told == ({"torch"} if dtype is torch.float64 else {"fast"})


def test_computed_weights_stay() -> None:
    """A weight that the graph computes is not packed in each call."""
    model = Net(lambda m, x: torch.nn.functional.linear(x, m.a.weight * 2, m.a.bias))
    (_, node) = nodes(check(model))
    assert (node.outcome, node.why) == ("torch", "its weight is no parameter of a module")


def test_the_report_has_weights_of_no_layer() -> None:
    """A weight that a graph multiplies by has its row, and counts as fast, whoever holds it: a router, attention, whose
    heads count, too."""
    model, x = Mixed().eval(), torch.randn(2, 3, 64)
    fast = compiled(model)
    with torch.no_grad():
        fast(x)
    found = fastlinear.report(fast, x)
    rows = {row.name: (row.out_features, row.decision) for row in found}  # the last is one product
    assert rows == {"fc": (64, "fast"), "attention.out_proj": (64, "fast"), "(attention, gate)": (3 * 64 + 4, "fast")}
    assert found.share is not None and found.share.weights == found.share.fast_weights == (1 + 4) * 64**2 + 4 * 64
    attended = 2 * 3 * 4 * (2 * 2 * 16)  # two products of 3 x 4 heads of two rows
    assert found.share.fast_multiply_adds == 6 * found.share.weights + attended


class Own(nn.Module):
    """Holds the weights that it multiplies by itself."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Parameter(torch.randn(8, 8)) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        q, k = (torch.nn.functional.linear(x, each) for each in (self.q, self.k))
        return torch.nn.functional.linear(q.cumsum(-1) * k.cumsum(-1), self.v)


def test_weights_of_the_model_itself_have_names() -> None:
    """Their own, alone and in a product of several."""
    fast, x = compiled(Own().eval()), torch.randn(4, 8)
    with torch.no_grad():
        fast(x)
    assert {row.name: row.decision for row in fastlinear.report(fast)} == {"(q, k)": "fast", "v": "fast"}
    assert "FastLinear 'v'" in {node.why for node in nodes(fast)}


def test_the_report_tells_of_every_node() -> None:
    """Each node has an outcome, and the printed report names what was fused into what, and what is torch's own."""
    model = Net(lambda m, x: m.drop(m.a(x).relu()) + m.b(x).mean(-1, keepdim=True))
    fast = check(model)
    found = fastlinear.report(fast)
    assert [(node.op, node.outcome) for node in found.graphs[0].nodes] == [
        ("linear", "fast"), ("relu", "fused"), ("dropout", "dropped"),
        ("linear", "fast"), ("mean", "torch"), ("add", "fused"),
    ]  # fmt: skip
    text = str(found)
    assert "graph of 6 nodes: 2 fast, 2 fused, 1 dropped, 1 torch" in text
    assert "1 relu: fused, into linear" in text and "torch's own: 1 mean" in text
    assert fastlinear.report(model).graphs == found.graphs
    (row,) = fastlinear.report(compiled(nn.Linear(2, 2)))
    assert row.reason == "no compiled graph runs it fast"
    assert fastlinear.report(nn.Linear(2, 2)).graphs == ()
