"""How what a graph returns lies in memory: as in the model, whatever its products and norms have absorbed."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fastlinear.graph import backend
from fastlinear.graph.layouts import laid, order_of

C, T = 16, 6


class Stream(nn.Module):
    """Residuals on x [B, C, T] turned to [B, T, C]: torch's sums lie as x does, products and norms do not."""

    def __init__(self, ends: Callable[[Tensor, Tensor], Any]) -> None:
        super().__init__()
        self.norm, self.up, self.down, self.ends = nn.LayerNorm(C), nn.Linear(C, C), nn.Linear(C, C), ends

    def forward(self, x: Tensor) -> Any:
        first = x.transpose(1, 2)
        first = first + self.down(torch.relu(self.up(self.norm(first))))
        return self.ends(first, first + self.up(self.norm(first)))


def _written(a: Tensor, b: Tensor) -> Any:
    """A view that is written to is seen by who reads what it is a view of."""
    seen = b.transpose(1, 2).view(b.shape[0], -1)
    seen.add_(1.0)
    return b, a, seen


ENDS: dict[str, Callable[[Tensor, Tensor], Any]] = {
    "sums": lambda a, b: (a, b, b.transpose(1, 2), (b * 2).unsqueeze(1)),
    "views": lambda a, b: (b.transpose(1, 2).view(b.shape[0], -1), a.mT.view(-1), torch.Tensor.view(b.mT, -1, T)),
    "views that were contiguous": lambda a, b: b.transpose(1, 2).contiguous().view(-1, T),
    "pieces": lambda a, b: (b[:, 0], b.chunk(2, -1), a[:, 1:]),
    "other views": lambda a, b: (b.as_strided((2, 3), (1, 2)), a.mT.view_as(b.mT), b.mT.view(torch.int32)),
    "written to": _written,
}


def _flat(y: Any) -> list[Tensor]:
    return [y] if isinstance(y, Tensor) else [each for part in y for each in _flat(part)]


def _strides(y: Tensor) -> list[int]:
    """Of what has more than one number in its dimension."""
    return [stride for size, stride in zip(y.shape, y.stride(), strict=True) if size > 1]


@pytest.mark.parametrize("ends", ENDS)
def test_what_a_graph_returns_lies_as_in_the_model(ends: str) -> None:
    """Strides and numbers are the model's, of views in other shapes too, which raised where a sum was absorbed."""
    model = Stream(ENDS[ends]).eval()
    torch._dynamo.reset()
    fast = torch.compile(model, backend=backend, fullgraph=True, options={"tune": "off"}, dynamic=ends == "sums")
    with torch.no_grad():
        for batch in (2, 3):
            x = torch.randn(batch, C, T)
            for y, wanted in zip(_flat(fast(x)), _flat(model(x)), strict=True):
                assert _strides(y) == _strides(wanted)
                torch.testing.assert_close(*(t.view(torch.float32) for t in (y, wanted)), rtol=1e-4, atol=1e-5)


def test_an_order_in_memory() -> None:
    """The dimensions from the outermost to the innermost, none where there are gaps; `laid` copies only if it must."""
    x = torch.empty(2, 3, 1, 5).permute(3, 0, 2, 1)
    assert [d for d in order_of(x) or () if x.shape[d] > 1] == [1, 3, 0]
    assert order_of(x[:2]) is None and order_of(x.expand(5, 2, 7, 3)) is None
    assert laid(x, order_of(x) or ()).data_ptr() == x.data_ptr()
    assert laid(x.contiguous(), order_of(x) or ()).stride()[:2] == x.stride()[:2]
