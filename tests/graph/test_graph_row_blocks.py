"""Two products that run block by block of rows: where they may, what they compute then, and where they must not."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import fastlinear
from fastlinear.plan import caches, row_blocks

from .test_graph_fusion import Net, check, compiled, nodes


@pytest.fixture
def cut(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """(rows of a call, rows of its blocks), of a machine of one thread whose caches are small."""
    found: list[tuple[int, int]] = []
    rule = row_blocks.rows

    def rows(m: int, *given: Any) -> int:
        found.append((m, rule(m, *given)))
        return found[-1][1]

    monkeypatch.setattr(caches, "l2", lambda: 1 << 12)
    monkeypatch.setattr(row_blocks, "rows", rows)
    return found


TAKEN: dict[str, Callable[[Any, Tensor], Any]] = {
    "activation": lambda m, x: m.b(F.gelu(m.a(x))),
    "nothing between": lambda m, x: m.b(m.a(x)),
    "residual": lambda m, x: x + m.b(m.a(x).relu()),
    "operand of the first": lambda m, x: m.b(m.a(x) * x),
    "operand for all rows": lambda m, x: m.b(m.a(x) * m.weight),
    "a number for each row": lambda m, x: m.b(m.a(x)) * x.sum(-1, keepdim=True),
    "wider": lambda m, x: m.c(F.silu(m.a(x))),
    "gate": lambda m, x: m.b(F.silu(m.a(x)) * F.linear(x, m.b.weight)),
    "norm after it": lambda m, x: F.layer_norm(x + m.b(m.a(x)), (8,)),
    "two pairs": lambda m, x: m.a(m.b(m.b(m.a(x)))),
}


@pytest.mark.parametrize("name", TAKEN)
def test_blocks_of_rows_give_what_all_rows_give(cut: list[tuple[int, int]], name: str) -> None:
    """Whatever the products take besides x; the last block is shorter."""
    fast = check(Net(TAKEN[name]), torch.randn(171, 8))
    assert {*cut} == {(171, 96)}
    assert any("block by block with linear" in node.why for node in nodes(fast))


def test_few_rows_go_at_once(cut: list[tuple[int, int]]) -> None:
    """The rule is not even asked; the same graph cuts many."""
    model = Net(TAKEN["residual"])
    fast = compiled(model)
    for m in (5, 6, 400):
        x = torch.randn(m, 8)
        with torch.no_grad():
            torch.testing.assert_close(fast(x), model(x), rtol=1e-5, atol=1e-5)
    assert cut == [(400, 80)]


LEFT: dict[str, Callable[[Any, Tensor], Any]] = {
    "read twice": lambda m, x: (m.b(y := m.a(x)), y.sin()),
    "its own operand": lambda m, x: m.b(y := m.a(x)) + y,
    "an operand of few rows": lambda m, x: m.b(m.a(x)) + x[:1],
    "a write between": lambda m, x: (y := m.a(x), x.mul_(2), m.b(y))[2],
    "a view between": lambda m, x: m.b(m.a(x).transpose(0, 1)),
    "siblings": lambda m, x: (m.a(y := m.b(x)), m.c(y)),
}


@pytest.mark.parametrize("name", LEFT)
def test_all_rows_at_once_where_blocks_would_be_wrong(cut: list[tuple[int, int]], name: str) -> None:
    """What lies between is read by others, changed, turned, or has an operand that no block has its part of."""
    fast = check(Net(LEFT[name]), torch.randn(300, 2, 8))
    assert not cut and not any("block by block" in node.why for node in nodes(fast))


def test_leading_dimensions_stay(cut: list[tuple[int, int]]) -> None:
    """Rows are those of all leading dimensions, and operands are cut alike."""
    model, x = Net(lambda m, x: x + m.b(m.a(x) * x)), torch.randn(2, 3, 100, 8)
    check(model, x)
    assert cut == [(600, 96)]


def test_what_is_no_matrix_of_rows_goes_at_once(cut: list[tuple[int, int]]) -> None:
    """Rows that lie apart are not copied for it: the products read them as they are."""
    model = Net(lambda m, x: m.b(m.a(x)))
    fast, x = compiled(model), torch.randn(100, 3, 8).transpose(0, 1)
    with torch.no_grad():
        torch.testing.assert_close(fast(x), model(x), rtol=1e-5, atol=1e-5)
    assert cut == [(300, 80)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_integer_products_do_not_depend_on_blocks(
    cut: list[tuple[int, int]], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows are quantized one by one: the same bits, block by block or not."""
    model, x = Net(lambda m, x: x + m.b(F.gelu(m.a(x)))).to(dtype), torch.randn(500, 8, dtype=dtype)
    fast = compiled(model, quantize=fastlinear.Int8Dynamic())
    with torch.no_grad():
        y = fast(x)
        assert cut and cut[-1][1] < 500
        monkeypatch.setattr(row_blocks, "rows", lambda m, *_: m)
        assert torch.equal(y, fast(x)) and y.dtype is dtype


# (rows, bytes of a row between, bytes of the weights, threads) -> rows of a block, with caches of 1 MB
RULE = {
    (1024, 6144, 1 << 20, 1): 128,
    (1000, 6144, 1 << 20, 1): 128,
    (1024, 6144, 1 << 20, 2): 256,
    (128, 6144, 1 << 20, 1): 128,  # what lies between fits
    (1024, 6144, 4 << 20, 1): 1024,  # the weights are too large to be read for each block
    (1024, 6144, 4 << 20, 2): 256,
    (4096, 22528, 1 << 20, 1): 4096,  # too few rows to fill tiles
    (8192, 6144, 16 << 20, 1): 128,  # but fresh memory costs more than to read them
    (8192, 6144, 17 << 20, 1): 8192,
    (300, 4096, 1 << 20, 1): 160,  # two alike, not 192 and 108
}


def test_rule(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks are alike, whole tiles, and what lies between them leaves room in the caches of all threads."""
    monkeypatch.setattr(caches, "l2", lambda: 1 << 20)
    assert {given: row_blocks.rows(*given) for given in RULE} == RULE
