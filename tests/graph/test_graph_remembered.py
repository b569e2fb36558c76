"""Values that weights, buffers and sizes decide are kept from call to call, and follow every change of what decides."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .test_graph_fusion import check, compiled, nodes

KEPT = "it is kept as long as the weights, buffers and sizes that decide it stay"


class Embedded(nn.Module):
    """`forward` of a function of the module and x [batch, length, 8], with an embedding and positions to look up."""

    def __init__(self, function: Callable[[Any, Tensor], Any]) -> None:
        super().__init__()
        self.a, self.places = nn.Linear(8, 8), nn.Embedding(40, 8)
        self.register_buffer("positions", torch.arange(40)[None])
        self.register_buffer("factors", torch.rand(8))
        self.function = function
        self.eval()

    def forward(self, x: Tensor) -> Any:
        return self.function(self, x)


def _placed(m: Any, x: Tensor) -> Tensor:
    y: Tensor = m.a(x + m.places(m.positions[:, : x.shape[1]]))
    return y


def kept(model: nn.Module) -> list[str]:
    return [node.op for node in nodes(model) if node.outcome == "dropped" and node.why == KEPT]


CASES: dict[str, tuple[Callable[[Any, Tensor], Any], list[str]]] = {
    "positions": (_placed, ["getitem", "embedding"]),
    "a buffer of numbers": (lambda m, x: m.a(x) * m.factors.cos(), ["cos"]),
    "a chain of two": (lambda m, x: (m.a(x) + (f := m.factors * 2)).sin() * (f + 1), ["mul", "add"]),
    "of a constant, too": (lambda m, x: m.a(x) * (torch.arange(8) * m.factors), ["mul"]),
    "for torch's own": (lambda m, x: F.celu(m.a(x)) * (m.factors + 1), ["add"]),
    "a bias of attention": (
        lambda m, x: F.scaled_dot_product_attention(
            *(m.a(x).view(2, 5, 1, 8).transpose(1, 2),) * 3,
            attn_mask=(m.places(torch.arange(5)[:, None] - torch.arange(5) + 5) * 2)[..., 0][None, None],
        ),
        ["embedding", "mul", "getitem", "getitem"],
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_what_weights_and_buffers_decide_is_kept(name: str) -> None:
    """The same answer as the model's, in the first call and in those that find the value kept; not without `fuse`."""
    forward, ops = CASES[name]
    model, x = Embedded(forward), torch.randn(2, 5, 8)
    fast = check(model, x)
    assert kept(fast) == ops
    with torch.inference_mode():
        for _ in range(2):
            torch.testing.assert_close(fast(x + 1), model(x + 1))
    assert not kept(check(model, x, fuse=False))


def _step(m: Embedded) -> None:
    optimizer = torch.optim.Adam(m.parameters(), lr=0.5, fused=True)
    for p in m.parameters():
        p.grad = torch.ones_like(p)
    optimizer.step()


CHANGES: dict[str, Callable[[Embedded], Any]] = {
    "in place": lambda m: m.places.weight.mul_(3),
    "by data": lambda m: m.places.weight.data.mul_(3),
    "other data": lambda m: setattr(m.places.weight, "data", torch.randn(40, 8)),
    "another parameter": lambda m: setattr(m.places, "weight", nn.Parameter(torch.randn(40, 8))),
    "a state dict": lambda m: m.load_state_dict({"places.weight": torch.randn(40, 8)}, strict=False),
    "assigned": lambda m: m.load_state_dict(copy.deepcopy(Embedded(_placed).state_dict()), assign=True),
    "a fused optimizer": _step,
    "a buffer in place": lambda m: m.positions.copy_(m.positions.flip(1)),
    "another buffer": lambda m: setattr(m, "positions", m.positions.flip(1)),
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_change_of_what_decides_is_followed(name: str) -> None:
    """After any dense change of a weight or a buffer the answer is that of the model as it is now."""
    model, x = Embedded(_placed), torch.randn(2, 5, 8)
    fast = check(model, x)
    with torch.no_grad():
        before = fast(x)
        CHANGES[name](model)
        torch.testing.assert_close(fast(x), model(x))
        assert not torch.equal(fast(x), before)
        torch.testing.assert_close(fast(x), model(x))


def test_sizes_that_change_are_followed() -> None:
    """With dynamic lengths a value is kept for each, for the last of them."""
    model = Embedded(_placed)
    fast = compiled(model)
    with torch.no_grad():
        for length in [3, 4, 5, 3, *range(6, 20), 3, 4]:
            x = torch.randn(2, length, 8)
            torch.testing.assert_close(fast(x), model(x))
    assert "embedding" in kept(fast)


def _counted(m: Any, x: Tensor) -> Any:
    m.factors.add_(1)
    return m.a(x) * (m.factors * 2)


def _counted_by_a_view(m: Any, x: Tensor) -> Any:
    y = m.a(x) * (m.factors * 2)
    m.factors[2:].add_(1)
    return y


COMPUTED: dict[str, Callable[[Any, Tensor], Any]] = {
    "a buffer is written to": _counted,
    "a view of it is": _counted_by_a_view,
    "it is returned": lambda m, x: (m.a(x), m.factors * 2),
    "a view of it is returned": lambda m, x: (m.a(x) * (f := m.factors * 2), f[2:]),
    "it is written to": lambda m, x: m.a(x) * (m.factors * 2).add_(x[0, 0]),
    "of the input": lambda m, x: m.a(x) * (m.factors + x),
    "only viewed": lambda m, x: m.a(x) * m.factors[None],
    "rows are renormed": lambda m, x: m.a(x) + F.embedding(m.positions[0, :5], m.places.weight, max_norm=0.1),
}


@pytest.mark.parametrize("name", COMPUTED)
def test_what_others_may_write_to_is_computed_in_each_call(name: str) -> None:
    """Nor is what reads what the graph writes to, nor a view, which costs nothing."""
    model = Embedded(COMPUTED[name])
    ours, theirs = model, copy.deepcopy(model)
    fast, x = compiled(ours), torch.randn(2, 5, 8)
    with torch.no_grad():
        for _ in range(3):
            got, want = fast(x), theirs(x)
            torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
            if isinstance(got, tuple):
                got[1].fill_(7)
    assert not kept(fast)


def test_indices_that_take_all_are_views() -> None:
    """mask[arange(batch)[:, None, None], arange(length)] is mask[:, None, :], and what is true everywhere masks
    nothing; indices of a part stay."""

    def masked(m: Any, x: Tensor) -> Tensor:
        whole = m.mask[torch.arange(2)[:, None, None], (torch.arange(8) + 0)[None, None, :]]
        true = torch.ones((5, 8), dtype=torch.bool)
        y: Tensor = m.a(x).masked_fill(true & whole, 0.0)
        return y + m.mask[torch.arange(1)[:, None, None], torch.arange(8)[None, None, :]]

    model = Embedded(masked)
    model.register_buffer("mask", torch.rand(2, 8) < 0.5)
    fast = check(model)
    why = [node.why for node in nodes(fast)]
    assert why.count("a view: its indices take all there is") == 1
    assert why.count("a view: the other mask is true everywhere") == 1
    with torch.no_grad():
        model.mask.logical_not_()
        x = torch.randn(2, 5, 8)
        torch.testing.assert_close(fast(x), model(x))
