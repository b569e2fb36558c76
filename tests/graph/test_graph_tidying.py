"""What of a graph is dropped: values that nobody reads, and those that are the same in each call; and what never is."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fastlinear

from .test_graph_fusion import Net, check, compiled, nodes

UNREAD, SAME = "nobody reads it", "it is the same in each call"


def dropped(model: nn.Module, why: str) -> list[str]:
    return [node.op for node in nodes(model) if node.outcome == "dropped" and node.why == why]


def _first(m: Any, x: Tensor) -> Any:
    y = m.a(x)
    m.b(y[:, 0]).tanh()
    return y


def test_what_nobody_reads_is_not_computed() -> None:
    """A pooler whose value is not returned takes no time and no memory."""
    fast = check(Net(_first))
    assert dropped(fast, UNREAD) == ["getitem", "linear", "tanh"]
    rows = {row.name: row for row in fastlinear.report(fast)}
    assert rows["a"].reason is None and rows["b"].reason == "no compiled graph runs it fast"
    assert not dropped(check(Net(_first), fuse=False), UNREAD)


STAYS: dict[str, Callable[[Any, Tensor], Any]] = {
    "written": lambda m, x: (x.mul_(2), m.a(x))[1],
    "drawn": lambda m, x: (torch.rand(3), m.a(x))[1],
    "looked up": lambda m, x: (nn.functional.embedding(torch.tensor([3]), m.weight[:, None]), m.a(x))[1],
}


@pytest.mark.parametrize("name", STAYS)
def test_what_does_more_than_make_a_value_stays(name: str) -> None:
    """Writes are done, random numbers are drawn, indices are checked, whether or not somebody reads the value."""
    found = [node.outcome for node in nodes(check(Net(STAYS[name]))) if node.op in ("mul_", "rand", "embedding")]
    assert found == ["torch"]


CONSTANT: dict[str, tuple[Callable[[Any, Tensor], Any], list[str]]] = {
    "positions": (lambda m, x: m.a(x) * (torch.arange(8) + 1), ["arange", "add"]),
    "a mask": (
        lambda m, x: m.a(x).masked_fill((a := torch.arange(8))[None] > a[1:6, None], 0.0),
        ["arange", "getitem", "getitem", "gt"],
    ),
    "an index": (lambda m, x: m.a(x)[:, torch.arange(5) * 0], ["arange", "mul"]),
    "groups": (lambda m, x: m.a(x)[..., torch.arange(8) // 2], ["arange", "floordiv"]),
    "method": (lambda m, x: m.a(x) + torch.ones(8).new_ones(8), ["ones", "new_ones"]),
}


@pytest.mark.parametrize("name", CONSTANT)
def test_what_is_the_same_in_each_call_is_computed_once(name: str) -> None:
    """Values of no input are attributes of the graph; the answer is the same, also in later calls and in grad mode."""
    forward, ops = CONSTANT[name]
    model = Net(forward)
    x = torch.randn(2, 5, 8)
    fast = check(model, x)
    assert dropped(fast, SAME) == ops
    with torch.no_grad():
        torch.testing.assert_close(fast(x + 1), model(x + 1))
    assert not dropped(check(model, x, fuse=False), SAME)


def _written(m: Any, x: Tensor) -> Any:
    at = torch.arange(8)
    at[0] += 5
    return m.a(x) * (at + 1)


def _viewed(m: Any, x: Tensor) -> Any:
    y = torch.zeros(5, 8)
    y.view(-1).add_(x[0].flatten())
    return m.a(x) + y


CHANGING: dict[str, Callable[[Any, Tensor], Any]] = {
    "written": _written,
    "written by a view": _viewed,
    "returned": lambda m, x: (m.a(x) * (at := torch.arange(8.0)), at),
    "a view returned": lambda m, x: (m.a(x) * (at := torch.arange(8.0)), at[2:]),
    "of the input": lambda m, x: m.a(x) * (torch.arange(8) + x),
}


@pytest.mark.parametrize("name", CHANGING)
def test_what_is_written_or_handed_on_is_computed_in_each_call(name: str) -> None:
    """Whoever writes to what a call returned changes no later call, nor does the graph itself."""
    model = Net(CHANGING[name])
    fast, x = check(model), torch.randn(2, 5, 8)
    assert "arange" not in dropped(fast, SAME) or name == "of the input"
    with torch.no_grad():
        for _ in range(2):
            got, want = fast(x), model(x)
            torch.testing.assert_close(got, want)
            if isinstance(got, tuple):
                got[1].fill_(7)


def test_sizes_that_change_are_followed() -> None:
    """A length that is dynamic makes no constant."""
    model = Net(lambda m, x: m.a(x) * torch.arange(x.shape[1])[:, None])
    fast = compiled(model)
    with torch.no_grad():
        for length in (3, 4, 5, 6):
            x = torch.randn(2, length, 8)
            torch.testing.assert_close(fast(x), model(x))
