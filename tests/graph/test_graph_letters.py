"""Products by a parameter that are spelled in letters, as XLNet's are, run on packed weights."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fastlinear
from fastlinear.graph import backend

# x and what of the parameter [12, 3, 4], or of its first matrix's rows [12, 4], is summed over.
TAKEN = ("ibh,hnd->ibnd", "ibnd,hnd->ibh", "i b h, h n d -> i b n d", "ibd,hd->ibh", "ibh,hd->ibd")
LEFT = ("ibh,hnd->ibdn", "ibh,hnd->bind", "ibn,hnd->ibhd", "inh,hnd->ind", "ibh,hnd->ibn", "ihb,hnd->ibnd")
SIZES = {"i": 5, "b": 2, "h": 12, "n": 3, "d": 4}


class Spelled(nn.Module):
    """Products of the same letters by parameters of their own."""

    def __init__(self, ways: tuple[str, ...], factor: float = 1.0) -> None:
        super().__init__()
        self.ways, self.factor = ways, factor
        letters = (way.replace(" ", "").partition("->")[0].partition(",")[2] for way in ways)
        self.weights = nn.ParameterList(torch.randn([SIZES[c] for c in each]) for each in letters)

    def forward(self, xs: list[Tensor]) -> list[Tensor]:
        weights = self.weights if self.factor == 1.0 else [weight * self.factor for weight in self.weights]
        return [torch.einsum(way, x, weight) for way, x, weight in zip(self.ways, xs, weights, strict=True)]


def given(ways: tuple[str, ...], dtype: torch.dtype, **other: int) -> list[Tensor]:
    sizes = {**SIZES, **other}
    return [torch.randn([sizes[c] for c in way.replace(" ", "").partition(",")[0]]).to(dtype) for way in ways]


def compiled(model: nn.Module) -> Any:
    torch._dynamo.reset()
    return torch.compile(model, backend=backend, fullgraph=True, options={"tune": "off"})


@pytest.mark.parametrize(("dtype", "close"), [(torch.float32, 1e-5), (torch.bfloat16, 4e-2)], ids=["fp32", "bf16"])
@torch.no_grad()
def test_letters_are_linear_layers(dtype: torch.dtype, close: float) -> None:
    """Whatever the number of rows; each weight is reported by its own name, and followed where it changes."""
    model = Spelled(TAKEN).to(dtype).eval()
    fast = compiled(model)
    for rows in (5, 7):
        xs = given(TAKEN, dtype, i=rows)
        for way, y, want in zip(TAKEN, fast(xs), model(xs), strict=True):
            torch.testing.assert_close(y, want, rtol=close, atol=close, msg=lambda why, at=way: f"{at}: {why}")
            assert y.stride() == want.stride()
        for weight in model.weights:
            weight.mul_(0.5)
    found = fastlinear.report(fast)
    assert [row.name for row in found if row.decision == "fast"] == [f"weights.{i}" for i in range(len(TAKEN))]
    assert found.share is not None and found.share.fast_weights == found.share.weights


@torch.no_grad()
def test_what_is_no_linear_layer_is_left() -> None:
    """Outputs in another order, sums over the middle, batches of weights, weights that are computed."""
    for model in (Spelled(LEFT), Spelled(TAKEN, 2.0)):
        fast, xs = compiled(model.eval()), given(model.ways, torch.float32)
        for y, want in zip(fast(xs), model(xs), strict=True):
            torch.testing.assert_close(y, want)
        assert not [row for row in fastlinear.report(fast) if row.decision == "fast"]
