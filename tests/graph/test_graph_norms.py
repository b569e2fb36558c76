"""Norms of a graph: absorbed with the sum before them, and left alone where that would be wrong."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from .test_graph_fusion import Net, check, nodes


def _ln(m: Any, x: Tensor) -> Tensor:
    return F.layer_norm(x, (8,), m.weight, m.a.bias)


# name -> the forward, and what is told of its norm and, in part, of its sum
TAKEN: dict[str, tuple[Callable[[Any, Tensor], Any], str, str]] = {
    "alone": (_ln, "LayerNorm of our own", ""),
    "rms_norm": (lambda m, x: F.rms_norm(x, (8,), m.weight, 1e-6), "RMSNorm of our own", ""),
    "no weight": (lambda m, x: F.layer_norm(x, (8,)) * m.weight, "LayerNorm of our own", ""),
    "after a product": (lambda m, x: _ln(m, m.a(x)), "in the memory of linear", ""),
    "a sum": (lambda m, x: _ln(m, x + x.tanh()), "LayerNorm of our own", "fused into layer_norm"),
    "a kept sum": (lambda m, x: (_ln(m, s := x + x.tanh()), s), "LayerNorm of our own", "which hands the sum on"),
    "twice itself": (lambda m, x: _ln(m, x + x), "LayerNorm of our own", "fused into layer_norm"),
    "broadcast": (lambda m, x: _ln(m, x + m.weight), "LayerNorm of our own", "torch"),
    "scaled sum": (lambda m, x: _ln(m, torch.add(x, x.tanh(), alpha=2)), "LayerNorm of our own", "torch"),
    "read twice": (lambda m, x: (_ln(m, y := m.a(x)), y.relu()), "LayerNorm of our own", ""),
    "viewed": (lambda m, x: (_ln(m, y := m.a(x)), y.flatten()), "LayerNorm of our own", ""),
    "two axes": (lambda m, x: F.layer_norm(x, (5, 8)) * m.weight, "over more than the last axis", ""),
    "fp64": (lambda m, x: F.layer_norm(x.double(), (8,)) * m.weight, "no fp32, bf16 or fp16", ""),
}


@pytest.mark.parametrize("name", TAKEN)
def test_norms(name: str) -> None:
    """Each is computed as it was, and the report says how."""
    forward, told, summed = TAKEN[name]
    found = nodes(check(Net(forward)))
    (norm,) = [node for node in found if node.op in ("layer_norm", "rms_norm")]
    assert told in norm.why and norm.outcome == ("fast" if "our own" in norm.why else "torch")
    assert ("memory" in norm.why) == ("memory" in told)
    for node in found:
        assert node.op != "add" or summed in f"{node.outcome} {node.why}"


def test_writes_keep_a_sum_where_it_is() -> None:
    """A sum is not moved over a node that writes, nor is the norm."""

    def forward(m: Any, x: Tensor) -> Any:
        s = x + x.tanh()
        x.mul_(2)
        return _ln(m, s) + x

    found = nodes(check(Net(forward)))
    assert next(node.outcome for node in found if node.op == "add") == "torch"


def test_nothing_is_fused_where_that_is_not_wanted() -> None:
    """fuse=False leaves norms and sums to torch."""
    found = nodes(check(Net(lambda m, x: _ln(m, x + x.tanh())), fuse=False))
    assert {node.outcome for node in found} == {"torch"}
