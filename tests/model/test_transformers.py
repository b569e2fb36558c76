"""Models of transformers, with random weights: converted, fused and saved they are what they were."""

import copy
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from models import OFF, fast_names, same_tensors
from torch import Tensor, nn

import fastlinear
from fastlinear.layer import linear
from fastlinear.model.fusion import Absorbed


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
        "falcon, a linear layer of its own": (
            lambda t: t.FalconModel(
                t.FalconConfig(
                    vocab_size=50, hidden_size=32, ffn_hidden_size=48, num_hidden_layers=2, num_attention_heads=2
                )
            ),
            {"input_ids": ids},
            2,
        ),
        "llama, gated": (lambda t: t.LlamaModel(t.LlamaConfig(**text)), {"input_ids": ids}, 2),
        "t5": (lambda t: t.T5Model(t.T5Config(**t5)), both, 2),
        "t5, gated": (lambda t: t.T5Model(t.T5Config(feed_forward_proj="gated-gelu", **t5)), both, 2),
        "clip, quick_gelu": (
            lambda t: t.CLIPTextModel(t.CLIPTextConfig(bos_token_id=0, eos_token_id=1, **text)), {"input_ids": ids}, 2
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


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["bert", "gpt2", "llama, gated", "t5", "vit"])
def test_transformers_in_16_bits(name: str, dtype: torch.dtype) -> None:
    """A 16-bit model keeps its dtype, one packed in 16 bits its own; both are as near to fp64 as the 16-bit model."""
    transformers = pytest.importorskip("transformers", reason="transformers is an optional dependency")
    make, inputs, _ = _models()[name]
    model = make(transformers).eval()
    narrow = copy.deepcopy(model).to(dtype)

    def run(model: nn.Module, dtype: torch.dtype) -> Tensor:
        given = {key: t.to(dtype) if t.is_floating_point() else t for key, t in inputs.items()}
        with torch.no_grad():
            return model(**given).to_tuple()[0]

    want, stock = run(copy.deepcopy(model).double(), torch.float64), run(narrow, dtype)
    allowed = 1.2 * (stock - want).abs().max() + torch.finfo(dtype).eps * want.abs().max()
    fast, packed = OFF(narrow), OFF(model, dtype=dtype)
    for converted, of_x in ((fast, dtype), (packed, torch.float32)):
        y = run(converted, of_x)
        assert y.dtype == of_x and (y - want).abs().max() <= allowed
        layers = [layer for layer in converted.modules() if linear.is_fast(layer)]
        assert layers and all(layer._engine.packed.dtype == dtype for layer in layers)
    assert same_tensors(packed.state_dict(), model.state_dict())


def test_gpt2_head_is_not_rounded_unasked() -> None:
    """GPT-2's lm_head is its embedding too: it keeps its precision unless it is named, and stays tied either way."""
    transformers = pytest.importorskip("transformers", reason="transformers is an optional dependency")
    config = transformers.GPT2Config(
        vocab_size=50, n_embd=32, n_layer=2, n_head=2, n_positions=16, bos_token_id=0, eos_token_id=1
    )
    model = transformers.GPT2LMHeadModel(config).eval()
    fast = OFF(model, dtype=torch.bfloat16)
    assert len(fast_names(fast)) == 2 * 4 and type(fast.lm_head) is nn.Linear
    both = OFF(fast, dtype=torch.bfloat16, include="lm_head")
    assert len(fast_names(both)) == 2 * 4 + 1 and both.lm_head.packed_as == "bf16"
    ids = torch.arange(14).reshape(2, 7)
    for converted in (fast, both):
        assert converted.lm_head.weight is converted.transformer.wte.weight is model.transformer.wte.weight
        with torch.no_grad():
            torch.testing.assert_close(converted(ids).logits, model(ids).logits, rtol=0.05, atol=0.05)
    assert same_tensors(both.state_dict(), model.state_dict())


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
