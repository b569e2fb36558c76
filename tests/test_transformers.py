"""Models of transformers, with random weights: converted, fused and saved they are what they were."""

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from models import OFF, fast_names, same_tensors
from torch import Tensor, nn

import fastlinear
from fastlinear.fusion import Absorbed


def absorbed(model: nn.Module) -> list[Absorbed]:
    return [module for module in model.modules() if isinstance(module, Absorbed)]


def _models() -> dict[str, tuple[Callable[[Any], nn.Module], dict[str, Tensor], int]]:
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    text = {"vocab_size": 50, **sizes}
    ids = torch.arange(14).reshape(2, 7)
    gpt = {"vocab_size": 50, "n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 16, "bos_token_id": 0}
    t5 = {"vocab_size": 50, "d_model": 32, "d_ff": 64, "d_kv": 16, "num_layers": 1, "num_heads": 2}
    both = {"input_ids": ids, "decoder_input_ids": ids}
    return {
        "bert": (lambda t: t.BertModel(t.BertConfig(**text)), {"input_ids": ids}, 3),
        "bert mlm": (lambda t: t.BertForMaskedLM(t.BertConfig(**text)), {"input_ids": ids}, 3),
        "roberta": (lambda t: t.RobertaModel(t.RobertaConfig(**text)), {"input_ids": ids}, 3),
        "distilbert": (
            lambda t: t.DistilBertModel(
                t.DistilBertConfig(vocab_size=50, dim=32, n_layers=2, n_heads=2, hidden_dim=64)
            ),
            {"input_ids": ids},
            2,
        ),
        "albert, one layer run twice": (lambda t: t.AlbertModel(t.AlbertConfig(**text)), {"input_ids": ids}, 1),
        "vit": (
            lambda t: t.ViTModel(t.ViTConfig(image_size=16, patch_size=8, **sizes)),
            {"pixel_values": torch.linspace(-1, 1, 2 * 3 * 16 * 16).reshape(2, 3, 16, 16)},
            3,
        ),
        "gpt2": (lambda t: t.GPT2LMHeadModel(t.GPT2Config(eos_token_id=1, **gpt)), {"input_ids": ids}, 2),
        "opt": (
            lambda t: t.OPTModel(
                t.OPTConfig(
                    vocab_size=50, hidden_size=32, word_embed_proj_dim=32, ffn_dim=64,
                    num_hidden_layers=2, num_attention_heads=2,
                )
            ),
            {"input_ids": ids},
            2,
        ),
        "llama, gated": (lambda t: t.LlamaModel(t.LlamaConfig(**text)), {"input_ids": ids}, 2),
        "t5": (lambda t: t.T5Model(t.T5Config(**t5)), both, 2),
        "t5, gated": (lambda t: t.T5Model(t.T5Config(feed_forward_proj="gated-gelu", **t5)), both, 2),
        "clip, quick_gelu": (
            lambda t: t.CLIPTextModel(t.CLIPTextConfig(bos_token_id=0, eos_token_id=1, **text)), {"input_ids": ids}, 0
        ),
    }  # fmt: skip


@pytest.mark.parametrize(("make", "inputs", "fused"), _models().values(), ids=_models().keys())
def test_transformers(make: Callable[[Any], nn.Module], inputs: dict[str, Tensor], fused: int) -> None:
    """Models of transformers fuse their MLPs' activations and compute what they did; unconvert leaves no trace."""
    transformers = pytest.importorskip("transformers", reason="transformers is an optional dependency")
    model = make(transformers).eval()
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)  # a model with nothing to convert would say so
        fast = fastlinear.convert(model, tune="off")
    assert len(absorbed(fast)) == fused
    with torch.no_grad():
        for stock, ours in zip(model(**inputs).to_tuple(), fast(**inputs).to_tuple(), strict=True):
            if isinstance(stock, Tensor):
                torch.testing.assert_close(ours, stock, rtol=1e-5, atol=1e-5)
    assert str(fastlinear.unconvert(fast)) == str(model)


def test_gpt2_converts_conv1d(tmp_path: Any) -> None:
    """Conv1D layers run fast and say so; save_pretrained writes the stock file, and the weights stay [in, out]."""
    transformers = pytest.importorskip("transformers", reason="transformers is an optional dependency")
    config = transformers.GPT2Config(
        vocab_size=50, n_embd=32, n_layer=2, n_head=2, n_positions=16, bos_token_id=0, eos_token_id=1
    )
    model = transformers.GPT2LMHeadModel(config).eval()
    fast, ids = OFF(model), torch.arange(14).reshape(2, 7)
    assert len(fast_names(fast)) == 2 * 4 + 1
    assert fast.transformer.h[0].mlp.c_fc.weight.shape == (32, 128)
    assert repr(fast.transformer.h[0].mlp.c_fc).startswith("FastConv1D(in_features=32, out_features=128")
    assert fast.lm_head.weight is fast.transformer.wte.weight
    with torch.no_grad():
        torch.testing.assert_close(fast(ids).logits, model(ids).logits, rtol=1e-5, atol=1e-5)
    fast.save_pretrained(tmp_path)
    again = transformers.GPT2LMHeadModel.from_pretrained(tmp_path).eval()
    assert same_tensors(again.state_dict(), model.state_dict())
    assert type(fastlinear.unconvert(fast).transformer.h[0].mlp.c_fc) is type(model.transformer.h[0].mlp.c_fc)
