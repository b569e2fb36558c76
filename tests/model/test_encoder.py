"""torch's transformer encoder really runs on the converted layers."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from models import OFF
from torch import nn

import fastlinear
from fastlinear import FastLinear


def count_calls(model: nn.Module, run: Callable[[], Any], monkeypatch: pytest.MonkeyPatch) -> int:
    """How often a FastLinear is called; counting by hooks would switch torch's fast path off by itself."""
    calls, call = [], FastLinear.__call__
    with monkeypatch.context() as patch:
        patch.setattr(FastLinear, "__call__", lambda self, x: calls.append(self) or call(self, x))
        run()
    return len(calls)


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning")
@pytest.mark.parametrize("activation", ["relu", "gelu"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_encoder_uses_the_converted_layers(
    padded: bool, activation: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """TransformerEncoder in eval calls every converted layer, with and without padding, and unconvert restores it."""
    stock = nn.TransformerEncoderLayer(16, 2, 32, activation=activation, batch_first=True)
    encoder = nn.TransformerEncoder(stock, 3).eval().to(dtype)
    fast, x = OFF(encoder), torch.randn(2, 5, 16).to(dtype)
    close = 1e-5 if dtype == torch.float32 else 4 * torch.finfo(dtype).eps
    mask = torch.tensor([[False] * 5, [False] * 3 + [True] * 2]) if padded else None
    with torch.no_grad():
        expected, actual = encoder(x, src_key_padding_mask=mask), fast(x, src_key_padding_mask=mask)
        assert count_calls(fast, lambda: fast(x, src_key_padding_mask=mask), monkeypatch) == 12
        valid = slice(None) if mask is None else ~mask
        torch.testing.assert_close(actual[valid], expected[valid], rtol=close, atol=close)
        assert fast.layers[0].linear1.activation.name == activation
        fastlinear.unconvert(fast)
        assert torch.equal(fast(x, src_key_padding_mask=mask), expected)  # torch's fast path, bit for bit
        assert (
            fast.use_nested_tensor
            and fast.layers[2].activation_relu_or_gelu == encoder.layers[2].activation_relu_or_gelu
        )


def test_encoder_fast_path_stays_where_nothing_is_converted() -> None:
    """An encoder layer whose linear layers are excluded keeps torch's fast path."""
    encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 2, 32, batch_first=True), 2)
    fast = OFF(encoder, include="layers.1")
    assert [layer.activation_relu_or_gelu for layer in fast.layers] == [1, 0]


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning")
def test_encoder_takes_nested_tensors() -> None:
    """A nested tensor goes through a converted encoder as through torch's."""
    encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 2, 32, batch_first=True), 2).eval()
    nested = torch.nested.nested_tensor([torch.randn(3, 16), torch.randn(5, 16)])
    with torch.no_grad():
        for ours, theirs in zip(OFF(encoder)(nested).unbind(), encoder(nested).unbind(), strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


def test_autocast_gives_what_torchs_plain_path_gives() -> None:
    """fp32, as LayerNorm gives under autocast, with and without gradients; torch's fused kernel alone gives 16 bits."""
    layer, x = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True), torch.randn(2, 5, 16)
    encoder = nn.TransformerEncoder(layer, 1).eval()
    fast = OFF(encoder)
    with torch.autocast("cpu", torch.bfloat16):
        want = encoder(x)
        with torch.no_grad():
            y, fused = fast(x), encoder(x)
        assert (y.dtype, fast(x).dtype, want.dtype, fused.dtype) == (*[torch.float32] * 3, torch.bfloat16)
    torch.testing.assert_close(y, want.detach(), rtol=2e-2, atol=2e-2)
