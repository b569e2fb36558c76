"""Whole models through torch.compile(backend="fastlinear"): in one graph, without a compiler, and as they were."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from models import OFF
from torch import Tensor, nn

import fastlinear
from fastlinear.graph import backend

DTYPES = [torch.float32, torch.bfloat16]
SIZES = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 48}
TEXT = {"vocab_size": 50, "max_position_embeddings": 64, **SIZES}
DECODER = {**TEXT, "num_key_value_heads": 2}
IDS = torch.arange(14, device="cpu").reshape(2, 7)
PIXELS = torch.linspace(-1, 1, 2 * 3 * 16 * 16, device="cpu").reshape(2, 3, 16, 16)
MEL = torch.linspace(-1, 1, 2 * 8 * 20, device="cpu").reshape(2, 8, 20)
ENDS = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1}


def _whisper(t: Any) -> nn.Module:
    sizes = {"d_model": 32, "encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48}
    heads = {"encoder_attention_heads": 2, "decoder_attention_heads": 2}
    mel = {"num_mel_bins": 8, "max_source_positions": 10, "max_target_positions": 16, "decoder_start_token_id": 0}
    return t.WhisperModel(t.WhisperConfig(vocab_size=50, **sizes, **heads, **mel, **ENDS))


def _clip(t: Any) -> nn.Module:
    vision = {"image_size": 16, "patch_size": 8, **SIZES}
    return t.CLIPModel(t.CLIPConfig(text_config={**TEXT, **ENDS}, vision_config=vision, projection_dim=16))


# name -> the model, its inputs, and how many products its graph runs at least
MODELS: dict[str, tuple[Callable[[Any], nn.Module], dict[str, Tensor], int]] = {
    "bert": (lambda t: t.BertModel(t.BertConfig(**TEXT)), {"input_ids": IDS, "attention_mask": IDS != 13}, 5),
    "vit": (
        lambda t: t.ViTModel(t.ViTConfig(image_size=16, patch_size=8, **SIZES)), {"pixel_values": PIXELS}, 5
    ),
    "gpt2": (
        lambda t: t.GPT2LMHeadModel(
            t.GPT2Config(vocab_size=50, n_embd=32, n_layer=1, n_head=2, n_positions=16, **ENDS)
        ),
        {"input_ids": IDS}, 5,
    ),
    "llama": (lambda t: t.LlamaForCausalLM(t.LlamaConfig(**DECODER)), {"input_ids": IDS}, 6),
    "qwen2": (lambda t: t.Qwen2ForCausalLM(t.Qwen2Config(**DECODER)), {"input_ids": IDS}, 6),
    "mistral": (lambda t: t.MistralModel(t.MistralConfig(**DECODER)), {"input_ids": IDS}, 5),
    "t5": (
        lambda t: t.T5Model(
            t.T5Config(
                vocab_size=50, d_model=32, d_ff=48, d_kv=8, num_layers=1, num_heads=4, feed_forward_proj="gated-gelu"
            )
        ),
        {"input_ids": IDS, "decoder_input_ids": IDS}, 12,
    ),
    "whisper": (_whisper, {"input_features": MEL, "decoder_input_ids": IDS}, 11),
    "clip": (_clip, {"input_ids": IDS, "pixel_values": PIXELS}, 10),
    "encoder": (
        lambda t: nn.TransformerEncoder(nn.TransformerEncoderLayer(32, 2, 48, batch_first=True), 2),
        {"src": torch.linspace(-2, 2, 2 * 7 * 32, device="cpu").reshape(2, 7, 32)}, 8,
    ),
}  # fmt: skip


def _made(name: str, dtype: torch.dtype) -> tuple[nn.Module, dict[str, Tensor], int]:
    transformers = pytest.importorskip("transformers", reason="transformers is an optional dependency")
    make, inputs, products = MODELS[name]
    model = make(transformers).eval().to(dtype)
    return model, {k: t.to(dtype) if t.is_floating_point() else t for k, t in inputs.items()}, products


def _output(model: Callable[..., Any], inputs: dict[str, Tensor]) -> Tensor:
    with torch.no_grad():
        y = model(**inputs)
    first = y if isinstance(y, Tensor) else getattr(y, "last_hidden_state", None)
    found: Tensor = first if first is not None else y.to_tuple()[0] if not hasattr(y, "logits") else y.logits
    return found


def _compiled(model: nn.Module, **options: Any) -> Any:
    torch._dynamo.reset()
    return torch.compile(model, backend=backend, fullgraph=True, options={"tune": "off", **options})


ALIKE = ("vit", "qwen2", "mistral", "clip", "whisper")  # of the same modules as others, or made as they are


@pytest.mark.parametrize("dtype", DTYPES, ids=["fp32", "bf16"])
@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.exhaustive] if name in ALIKE else []) for name in MODELS]
)
def test_models(name: str, dtype: torch.dtype) -> None:
    """Every architecture is one graph whose linear layers all run fast, as near to fp64 as the model itself."""
    model, inputs, products = _made(name, dtype)
    compiled = _compiled(model)
    y, stock = _output(compiled, inputs), _output(model, inputs)
    wide = {k: t.double() if t.is_floating_point() else t for k, t in inputs.items()}
    want = _output(copy.deepcopy(model).double(), wide)
    allowed = 1.5 * (stock - want).abs().max() + 4 * torch.finfo(dtype).eps * want.abs().max()
    assert y.dtype is dtype and (y - want).abs().max() <= allowed
    found = fastlinear.report(compiled)
    (graph,) = found.graphs
    linear = [n for n in graph.nodes if n.op in ("linear", "addmm")]  # of which two of a gate are one layer
    assert len(linear) >= products and all(n.outcome == "fast" for n in linear), linear
    assert all(layer.decision == "fast" for layer in found)


@pytest.mark.costly
@pytest.mark.parametrize("frozen", [False, True], ids=["converted", "frozen"])
@pytest.mark.parametrize("scheme", [None, fastlinear.Int8Dynamic()], ids=["plain", "int8"])
@pytest.mark.parametrize("name", ["bert", pytest.param("gpt2", marks=pytest.mark.exhaustive), "encoder"])
def test_converted_models(name: str, scheme: Any, frozen: bool) -> None:
    """A converted or frozen model compiles to the numbers that it computes by itself."""
    model, inputs, _ = _made(name, torch.float32)
    fast = OFF(model, quantize=scheme, freeze=frozen)
    compiled = _compiled(fast)
    torch.testing.assert_close(_output(compiled, inputs), _output(fast, inputs), rtol=1e-4, atol=1e-4)
    (graph,) = fastlinear.report(compiled).graphs
    ours = [node for node in graph.nodes if node.op == "fastlinear"]
    assert ours and all(node.outcome == "fast" for node in ours)
