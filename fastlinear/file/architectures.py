"""What GGUF files call the tensors of language models, by architecture, and what was done to them when they were
written (llama.cpp, convert_hf_to_gguf.py and gguf-py/gguf/tensor_mapping.py)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from fastlinear.file.safetensors import shown

_OUTER = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
_PRODUCTS = {
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_NORMS = {"attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm"}
_HEAD_NORMS = {"attn_q_norm": "self_attn.q_norm", "attn_k_norm": "self_attn.k_norm"}
_ROUTER = {"ffn_gate_inp": "mlp.gate"}
_SHARED = {  # the expert that every token goes to
    "ffn_gate_inp_shexp": "mlp.shared_expert_gate",
    "ffn_gate_shexp": "mlp.shared_expert.gate_proj",
    "ffn_up_shexp": "mlp.shared_expert.up_proj",
    "ffn_down_shexp": "mlp.shared_expert.down_proj",
}
# Of all experts of a layer, [experts, N, K]: Parameters without a module of their own, the first of two tensors.
EXPERTS = {
    "ffn_gate_exps": "mlp.experts.gate_up_proj",
    "ffn_up_exps": "mlp.experts.gate_up_proj",
    "ffn_down_exps": "mlp.experts.down_proj",
}
_SANDWICH = {
    "attn_norm": "input_layernorm",
    "post_attention_norm": "post_attention_layernorm",
    "ffn_norm": "pre_feedforward_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}
# Fields of a file, after the architecture's name, that mean the same as these of a transformers config.
_FIELDS = {
    "block_count": "num_hidden_layers",
    "embedding_length": "hidden_size",
    "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads",
    "attention.key_length": "head_dim",
    "attention.layer_norm_rms_epsilon": "rms_norm_eps",
    "attention.sliding_window": "sliding_window",
    "rope.freq_base": "rope_theta",
    "rope.scaling.factor": "factor",
    "expert_used_count": "num_experts_per_tok",
}
_OF_ROPE = ("rope_theta", "factor")
FREQUENCIES = "rope_freqs.weight"  # by what those of the rotary embedding are divided, which a config tells, too


class Architecture(NamedTuple):
    """layer: the tensors of a layer, by the module they belong to; permuted: those whose rows, head by head, took turns
    from two halves, with the field that tells the heads; shift: what was added to the weights of norms."""

    layer: Mapping[str, str]
    permuted: Mapping[str, str] = {}
    shift: float = 0.0

    def name(self, stored: str) -> str | None:
        """The name in a causal model of transformers of the tensor that a file calls `stored`; None if it has none."""
        stem, _, kind = stored.rpartition(".")
        if stem in _OUTER:
            return f"{_OUTER[stem]}.{kind}"
        block, _, rest = stem.removeprefix("blk.").partition(".")
        if not (stem.startswith("blk.") and block.isdecimal() and block.isascii()):
            return None
        layer = f"model.layers.{int(block[:9])}"
        if rest in EXPERTS and "ffn_gate_inp" in self.layer and kind == "weight":
            return f"{layer}.{EXPERTS[rest]}"
        return f"{layer}.{self.layer[rest]}.{kind}" if rest in self.layer else None

    def heads(self, stored: str, fields: Mapping[str, Any], architecture: str) -> int:
        """In how many heads the rows of a tensor are permuted; 0 if they are not. ValueError where no field tells."""
        part = stored.rpartition(".")[0].rpartition(".")[2]
        if part not in self.permuted or not stored.startswith("blk."):
            return 0
        every = f"{architecture}.attention.head_count"
        heads = fields.get(f"{architecture}.{self.permuted[part]}", fields.get(every))
        if type(heads) is not int or not 0 < heads < 1 << 20:
            raise ValueError(f"its field {every} is {shown(heads)}, no number of heads")
        return heads

    def is_norm(self, stored: str) -> bool:
        """Whether a tensor is the weight of a norm."""
        return stored.endswith("norm.weight")


_PERMUTED = {"attn_q": "attention.head_count", "attn_k": "attention.head_count_kv"}
ARCHITECTURES = {
    "llama": Architecture(_PRODUCTS | _NORMS | _ROUTER, _PERMUTED),  # Mistral's and Mixtral's, too
    "qwen2": Architecture(_PRODUCTS | _NORMS),
    "qwen3": Architecture(_PRODUCTS | _NORMS | _HEAD_NORMS),
    "qwen2moe": Architecture(_PRODUCTS | _NORMS | _ROUTER | _SHARED),
    "qwen3moe": Architecture(_PRODUCTS | _NORMS | _HEAD_NORMS | _ROUTER),
    "gemma3": Architecture(_PRODUCTS | _SANDWICH | _HEAD_NORMS, shift=1.0),
}


def expert_part(stored: str) -> str | None:
    """Which of the tensors of all experts one is, by its name in a file; None where it is none of those."""
    part = stored.removesuffix(".weight").rpartition(".")[2]
    return part if part in EXPERTS else None


def architecture_of(fields: Mapping[str, Any]) -> tuple[str, Architecture]:
    """That of a file, and its name; ValueError for another than these."""
    name = fields.get("general.architecture")
    if not isinstance(name, str) or name not in ARCHITECTURES:
        raise ValueError(f"it is of the architecture {shown(name)}, and read are {', '.join(ARCHITECTURES)}")
    return name, ARCHITECTURES[name]


def check_config(fields: Mapping[str, Any], architecture: str, config: object, stretched: float) -> None:
    """ValueError where the file and a transformers config tell of two models. stretched: by how much the file's slowest
    frequency of the rotary embedding is divided."""
    rope = getattr(config, "rope_parameters", None)
    rope = rope.get("full_attention", rope) if isinstance(rope, dict) else {}
    for field, attribute in _FIELDS.items():
        said, has = fields.get(f"{architecture}.{field}"), getattr(config, attribute, None)
        if attribute in _OF_ROPE:
            has = rope.get(attribute, has)
        if not isinstance(said, (int, float)) or not isinstance(has, (int, float)):
            continue
        if abs(said - has) > 1e-5 * abs(has):  # files have fp32
            raise ValueError(f"its {architecture}.{field} is {said:g}, but {attribute} of this model is {has:g}")
    scaled = fields.get(f"{architecture}.rope.scaling.type", "none") != "none" or stretched != 1.0
    if scaled and rope.get("rope_type") == "default":
        raise ValueError(
            "it scales the rotary embedding, but rope_parameters of this model's config do not: they have to be those "
            "of the model's own config.json, of which a file tells transformers nothing"
        )
