"""Rows of a parameter as weights: linear layers in any spelling, packed once, and followed like any parameter."""

import copy
import gc
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fastlinear
from fastlinear.graph import backend, operators
from fastlinear.graph.parts import Piece, function
from fastlinear.model.rows import NodeReport

Forward = Callable[[Any, Tensor], Any]


class Packed(nn.Module):
    """Three layers of 8 in one parameter, as nn.MultiheadAttention has them; `forward` of a function."""

    def __init__(self, function: Forward) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(24, 8)), nn.Parameter(torch.randn(24))
        self.function = function
        self.eval()

    def forward(self, x: Tensor) -> Any:
        return self.function(self, x)


class Holder(nn.Module):
    def __init__(self, function: Forward) -> None:
        super().__init__()
        self.inner = Packed(function)
        self.eval()

    def forward(self, x: Tensor) -> Any:
        return self.inner(x)


def compiled(model: Any, **options: Any) -> Any:
    torch._dynamo.reset()
    return torch.compile(model, backend=backend, fullgraph=True, options={"tune": "off"} | options)


def agree(fast: Any, model: nn.Module, x: Tensor) -> None:
    with torch.no_grad():
        torch.testing.assert_close(fast(x), model(x), rtol=1e-5, atol=1e-5)


def check(model: nn.Module, **options: Any) -> Any:
    fast = compiled(model, **options)
    agree(fast, model, torch.randn(4, 8))
    return fast


def nodes(fast: Any, *ops: str) -> list[NodeReport]:
    return [node for graph in fastlinear.report(fast).graphs for node in graph.nodes if node.op in ops]


def _crossed(m: Any, x: Tensor) -> Tensor:
    """As F.multi_head_attention_forward cuts its weight: a third for the query, two for key and value."""
    (wq, wkv), (bq, bkv) = m.weight.split([8, 16]), m.bias.split([8, 16])
    return F.linear(F.linear(x, wq, bq).relu(), wkv, bkv)


def _thirds(m: Any, x: Tensor) -> Tensor:
    (a, b, c), (p, q, r) = m.weight.chunk(3), m.bias.chunk(3)
    return torch.cat([F.linear(x, a, p), F.linear(x, b, q), F.linear(x.relu(), c, r)], -1)


SPELLED: dict[str, tuple[Forward, set[str]]] = {
    "split": (_crossed, {"[0:8]", "[8:24]"}),
    "chunk": (_thirds, {"(weight[0:8], weight[8:16])", "[16:24]"}),
    "torch.split": (lambda m, x: F.linear(x, torch.split(m.weight, 8)[1], torch.split(m.bias, 8)[1]), {"[8:16]"}),
    "unbind": (lambda m, x: F.linear(x, m.weight.unflatten(0, (3, 8)).unbind()[2]), {"[16:24]"}),
    "select": (lambda m, x: F.linear(x, m.weight.view(3, 8, 8).select(0, 1), m.bias[:8]), {"[8:16]"}),
    "narrow": (lambda m, x: F.linear(x, m.weight.narrow(0, 5, 3)), {"[5:8]"}),
    "slices": (lambda m, x: F.linear(x, m.weight[-4:], m.bias[-4:]), {"[20:24]"}),
    "a slice of a slice": (lambda m, x: F.linear(x, m.weight[4:, :][2:5]), {"[6:9]"}),
    "all rows": (lambda m, x: F.linear(x, m.weight[:], m.bias), {"[0:24]"}),
    "turned": (lambda m, x: x @ m.weight[:8].T, {"[0:8]"}),
    "turned, as addmm": (lambda m, x: torch.addmm(m.bias[:8], x, m.weight[8:16].t()), {"[8:16]"}),
    "as it is": (lambda m, x: torch.addmm(m.bias[:8], x, m.weight[8:16]), {"[8:16]"}),
}


@pytest.mark.parametrize("name", SPELLED)
def test_rows_of_a_parameter_are_weights(name: str) -> None:
    """However a model cuts them: its numbers, layers of these rows alone, a row of the report for each."""
    function, rows = SPELLED[name]
    fast = check(Holder(function))
    assert {node.outcome for node in nodes(fast, "linear", "matmul", "addmm")} == {"fast"}
    found = {row.name: row.decision for row in fastlinear.report(fast)}
    assert found == {f"inner.weight{each}" if each[0] == "[" else f"inner.{each}": "fast" for each in rows}


# What looks like rows and is none, or has other readers
OTHERS: dict[str, Forward] = {
    "columns": lambda m, x: F.linear(x[:, :4], m.weight[:, :4]),
    "every other row": lambda m, x: F.linear(x, m.weight[::2]),
    "a copy": lambda m, x: F.linear(x, m.weight[[0, 2]]),
    "other widths": lambda m, x: F.linear(x[:, :4], m.weight.view(48, 4)[:8]),
}


@pytest.mark.parametrize("name", OTHERS)
def test_other_views_stay_as_they_are(name: str) -> None:
    """They are multiplied by torch, with the reason."""
    fast = check(Packed(OTHERS[name]))
    assert [node.outcome for node in nodes(fast, "linear")] == ["torch"]


def test_as_many_rows_as_x_has_are_cut_in_each_call() -> None:
    """Sizes of inputs are no constants."""
    model = Packed(lambda m, x: F.linear(x, m.weight[: x.shape[0]]))
    torch._dynamo.reset()
    fast = torch.compile(model, backend=backend, fullgraph=True, dynamic=True, options={"tune": "off"})
    for rows in (4, 5):
        agree(fast, model, torch.randn(rows, 8))
    assert {node.outcome for node in nodes(fast, "linear")} == {"torch"}


def _written(m: Any, x: Tensor) -> Tensor:
    y = F.linear(x, m.weight[:8])
    m.weight[:4].mul_(2)
    return y + F.linear(x, m.weight[:8])


SHARED: dict[str, Forward] = {
    "written": _written,
    "returned": lambda m, x: (F.linear(x, m.weight[:8]), m.weight[:8]),
    "read by others": lambda m, x: F.linear(x, m.weight[:8]) + m.weight[:8].sum(),
}


@pytest.mark.parametrize("name", SHARED)
def test_rows_with_other_readers(name: str) -> None:
    """A product has rows of its own, and all others those that the model cuts, of the same memory."""
    model, x = Packed(SHARED[name]), torch.randn(4, 8)
    twin = copy.deepcopy(model)
    fast = compiled(model)
    with torch.no_grad():
        for _ in range(2):
            torch.testing.assert_close(fast(x), twin(x), rtol=1e-5, atol=1e-5)
            torch.testing.assert_close(model.weight, twin.weight)


def _others(model: nn.Module) -> dict[str, Tensor]:
    return {name: torch.randn_like(t) for name, t in model.state_dict().items()}


def _step(model: Any) -> None:
    with torch.enable_grad():
        model(torch.randn(4, 8)).pow(2).sum().backward()
    torch.optim.SGD(model.parameters(), lr=0.1).step()


def _moved(model: Any) -> None:
    for parameter in model.parameters():
        parameter.data = parameter.data * 2


CHANGES: dict[str, Callable[[Any], Any]] = {
    "an optimizer": _step,
    "load_state_dict": lambda model: model.load_state_dict(_others(model)),
    "assign": lambda model: model.load_state_dict(_others(model), assign=True),
    "data": _moved,
    "through data": lambda model: model.weight.data.mul_(-1),
    "one bias": lambda model: model.bias.data[9:10].add_(3),
    "one row": lambda model: model.weight.data[17].add_(3),
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_parameter_may_change(name: str) -> None:
    """No answer is stale, of a layer or of a group of rows."""
    model, x = Packed(_thirds), torch.randn(4, 8)
    fast = compiled(model)
    agree(fast, model, x)
    for _ in range(3):
        CHANGES[name](model)
        agree(fast, model, x)
        agree(fast, model, x)
    assert len(fastlinear.report(fast).graphs) == 1


def test_gradients_are_those_of_the_parameter() -> None:
    """Where gradients are wanted the graph is as it was; the next without them is fast."""
    model, x = Packed(_thirds), torch.randn(4, 8)
    fast = compiled(model)
    grads = []
    for each in (model, fast):
        model.zero_grad()
        each(x).sum().backward()
        grads.append((model.weight.grad, model.bias.grad))
    assert all(map(torch.equal, *grads))
    agree(fast, model, x)


def test_a_cut_that_wants_gradients_has_them() -> None:
    """A function whose guards were filtered out may be called with gradients after all."""
    parameter, cut = nn.Parameter(torch.randn(6, 2)), function([Piece(range(2)), Piece(range(2, 6))])
    with torch.no_grad():
        first = cut(parameter)
        assert all(a is b for a, b in zip(first, cut(parameter), strict=True)), "the same views"
    cut(parameter)[1].sum().backward()
    assert parameter.grad is not None and torch.equal(parameter.grad, torch.tensor([[0.0] * 2] * 2 + [[1.0] * 2] * 4))


def test_rows_are_packed_once_for_all_graphs() -> None:
    """Another graph of other shapes has the same layers, another module of one graph its own; they go with both."""
    gc.collect()
    before = len(operators._known)
    model, twin = Packed(_crossed), Packed(_crossed)
    fast = compiled(model, fuse=False)
    for rows in (4, 5, 6):
        agree(fast, model, torch.randn(rows, 8))
    graphs = fastlinear.report(fast).graphs
    assert len(graphs) == 2 and len(operators._known) == before + 2
    for each in (model, twin):
        each.compile(backend=backend, options={"tune": "off"})
        agree(each, copy.deepcopy(each).forward, torch.randn(4, 8))
    assert {row.name for row in fastlinear.report(twin)} == {"weight[0:8]", "weight[8:24]"}
    del fast, model, twin, each, graphs
    torch._dynamo.reset()
    gc.collect()
    assert len(operators._known) == before


def test_a_weight_counts_as_fast_once_all_its_rows_are() -> None:
    """Whatever layers, graphs and groups there are of it, and no more often than once."""
    for forward, share in ((_crossed, 24 * 8), (_thirds, 24 * 8), (lambda m, x: F.linear(x, m.weight[:20]), 0)):
        found = fastlinear.report(check(Packed(forward))).share
        assert found is not None and (found.weights, found.fast_weights) == (24 * 8, share)


def test_a_decoder_runs_on_packed_rows() -> None:
    """All weights of torch's decoder are fast, key and value of the memory in all layers as one product, and count
    once."""
    layer = nn.TransformerDecoderLayer(16, 2, 32, batch_first=True)
    model, given = nn.TransformerDecoder(layer, 2).eval(), (torch.randn(2, 5, 16), torch.randn(2, 7, 16))
    fast = compiled(model)
    with torch.no_grad():
        torch.testing.assert_close(fast(*given), model(*given), rtol=1e-5, atol=1e-5)
    found = fastlinear.report(fast, given)
    assert all(row.decision == "fast" for row in found) and len(found) == 13
    together = (f"layers.{i}.multihead_attn.in_proj_weight[{rows}]" for i in (0, 1) for rows in ("16:32", "32:48"))
    assert ", ".join(together) in {row.name for row in found}
    assert found.share is not None and found.share.fast_weights == found.share.weights
    linear = 2 * (2 * 5 * (6 * 16**2 + 2 * 16 * 32) + 2 * 7 * 2 * 16**2)
    attention = 2 * 2 * 2 * 16 * (5 * 5 + 5 * 7)
    assert found.share.fast_multiply_adds == linear + attention == found.share.multiply_adds
    told = str(fastlinear.explain(fast, "layers.0.multihead_attn.in_proj_weight[0:16]"))
    assert "16 x 16" in told


@pytest.mark.parametrize("given", [{}, {"quantize": fastlinear.Int8Dynamic()}])
def test_converted_attention_multiplies_what_it_reads(given: dict[str, Any]) -> None:
    """Attention to another sequence, converted and then compiled, takes a third of its projection for the query and two
    as one product for key and value, with the numbers of the converted model."""
    model = nn.TransformerDecoder(nn.TransformerDecoderLayer(16, 2, 32, batch_first=True), 1).eval()
    converted, sequences = fastlinear.convert(model, **given), (torch.randn(2, 5, 16), torch.randn(2, 7, 16))
    fast = compiled(converted)
    with torch.no_grad():
        torch.testing.assert_close(fast(*sequences), converted(*sequences), rtol=1e-4, atol=1e-4)
    found, of_weight = fastlinear.report(fast), "layers.0.multihead_attn.in_proj.weight"
    together = f"{of_weight.removesuffix('weight')}(weight[16:32], weight[32:48])"
    assert {f"{of_weight}[0:16]", together} <= {row.name for row in found}
    assert all(row.decision == "fast" for row in found)


def _but_the_second(a: Tensor, b: Tensor, c: Tensor, d: Tensor) -> Tensor:
    return torch.stack([a, c, d]).sum(0)


READ: dict[str, tuple[Any, list[int]]] = {  # what a function reads of layer(x), 8 columns; what is multiplied
    "halves of two": (lambda a, b: a.chunk(2, -1)[0] + b.chunk(2, -1)[1], [4, 4]),
    "a quarter and three": (lambda a, b: a.chunk(4, -1)[1] * _but_the_second(*b.chunk(4, 2)), [2, 6]),
    "one half": (lambda a, b: a.chunk(2, -1)[1] + b.chunk(2, -1)[1], [8]),  # of which there is no other
    "halves of rows": (lambda a, b: a.chunk(2, 1)[0] + b.chunk(2, 1)[1], [8]),
    "the whole, too": (lambda a, b: a.chunk(2, -1)[0] + b.chunk(2, -1)[1] + a.sum(), [8]),
}


@pytest.mark.parametrize("name", READ)
def test_columns_that_nobody_reads(name: str) -> None:
    """Pieces of a layer's output that nobody takes of one sequence are not computed of it, if they are of another."""
    read, wanted = READ[name]
    layer = nn.Linear(6, 8)
    model = Holder(lambda m, x: read(layer(x), layer(x.flip(0))))
    model.layer = layer
    fast, x = compiled(model), torch.randn(2, 4, 6)
    with torch.no_grad():
        torch.testing.assert_close(fast(x), model(x), rtol=1e-5, atol=1e-5)
    assert sorted(row.out_features for row in fastlinear.report(fast)) == sorted(wanted)


def test_attention_to_keys_of_another_width_counts_all_its_projections() -> None:
    """Its three weights run fast, and each by the rows that it reads."""
    model = nn.MultiheadAttention(16, 2, kdim=8, vdim=24, batch_first=True).eval()
    given = torch.randn(2, 5, 16), torch.randn(2, 7, 8), torch.randn(2, 7, 24)
    fast = compiled(model)
    with torch.no_grad():
        torch.testing.assert_close(fast(*given)[0], model(*given)[0], rtol=1e-5, atol=1e-5)
    found = fastlinear.report(fast, given).share
    assert found is not None and found.fast_weights == found.weights
    assert found.fast_multiply_adds == 2 * (5 * 2 * 16**2 + 7 * 16 * (8 + 24))


@pytest.mark.parametrize("given", [{"dtype": torch.bfloat16}, {"quantize": fastlinear.Int8Dynamic()}])
def test_rows_are_rounded_like_weights(given: dict[str, Any]) -> None:
    """Those of attention's weight as those of a layer; others only where users ask for it."""
    attention, memory = nn.MultiheadAttention(8, 2, batch_first=True).eval(), torch.randn(7, 8)
    model = Holder(lambda m, x: F.linear(attention(x, memory, memory, need_weights=False)[0], m.weight[:8]))
    model.attention = attention
    fast, x = compiled(model, **given), torch.randn(5, 8)
    with torch.no_grad():
        y, want = fast(x), model(x)
    assert (y - want).norm() < 0.02 * want.norm()
    told = nodes(fast, "linear")
    assert sorted(node.outcome for node in told) == ["fast"] * 4 + ["torch"]
    assert "no linear layer" in next(node.why for node in told if node.outcome == "torch")
