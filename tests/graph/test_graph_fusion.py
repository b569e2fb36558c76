"""What the backend fuses, and what it must not: each row of its tables, and each way for a fusion to be wrong."""

import copy
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fastlinear
from fastlinear._siblings import FrozenGroup
from fastlinear.graph import backend
from fastlinear.graph.composites import COMPOSITES
from fastlinear.graph.expansions import EXPANSIONS
from fastlinear.layer.frozen import is_frozen
from fastlinear.model.rows import NodeReport
from fastlinear.spec import activations
from fastlinear.spec.activations import Activation

OFF = {"tune": "off"}


def compiled(model: Any, **options: Any) -> Any:
    torch._dynamo.reset()
    return torch.compile(model, backend=backend, fullgraph=True, options=OFF | options)


def nodes(model: nn.Module) -> list[NodeReport]:
    return [node for graph in fastlinear.report(model).graphs for node in graph.nodes]


def outcomes(model: nn.Module, op: str) -> set[str]:
    found = {node.outcome for node in nodes(model) if node.op == op}
    assert found, f"no {op} among {[node.op for node in nodes(model)]}"
    return found


class Net(nn.Module):
    """`forward` of a function of the module and x, with layers of 8 features to use."""

    def __init__(self, function: Callable[[Any, Tensor], Any], width: int = 8) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(width, width), nn.Linear(width, width), nn.Linear(width, width * 3 // 2)
        self.drop, self.weight = nn.Dropout(0.5), nn.Parameter(torch.rand(8))
        self.function = function
        self.eval()

    def forward(self, x: Tensor) -> Any:
        return self.function(self, x)


def check(model: nn.Module, x: Tensor | None = None, **options: Any) -> Any:
    """The compiled model, which was run once and gave what the model gives, and left x as the model leaves it."""
    x = torch.randn(2, 5, 8) if x is None else x
    ours, theirs, fast = x.clone(), x.clone(), compiled(model, **options)
    with torch.no_grad():
        torch.testing.assert_close(fast(ours), model(theirs), rtol=1e-5, atol=1e-5)
    assert torch.equal(ours, theirs)
    return fast


# What models write in the place of a linear layer
SPELLED: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "@ T": lambda m, x: x @ m.a.weight.T,
    "@ mT": lambda m, x: x @ m.a.weight.mT,
    "matmul t": lambda m, x: torch.matmul(x, m.a.weight.t()),
    "mm": lambda m, x: torch.mm(x[0], m.a.weight.t()),
    "transpose": lambda m, x: x.matmul(m.a.weight.transpose(-1, -2)),
    "addmm t": lambda m, x: torch.addmm(m.a.bias, x[0], m.a.weight.t()),
    "addmm T": lambda m, x: torch.addmm(m.a.bias, x[0], m.a.weight.T),
    "addmm of a view": lambda m, x: m.a.bias.addmm(x.view(-1, 8), m.a.weight.mT).view(x.shape),
    "the bias after it": lambda m, x: x @ m.a.weight.T + m.a.bias,
    "@": lambda m, x: torch.matmul(x, m.a.weight),
    "@ and @ T": lambda m, x: x @ m.a.weight.T @ m.a.weight,
    "called twice": lambda m, x: (x @ m.a.weight.T).relu() @ m.a.weight.T,
}


@pytest.mark.parametrize("name", SPELLED)
@pytest.mark.parametrize("rounded", [False, True])
def test_products_by_a_turned_weight_are_linear_layers(name: str, rounded: bool) -> None:
    """x @ weight.T, and x @ weight, run on the pack of the weight, which is rounded as that of a layer would be, and
    takes what follows it."""
    model, x = Net(lambda m, x: SPELLED[name](m, x).relu()), torch.randn(2, 5, 8)
    fast = compiled(model, dtype=torch.bfloat16) if rounded else check(model)
    if rounded:
        with torch.no_grad():
            torch.testing.assert_close(fast(x), model(x), rtol=0.02, atol=0.02)
    views = ("getitem", "t", "transpose", "getattr", "view")
    told = {(node.outcome, node.op) for node in nodes(fast) if node.op not in views}
    assert {outcome for outcome, _ in told} == {"fast", "fused"} and ("fused", "relu") in told
    assert all(row.decision == "fast" for row in fastlinear.report(fast) if row.name.startswith("a"))


COMPUTED: dict[str, Callable[[Any], Tensor]] = {
    "a part": lambda m: torch.cat([m.b.bias[:4], torch.zeros(4)]),
    "a sum": lambda m: m.a.bias + m.b.bias,
    "one number": lambda m: m.a.bias[:1] * 2,
}


@pytest.mark.parametrize("name", COMPUTED)
def test_a_bias_that_is_computed_is_added(name: str) -> None:
    """timm's EVA-02 and Swin V2 put zeros between the biases of query and value: the product is fast all the same."""
    fast = check(Net(lambda m, x: F.linear(x, m.a.weight, COMPUTED[name](m)).relu()))
    assert outcomes(fast, "linear") == {"fast"} and outcomes(fast, "relu") == {"fused"}


def test_products_of_two_inputs_are_no_layers() -> None:
    """A transpose of what is no parameter, or of more dimensions, stays what it was."""
    model = Net(lambda m, x: x @ x.transpose(-1, -2) + (x[0] @ x[1].T).sum() + m.a(x).sum())
    assert outcomes(check(model), "matmul") == {"torch"}


@pytest.mark.parametrize("name", activations.names())
def test_activations_are_fused(name: str) -> None:
    """Every activation there is goes into the product before it."""
    params = activations.resolve(name).params  # type: ignore[union-attr]
    fast = check(Net(lambda m, x: activations.apply(activations.Activation(name, params), m.a(x))))
    told = [(node.outcome, node.why) for node in nodes(fast)]
    assert told[0] == ("fast", f"FastLinear 'a' with {name}")
    assert {*told[1:]} == {("fused", "into linear")}  # several nodes where torch has no function for it


SPELLINGS: dict[str, Callable[[Tensor], Tensor]] = {
    "method": lambda y: y.relu(),
    "in place": lambda y: y.relu_(),
    "inplace=True": lambda y: F.relu(y, inplace=True),
    "module": nn.SiLU(inplace=True),
    "tanh gelu": nn.GELU("tanh"),
    "parameters": lambda y: F.leaky_relu(y, 0.2),
    "keywords": lambda y: F.softplus(y, beta=2.0, threshold=15.0),
}


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_activations_in_any_spelling(spelling: str) -> None:
    """Functions, methods, modules, in place or not, with their parameters: one activation, fused."""
    fast = check(Net(lambda m, x: SPELLINGS[spelling](m.a(x))))
    assert sorted(node.outcome for node in nodes(fast)) == ["fast", "fused"]


@pytest.mark.parametrize("row", COMPOSITES, ids=lambda row: f"{row.name}, {row.form.__name__}")
def test_composites_are_one_call(row: Any) -> None:
    """Every composite is found where models spell it out, and is fused where it is an activation."""
    dtype = torch.bfloat16 if "16" in row.form.__name__ else torch.float32
    if row.name == "rms_norm":
        more = (dtype,) if "16" in row.form.__name__ else ()
        model = Net(lambda m, x: row.form(x, m.weight, 1e-5, *more)).to(dtype)
    else:
        model = Net(lambda m, x: row.form(m.a(x)))
    x = torch.randn(2, 5, 8).to(dtype)
    fast = compiled(model)
    with torch.no_grad():
        want = copy.deepcopy(model).float()(x.float()) if row.name != "rms_norm" else model(x).float()
        torch.testing.assert_close(fast(x).float(), want, rtol=0.02 if dtype is torch.bfloat16 else 1e-5, atol=1e-5)
    told = nodes(fast)
    assert not [node for node in told if not node.why], told
    assert row.name == "rms_norm" or [node.outcome for node in told].count("fused") == len(told) - 1


def _hooked(hook: Callable[..., Any]) -> nn.Module:
    model = Net(lambda m, x: m.a(x).relu())
    model.a.register_forward_hook(hook)
    return model


def _read_later(m: Any, x: Tensor) -> Tensor:
    y = m.a(x)
    view = y[0]
    return torch.relu_(y) + view


def _written_between(m: Any, x: Tensor) -> Tensor:
    y = m.a(x)
    x.mul_(2)
    return y.relu() + x


def _written_before(m: Any, x: Tensor) -> Tensor:
    y = m.a(x)
    y.add_(1)
    return y.relu()


def _residual_in_place(m: Any, x: Tensor) -> Tensor:
    residual = m.b(x)
    alias = residual.view(-1)
    residual += m.a(x)
    return alias.clone()


def _residual_written(m: Any, x: Tensor) -> Tensor:
    residual = x.clone()
    y = m.a(x)
    residual.mul_(2)
    return y + residual


def _alias_written(m: Any, x: Tensor) -> Tensor:
    residual = x.clone()
    alias, y = residual.view(-1), m.a(x)
    alias[0] = 7.0
    return y + residual


def _nine_steps(m: Any, x: Tensor) -> Tensor:
    y = m.a(x)
    for _ in range(4):
        y = y.sigmoid() * x
    return y.tanh()


# name -> a chain that becomes one call, and its program
CHAINS: dict[str, tuple[Callable[[Any, Tensor], Tensor], str]] = {
    "a residual": (lambda m, x: x + m.a(x), "add@0"),
    "relu of a residual": (lambda m, x: (m.a(x) + x).relu(), "add@0+relu"),
    "a mask and a residual": (lambda m, x: m.a(x) * (x > 0).float() + x, "mul@0+add@1"),
    "a row": (lambda m, x: m.a(x) * m.weight, "mul@0"),
    "a column": (lambda m, x: m.a(x) - x.mean(-1, keepdim=True), "sub@0"),
    "a number": (lambda m, x: m.a(x).div(4).minimum(x), "div+min@0"),
    "one of 16 bits": (lambda m, x: torch.maximum(m.a(x), x.bfloat16()), "max@0"),
    "a transposed one": (lambda m, x: m.a(x) + x.mT.contiguous().mT, "add@0"),
    "two activations": (lambda m, x: m.a(x).relu().tanh(), "relu+tanh"),
    "bounds": (lambda m, x: torch.clamp(m.a(x), max=0.25), "hardtanh"),
    "another product": (lambda m, x: m.a(x) + m.b(x.flip(0)), "add@0"),
    "two products that wait for another": (lambda m, x: m.b(m.a(x) + x) + x, "add@0"),
}


@pytest.mark.parametrize("name", CHAINS)
def test_chains_are_one_call(name: str) -> None:
    """Each chain goes whole into the product before it, in both orders of operands that commute."""
    function, program = CHAINS[name]
    fast = check(model := Net(function))
    with torch.no_grad():
        x = torch.randn(7, 3, 8)  # of dynamic sizes
        torch.testing.assert_close(fast(x), Net.forward(model, x), rtol=1e-5, atol=1e-5)
    found = [layer.activation for graph in fastlinear.report(fast).graphs for layer, _ in graph.layers]
    assert program in [None if each is None else each.name for each in found], found
    told = [node for node in nodes(fast) if node.op in ("add", "sub", "mul", "div", "minimum", "maximum", "clamp")]
    assert all(node.outcome == "fused" for node in told), told


def _gated(m: Any, x: Tensor) -> Tensor:
    gate, up = m.c(x).chunk(2, dim=-1)
    return F.silu(gate) * up


def test_gates_are_one_call() -> None:
    """One layer cut in two is one product, of a converted model, too; a gated layer absorbs what follows."""
    net = Net(_gated)
    for model in (net, Net(lambda m, x: _gated(m, x) + x.mean()), fastlinear.convert(copy.deepcopy(net))):
        fast = check(model)
        assert outcomes(fast, "chunk") == outcomes(fast, "mul") == {"fused"}
    check(fastlinear.convert(copy.deepcopy(net), freeze=True))
    net.c = fastlinear.FastGatedLinear.from_linear(net.c).eval()
    net.function = lambda m, x: m.c(x) * 2
    for _ in range(2):
        check(net)
        fastlinear.freeze(net)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("quantize", [None, fastlinear.Int8Dynamic()], ids=["plain", "int8"])
def test_gates_behind_what_they_open(bias: bool, quantize: Any) -> None:
    """x, gate = linear(...).chunk(2, -1) is one product with its gate, too, on the rows of the one weight."""
    net = Net(lambda m, x: (c := m.c(x).chunk(2, dim=-1))[0] * F.gelu(c[1]))
    net.c = nn.Linear(8, 12, bias)
    x = torch.randn(2, 5, 8)
    fast = compiled(net, quantize=quantize)
    with torch.no_grad():
        torch.testing.assert_close(fast(x), net(x), rtol=1e-5, atol=1e-5 if quantize is None else 0.05)
    assert outcomes(fast, "chunk") == {"dropped"} and outcomes(fast, "mul") == outcomes(fast, "gelu") == {"fused"}
    report = fastlinear.report(fast)
    (row,) = (row for row in report if row.name.startswith("c"))
    assert (row.decision, row.activation, row.out_features) == ("fast", Activation("geglu"), 6)
    (graph,) = report.graphs
    assert not any(node.outcome == "torch" for node in graph.nodes), graph.nodes


@pytest.mark.parametrize(
    "function",
    [
        lambda m, x: F.silu((c := m.c(x).chunk(2, -1))[1]) * c[0] + c[0],
        lambda m, x: F.silu((c := m.c(x).chunk(2, -2))[0]) * c[1][:, :2],
        lambda m, x: F.silu((c := m.c(x).chunk(3, -1))[0]) * c[1],
        lambda m, x: F.silu((c := m.c(x).chunk(2, -1))[0]) + c[1],
        lambda m, x: F.silu((c := m.c(x).chunk(2, -1))[0]) * c[1] + c[1],
        lambda m, x: F.silu((c := m.c(x).chunk(2, -1))[0]) * (s := c[1]) * s,
        lambda m, x: torch.tanh((c := m.c(x).chunk(2, -1))[0]) * c[1],
    ],
)
def test_what_is_no_gate(function: Any) -> None:
    """Other dimensions, sums, second uses, other functions."""
    fast = check(Net(function), torch.randn(2, 4, 8))
    assert outcomes(fast, "chunk") == {"torch"}


GATED: dict[str, tuple[Callable[[Any, Tensor], Any], bool]] = {
    "gate first": (lambda m, x: F.silu(m.a(x)) * m.b(x), True),
    "gate last": (lambda m, x: m.b(x) * F.silu(m.a(x)), True),
    "through first": (lambda m, x: (up := m.b(x)) * F.gelu(m.a(x), approximate="tanh") + 0 * up[:1, :1].sum(), False),
    "both": (lambda m, x: (up := m.b(x), F.relu(m.a(x)) * up)[1], True),
    "used next": (lambda m, x: m.a(torch.sigmoid(m.a(x)) * m.b(x)), True),
    "no gate": (lambda m, x: torch.tanh(m.a(x)) * m.b(x), False),
    "two activations": (lambda m, x: F.silu(m.a(x)) * F.silu(m.b(x)), False),
    "other x": (lambda m, x: F.silu(m.a(x)) * m.b(x + 1), False),
    "other widths": (lambda m, x: F.silu(m.a(x)[..., :1]) * m.c(x), False),
    "one layer": (lambda m, x: F.silu(m.a(x)) * m.a(x), False),
    "used twice": (lambda m, x: (up := m.b(x)) * F.silu(m.a(x)) + up, False),
    "gate used twice": (lambda m, x: (gate := F.silu(m.a(x))) * m.b(x) + gate, False),
    "sum": (lambda m, x: F.silu(m.a(x)) + m.b(x), False),
    "written between": (lambda m, x: ((gate := m.a(x)), x.mul_(2), F.silu(gate) * m.b(x))[2], False),
}


@pytest.mark.parametrize("name", GATED)
def test_two_layers_are_one_gate(name: str) -> None:
    """activation(gate(x)) * up(x) is one product on one pack, where nobody else reads or writes what is between."""
    function, together = GATED[name]
    fast = check(Net(function))
    assert any("one product of" in node.why for node in nodes(fast)) == together, nodes(fast)


@pytest.mark.parametrize("bias", [True, False])
def test_gates_follow_their_parameters(bias: bool) -> None:
    """In fp32, bf16 and int8, with biases and without: the pack is of both layers, follows what changes in either, and
    each layer answers for itself while they keep changing."""
    for given in ({}, {"dtype": torch.bfloat16}, {"quantize": fastlinear.Int8Dynamic()}):
        net, x = Net(lambda m, x: F.silu(m.a(x)) * m.b(x)), torch.randn(3, 8)
        net.a.bias = net.a.bias if bias else None
        net.b.bias = net.b.bias if bias else None
        fast = compiled(net, **given)
        with torch.no_grad():
            for factor in (1.0, 2.0, *[1.0] * 10, 0.5, 3.0):
                if factor != 1.0:
                    net.b.weight.mul_(factor)
                torch.testing.assert_close(fast(x), net(x), rtol=0.05 if given else 1e-5, atol=0.05 if given else 1e-5)
        found = fastlinear.report(fast)
        (row,) = (row for row in found if row.activation is not None)
        assert (row.name, row.out_features, row.activation) == ("(a, b)", 8, Activation("swiglu"))
        assert found.share.fast_weights == 2 * 8 * 8


def test_chains_of_converted_models() -> None:
    """A layer that was converted, frozen or built with operands absorbs what follows it."""
    net = Net(lambda m, x: m.a(x) + x)
    for frozen in (False, True):
        fast = check(fastlinear.convert(copy.deepcopy(net), freeze=frozen))
        assert outcomes(fast, "add") == {"fused"}
        layers = [layer for graph in fastlinear.report(fast).graphs for layer, _ in graph.layers]
        assert layers and all(is_frozen(layer) is frozen for layer in layers)  # no weight is unpacked for a graph
    net.a = fastlinear.FastLinear.from_linear(nn.Linear(8, 8), epilogue=("mul", "relu")).eval()
    net.function = lambda m, x: m.a(x, x) + m.weight
    fast = check(net)
    assert outcomes(fast, "add") == {"fused"}


# name -> the model, the op that stays torch's, and a part of the reason
ALONE: dict[str, tuple[Callable[[], nn.Module], str, str]] = {
    "second use": (lambda: Net(lambda m, x: (y := m.a(x)).relu() + y), "relu", "read by add, too"),
    "an output": (lambda: Net(lambda m, x: ((y := m.a(x)), y.relu())), "relu", "read by output, too"),
    "a view": (lambda: Net(lambda m, x: (y := m.a(x)).relu().flatten() * y.view(-1)), "relu", "too"),
    "a view read later": (lambda: Net(_read_later), "relu_", "read by"),
    "a hook's output": (lambda: _hooked(lambda m, i, o: o.flip(0)), "relu", ""),
    "a hook that adds a reader": (lambda: _hooked(lambda m, i, o: (o, o.mean())[0] + 0 * o.mean()), "relu", ""),
    "x is written to": (lambda: Net(_written_between), "relu", "writes to a tensor"),
    "y is written to": (lambda: Net(_written_before), "relu", "too"),
    "a residual in place": (lambda: Net(_residual_in_place), "iadd", ""),
    "nine steps": (lambda: Net(_nine_steps), "tanh", "has steps enough already"),
    "a second use of y": (lambda: Net(lambda m, x: (y := m.a(x)) + x + y), "add", ""),
    "y twice": (lambda: Net(lambda m, x: (y := m.a(x)) * y), "mul", ""),
    "a residual written to": (lambda: Net(_residual_written), "add", "writes to a tensor"),
    "a residual's alias written to": (lambda: Net(_alias_written), "add", "writes to a tensor"),
    "x - y": (lambda: Net(lambda m, x: x - m.a(x)), "sub", ""),
    "x / y": (lambda: Net(lambda m, x: x / m.a(x).sigmoid()), "div", ""),
    "a larger operand": (lambda: Net(lambda m, x: m.a(x) + x.new_ones(3, 1, 1, 1)), "add", ""),
    "a wider operand": (lambda: Net(lambda m, x: m.a(x) + x.new_ones(8, dtype=torch.float64)), "add", ""),
    "integers": (lambda: Net(lambda m, x: m.a(x) + torch.arange(8)), "add", ""),
    "alpha": (lambda: Net(lambda m, x: torch.add(m.a(x), x, alpha=2)), "add", ""),
    "floor": (lambda: Net(lambda m, x: torch.div(m.a(x), x, rounding_mode="floor")), "div", ""),
    "bounds that are tensors": (lambda: Net(lambda m, x: m.a(x).clamp(min=x)), "clamp", ""),
    "a sibling scaled": (lambda: Net(lambda m, x: (m.a(x) * 0.5) @ m.b(x).mT), "mul", ""),
    "a function unknown to the kernels": (lambda: Net(lambda m, x: F.celu(m.a(x))), "celu", ""),
}  # fmt: skip


@pytest.mark.parametrize("name", ALONE)
def test_what_is_not_proven_is_not_fused(name: str) -> None:
    """A second reader, a hook, a write or an alias keeps a node what it was; the linear layer is fast all the same."""
    make, op, reason = ALONE[name]
    fast = check(make())
    told = [node for node in nodes(fast) if node.op == op]
    assert told and all(node.outcome == "torch" and reason in node.why for node in told), told
    assert outcomes(fast, "linear") == {"fast"}


def test_fuse_false() -> None:
    """fuse=False packs the layers and leaves everything else."""
    fast = check(Net(lambda m, x: (m.a(x).relu(), m.b(x))), fuse=False)
    assert [node.outcome for node in nodes(fast)] == ["fast", "torch", "fast"]


def _cut(y: Tensor) -> Tensor:
    return y.view(2, 5, 2, -1).transpose(1, 2)


SIBLINGS: dict[str, tuple[Callable[[Any, Tensor], Any], bool]] = {
    "outputs": (lambda m, x: (m.a(x), m.b(x), m.c(x)), True),
    "heads": (lambda m, x: F.scaled_dot_product_attention(_cut(m.a(x)), _cut(m.b(x)), _cut(m.a(x) + 1)), False),
    "attention": (lambda m, x: F.scaled_dot_product_attention(_cut(m.a(x)), _cut(m.b(x)), _cut(m.c(x))), True),
    "flat views": (lambda m, x: (m.a(x).view(-1), m.b(x).view(10, 8)), True),
    "written to": (lambda m, x: (m.a(x).add_(1), m.b(x)), False),
    "written to later": (lambda m, x: ((y := m.a(x)), (z := m.b(x)), y.add_(1), z.mul_(y))[2:], True),
    "one with an activation": (lambda m, x: (m.a(x).relu(), m.b(x)), False),
    "another x": (lambda m, x: (m.a(x), m.b(x + 1)), False),
    "one layer twice": (lambda m, x: (m.a(x), m.a(x)), False),
}


@pytest.mark.parametrize("name", SIBLINGS)
def test_siblings(name: str) -> None:
    """Linear layers on one x are one product, where they are several, and nothing is written between them."""
    function, together = SIBLINGS[name]
    fast = check(Net(function))
    assert any("one product of" in node.why for node in nodes(fast)) == together, nodes(fast)


FROZEN_GROUPS: dict[str, tuple[Callable[[Any, Tensor], Any], bool]] = {
    "siblings": (lambda m, x: (m.a(x), m.b(x).relu(), m.c(x)), True),
    "a gate": (lambda m, x: F.silu(m.a(x)) * m.b(x), True),
    "a gate that is opened last": (lambda m, x: m.b(x) * F.silu(m.a(x)), True),
    "other x": (lambda m, x: (m.a(x), m.b(x + 1)), False),
    "a residual": (lambda m, x: (m.a(x) + x, m.b(x)), False),
}
FROZEN: dict[str, dict[str, Any]] = {
    "fp32": {},
    "bf16": {"dtype": torch.bfloat16},
    "int8": {"quantize": fastlinear.Int8Dynamic()},
    "int4": {"quantize": fastlinear.Int4Dynamic(group=16)},
    "int4, fp32 products": {"quantize": fastlinear.Int4WeightOnly(group=16)},
}


@pytest.mark.parametrize("form", FROZEN)
@pytest.mark.parametrize("name", FROZEN_GROUPS)
def test_frozen_layers_answer_in_one_call(name: str, form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Frozen layers on one x are one call, each on the pack that it has, with the bits that each has alone, on any
    number of rows and threads; and alone they are where somebody watches, or other parameters come."""
    monkeypatch.setenv("FASTLINEAR_AUTOTUNE", "0")
    function, together = FROZEN_GROUPS[name]
    net = fastlinear.convert(Net(function, width=48), freeze=True, **FROZEN[form])
    fast = compiled(net)
    with torch.inference_mode():
        for threads, rows in ((1, 1), (2, 1), (2, 128)):  # which 2 threads share
            torch.set_num_threads(threads)
            x = torch.randn(rows, 48)
            alone = fast(x)  # before there are plans
            torch.testing.assert_close(alone, net(x), rtol=1e-5, atol=1e-5)
            torch.testing.assert_close(fast(x), alone, rtol=0, atol=0)
    assert any(node.why.startswith("one call of") for node in nodes(fast)) == together
    graph = fastlinear.report(fast).graphs[0]
    groups = [each for layers in graph._products for each in layers.values() if isinstance(each, FrozenGroup)]
    assert bool(groups) == together
    for group in groups:
        x, given = torch.randn(1, 48), (*group.panels, *(layer.bias for layer in group.layers))
        with torch.inference_mode():
            assert group.answer(x, given) is not None  # not one by one, above
            assert group.answer(x[:, 1:], given) is None
            assert group.answer(x, (given[0].clone(), *given[1:])) is None
            assert group.answer(x, given[1:]) is None
            with torch.profiler.profile():
                assert group.answer(x, given) is None
        assert group.answer(x.requires_grad_(), given) is None
        monkeypatch.setenv("FASTLINEAR_DISABLE", "1")
        assert group.answer(torch.randn(1, 48), given) is None
        monkeypatch.delenv("FASTLINEAR_DISABLE")


@pytest.mark.parametrize("form", FROZEN)
def test_frozen_products_that_threads_share_keep_their_bits(form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A product among others has all threads where a call by itself would have one, and answers the same."""
    monkeypatch.setenv("FASTLINEAR_AUTOTUNE", "0")
    net = nn.Sequential(nn.Linear(640, 512), nn.SiLU(), nn.Linear(512, 640)).eval()
    net = fastlinear.convert(net, freeze=True, **FROZEN[form])
    fast, x = compiled(net), torch.randn(1, 640)
    ys = []
    with torch.inference_mode():
        for threads in (1, 2):
            torch.set_num_threads(threads)
            ys += [fast(x), fast(x), net(x)]
    assert all(torch.equal(y, ys[0]) for y in ys)


def test_outputs_of_siblings_are_tensors_of_their_own() -> None:
    """What leaves the graph is contiguous and shares no memory, as the layers' own outputs would."""
    fast = check(Net(lambda m, x: (m.a(x), m.b(x), m.c(x))))
    with torch.no_grad():
        ys = fast(torch.randn(2, 5, 8))
    assert all(y.is_contiguous() for y in ys)
    assert len({y.untyped_storage().data_ptr() for y in ys}) == 3


def test_a_group_has_one_pack() -> None:
    """The members of a group are packed once, together, and not each for itself."""
    fast = check(Net(lambda m, x: (m.a(x), m.b(x), m.c(x))))
    (row,) = fastlinear.report(fast)
    assert (row.name, row.in_features, row.out_features) == ("(a, b, c)", 8, 28)
    ((whole, weights),) = fastlinear.report(fast).graphs[0].layers
    assert len(weights) == 3 and whole.pack_nbytes == row.pack_mib * 2**20


@pytest.mark.parametrize("how", ["training", "dropout"])
def test_training_runs_the_plain_graph(how: str) -> None:
    """A model in training mode is torch's own, dropout and all, also without gradients."""
    model = Net(lambda m, x: m.drop(m.a(x)).relu())
    model.train() if how == "training" else model.drop.train()
    fast, x = compiled(model), torch.randn(2, 5, 8)
    with torch.no_grad():
        torch.manual_seed(1)
        want = model(x)
        torch.manual_seed(1)
        assert torch.equal(fast(x), want)
    (graph,) = fastlinear.report(fast).graphs
    assert graph.reason == "the model is in training mode" and not graph.layers


def test_gradients_run_the_plain_graph() -> None:
    """Where gradients are wanted the graph is as it was, and they are nn.Linear's."""
    model, x = Net(lambda m, x: m.a(x).relu()), torch.randn(2, 5, 8)
    fast = compiled(model)
    grads = []
    for each in (model, fast):
        model.zero_grad()
        each(x).sum().backward()
        grads.append(model.a.weight.grad)
    assert torch.equal(*grads)
    (graph,) = fastlinear.report(fast).graphs
    assert "gradients are wanted" in str(graph.reason)
    with torch.no_grad():
        torch.testing.assert_close(fast(x), model(x))
    assert len(fastlinear.report(fast).graphs) == 2


MASKS: dict[str, Callable[[], dict[str, Any]]] = {
    "none": dict,
    "causal": lambda: {"attn_mask": torch.triu(torch.ones(5, 5, dtype=torch.bool), 1), "is_causal": True},
    "added": lambda: {"attn_mask": torch.randn(5, 5)},
    "of every head": lambda: {"attn_mask": torch.randn(4, 5, 5)},
    "of keys": lambda: {"key_padding_mask": torch.arange(10).reshape(2, 5) > 7},
    "both": lambda: {
        "key_padding_mask": torch.arange(10).reshape(2, 5) > 7,
        "attn_mask": torch.triu(torch.ones(5, 5, dtype=torch.bool), 1),
    },
    "weights": lambda: {"need_weights": True},
    "weights, masked": lambda: {"need_weights": True, "attn_mask": torch.randn(5, 5)},
    "weights of heads": lambda: {"need_weights": True, "average_attn_weights": False},
}


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("name", MASKS)
def test_attention_is_spelled_out(name: str, batch_first: bool) -> None:
    """nn.MultiheadAttention's projections are fast, whatever its masks, and its numbers are its own; so is what is
    between them, unless the weights are wanted, in either order of batch and length."""
    given = {"need_weights": False} | MASKS[name]()
    attention = nn.MultiheadAttention(8, 2, batch_first=batch_first).eval()
    model = Net(lambda m, x: attention(x, x, x, **given))
    model.attention = attention
    x = torch.randn(2, 5, 8)
    fast = check(model, x if batch_first else x.transpose(0, 1).contiguous())
    assert [node.outcome for node in nodes(fast) if node.op == "linear"] == ["fast", "fast"]
    assert outcomes(fast, "multi_head_attention_forward") == {"dropped"}
    attends = [node.outcome for node in nodes(fast) if "attention:" in node.why]
    assert attends == ([] if given["need_weights"] else ["fast"])


@pytest.mark.parametrize("batch_first", [True, False])
def test_weights_that_nobody_reads(batch_first: bool) -> None:
    """nn.MultiheadAttention gives its weights unless it is told not to; where nobody takes them, it attends fast."""
    attention = nn.MultiheadAttention(8, 2, batch_first=batch_first).eval()
    model = Net(lambda m, x: x + attention(x, x, x)[0])
    model.attention = attention
    fast = check(model, torch.randn(2, 5, 8))
    assert [node.outcome for node in nodes(fast) if "attention:" in node.why] == ["fast"]
    assert outcomes(fast, "add") == {"fused"}


# How an attention is made, how it is called, how many products its projections are: four, or two where they are one.
ATTENTIONS: dict[str, tuple[dict[str, Any], dict[str, Any], int]] = {
    "to another": ({}, {}, 4),
    "to another, masked": ({}, {"attn_mask": torch.rand(4, 5, 7) > 0.7, "key_padding_mask": torch.rand(2, 7) > 0.7}, 4),
    "to another, added": ({}, {"attn_mask": torch.randn(5, 7), "need_weights": True}, 4),
    "to another, no bias": ({"bias": False}, {}, 4),
    "of other widths": ({"kdim": 6, "vdim": 10}, {"need_weights": True}, 4),
    "of other widths, masked": ({"kdim": 6, "vdim": 10}, {"attn_mask": torch.randn(4, 5, 7)}, 4),
    "of other widths, no bias": ({"kdim": 6, "vdim": 10, "bias": False}, {"key_padding_mask": torch.randn(2, 7)}, 4),
    "biases, itself": ({"add_bias_kv": True}, {"attn_mask": torch.randn(5, 5)}, 2),
    "a zero, itself": ({"add_zero_attn": True}, {"key_padding_mask": torch.rand(2, 5) > 0.7, "need_weights": True}, 2),
    "all": (
        {"add_bias_kv": True, "add_zero_attn": True, "kdim": 6, "vdim": 10},
        {"attn_mask": torch.randn(5, 7), "key_padding_mask": torch.randn(2, 7), "average_attn_weights": False},
        4,
    ),
    "one, itself": ({}, {"attn_mask": torch.rand(2, 5, 5) > 0.7}, 2),
    "one, to another": ({"kdim": 6, "vdim": 10}, {"key_padding_mask": torch.rand(7) > 0.7, "need_weights": True}, 4),
}


@pytest.mark.parametrize("name", ATTENTIONS)
def test_every_attention_is_spelled_out(name: str) -> None:
    """Whatever attention attends to, and however it is made: stock's numbers, and all projections fast, by whole
    weights or by rows of one."""
    how, given, fast_ones = ATTENTIONS[name]
    attention = nn.MultiheadAttention(8, 2, batch_first=True, **how).eval()
    for bias in (attention.in_proj_bias, attention.out_proj.bias):
        if bias is not None:
            nn.init.normal_(bias)
    shape = (7,) if name.startswith("one") else (2, 7)
    k, v = torch.randn(*shape, attention.kdim), torch.randn(*shape, attention.vdim)
    given = {"need_weights": False} | given
    itself = name.endswith("itself")
    model = Net(lambda m, x: attention(x, x if itself else k, x if itself else v, **given))
    model.attention = attention
    fast = check(model, torch.randn(*shape[:-1], 5, 8))
    assert outcomes(fast, "multi_head_attention_forward") == {"dropped"}
    assert [node.outcome for node in nodes(fast) if node.op == "linear"].count("fast") == fast_ones


@pytest.mark.costly
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("norm_first", [False, True])
@pytest.mark.parametrize("activation", ["relu", "gelu"])
def test_encoder_layers_are_spelled_out(activation: Any, norm_first: bool, masked: bool) -> None:
    """torch's fused encoder layer gives way to fast layers; what is not masked is what it was."""
    layer = nn.TransformerEncoderLayer(8, 2, 16, activation=activation, norm_first=norm_first, batch_first=True)
    model = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False).eval()
    padding = torch.arange(10).reshape(2, 5) > 7 if masked else None
    fast, x = compiled(model), torch.randn(2, 5, 8)
    with torch.no_grad():
        y, want = fast(x, src_key_padding_mask=padding), model(x, src_key_padding_mask=padding)
    seen = slice(None) if padding is None else ~padding
    torch.testing.assert_close(y[seen], want[seen], rtol=1e-5, atol=1e-5)
    assert len([node for node in nodes(fast) if node.outcome == "fast" and node.op == "linear"]) == 8
    assert outcomes(fast, "_transformer_encoder_layer_fwd") == {"dropped"} and math.isfinite(float(y.sum()))


def test_every_expansion_is_tested() -> None:
    """The table has the rows that stand above; a new one needs a test of its own."""
    found = {function.__name__ for function in EXPANSIONS}
    tested = {"multi_head_attention_forward", "_transformer_encoder_layer_fwd", "_native_multi_head_attention"}
    assert found == tested
