"""GGUF files to read: a writer, told by the format's own words, and small models of random blocks."""

import struct
from pathlib import Path
from typing import Any, NamedTuple

import torch
import transformers
from torch import Tensor, nn

from fastlinear.spec.ggml import KINDS

_CODES = {bool: (7, "?"), int: (4, "I"), float: (6, "f")}
# Where the fp16 of a block of each kind stand, in bytes.
HALVES = {
    **dict.fromkeys(("Q4_0", "IQ4_NL", "Q5_0", "Q8_0", "F16"), (0,)),
    **dict.fromkeys(("Q4_1", "Q5_1", "Q4_K", "Q5_K"), (0, 2)),
    "Q6_K": (208,),
}


class Stored(NamedTuple):
    kind: str
    shape: tuple[int, ...]
    data: Tensor  # uint8


def blocks(kind: str, *shape: int) -> Stored:
    """Random blocks, with scales small enough for a model to run on them."""
    *outer, k = shape
    size, nbytes = KINDS[kind].size, KINDS[kind].nbytes
    count = torch.Size(outer).numel() * k // size
    if kind in ("F32", "BF16"):
        dtype = torch.float32 if kind == "F32" else torch.bfloat16
        return Stored(kind, shape, torch.randn(count).to(dtype).view(torch.uint8))
    data = torch.randint(256, (count, nbytes), dtype=torch.uint8)
    for at in HALVES[kind]:
        data[:, at : at + 2] = (torch.randn(count, 1) / 512).half().view(torch.uint8)
    return Stored(kind, shape, data.flatten())


def write(path: Path, fields: dict[str, Any], tensors: dict[str, Stored], version: int = 3) -> Path:
    """A file; values of fields are numbers, texts or lists of texts."""
    head = [b"GGUF", struct.pack("<IQQ", version, len(tensors), len(fields))]
    for name, value in fields.items():
        head += [_text(name), _value(value)]
    data, alignment = b"", 32
    for name, (kind, shape, content) in tensors.items():
        data += bytes(-len(data) % alignment)
        extents = struct.pack(f"<{len(shape)}Q", *reversed(shape))
        head += [_text(name), struct.pack("<I", len(shape)), extents, struct.pack("<IQ", KINDS[kind].number, len(data))]
        data += content.numpy().tobytes()
    raw = b"".join(head)
    path.write_bytes(raw + bytes(-len(raw) % alignment) + data)
    return path


def _text(text: str) -> bytes:
    return struct.pack("<Q", len(text.encode())) + text.encode()


def _value(value: Any) -> bytes:
    if isinstance(value, str):
        return struct.pack("<I", 8) + _text(value)
    if isinstance(value, list):
        return struct.pack("<IIQ", 9, 8, len(value)) + b"".join(map(_text, value))
    number, code = _CODES[type(value)]
    return struct.pack(f"<I{code}", number, value)


# ---- models ----

_SIZES: dict[str, Any] = {
    "vocab_size": 48, "hidden_size": 256, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64,
}  # fmt: skip
CONFIGS = {
    "llama": lambda: transformers.LlamaConfig(**_SIZES, tie_word_embeddings=True),
    "qwen2": lambda: transformers.Qwen2Config(**_SIZES, tie_word_embeddings=False),
    "qwen3": lambda: transformers.Qwen3Config(**_SIZES, head_dim=64, tie_word_embeddings=True),
    "gemma3": lambda: transformers.Gemma3TextConfig(**_SIZES, head_dim=64, sliding_window=8),
}


def on_meta(architecture: str, dtype: torch.dtype = torch.float32) -> Any:
    with torch.device("meta"):
        return transformers.AutoModelForCausalLM.from_config(CONFIGS[architecture](), dtype=dtype).eval()


def fields_of(architecture: str) -> dict[str, Any]:
    config: Any = CONFIGS[architecture]()
    return {
        "general.architecture": architecture,
        f"{architecture}.block_count": config.num_hidden_layers,
        f"{architecture}.attention.head_count": config.num_attention_heads,
        f"{architecture}.attention.head_count_kv": config.num_key_value_heads,
        f"{architecture}.attention.layer_norm_rms_epsilon": float(config.rms_norm_eps),
        "tokenizer.ggml.tokens": ["a", "bc", ""],
    }


# As the converter of llama.cpp has them; layers in braces.
_NAMES = {
    "model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output",
    "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output", "self_attn.q_norm": "attn_q_norm", "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm",
}  # fmt: skip
_GEMMA = {
    "post_attention_layernorm": "post_attention_norm", "pre_feedforward_layernorm": "ffn_norm",
    "post_feedforward_layernorm": "post_ffw_norm",
}  # fmt: skip


def gguf_name(architecture: str, name: str) -> str:
    """What a file calls the tensor that transformers calls `name`."""
    names = {**_NAMES, **(_GEMMA if architecture == "gemma3" else {})}
    module, _, kind = name.rpartition(".")
    if not module.startswith("model.layers."):
        return f"{names[module]}.{kind}"
    block, _, rest = module.removeprefix("model.layers.").partition(".")
    return f"blk.{block}.{names[rest]}.{kind}"


def tensors_of(architecture: str, kinds: list[str], embedding: str = "Q8_0") -> dict[str, Stored]:
    """Random tensors for a model, those of its linear layers of these kinds in turns, by the names in a file."""
    torch.manual_seed(0)
    model, tensors, at = on_meta(architecture), {}, 0
    for name, parameter in model.named_parameters():
        module = model.get_submodule(name.rpartition(".")[0])
        kind = embedding if isinstance(module, nn.Embedding) else "F32"
        if isinstance(module, nn.Linear) and name.endswith("weight"):
            kind, at = kinds[at % len(kinds)], at + 1
        tensors[gguf_name(architecture, name)] = blocks(kind, *parameter.shape)
    return tensors


IDS = torch.tensor([[3, 1, 4, 1, 5, 9, 2, 6]])


def assert_is(fast: Any, config: Any, expected: dict[str, Tensor]) -> None:
    """A model has these weights, bit for bit, and answers as a stock one of them does."""
    state = fast.state_dict()
    assert state.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(state[name], value), name
    stock: Any = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    stock.load_state_dict(expected)
    with torch.inference_mode():
        torch.testing.assert_close(fast(IDS).logits, stock(IDS).logits, rtol=1e-4, atol=1e-4)
