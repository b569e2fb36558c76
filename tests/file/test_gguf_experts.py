"""load_quantized on GGUF files of mixtures, written by the format's own package: experts keep their bits."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from ggufs import assert_is, blocks
from torch import Tensor

import fastlinear
from fastlinear import FormatError
from fastlinear.layer import experts_frozen

from .test_gguf import mutations

gguf: Any = pytest.importorskip("gguf", reason="gguf writes the files")

SIZES: dict[str, Any] = {
    "vocab_size": 48, "hidden_size": 256, "num_hidden_layers": 1, "num_attention_heads": 4, "num_key_value_heads": 2,
    "max_position_embeddings": 64, "num_experts_per_tok": 2,
}  # fmt: skip
CONFIGS = {
    "llama": lambda: transformers.MixtralConfig(**SIZES, intermediate_size=256, num_local_experts=3),
    "qwen2moe": lambda: transformers.Qwen2MoeConfig(
        **SIZES, moe_intermediate_size=256, shared_expert_intermediate_size=256, num_experts=3
    ),
    "qwen3moe": lambda: transformers.Qwen3MoeConfig(**SIZES, moe_intermediate_size=256, num_experts=3, head_dim=64),
}
# As the package's own table has them, of layer 0.
NAMES = {
    "model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output",
    "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output", "self_attn.q_norm": "attn_q_norm", "self_attn.k_norm": "attn_k_norm",
    "mlp.gate": "ffn_gate_inp", "mlp.shared_expert_gate": "ffn_gate_inp_shexp",
    "mlp.shared_expert.gate_proj": "ffn_gate_shexp", "mlp.shared_expert.up_proj": "ffn_up_shexp",
    "mlp.shared_expert.down_proj": "ffn_down_shexp",
    "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm",
}  # fmt: skip
Edit = Callable[[dict[str, tuple[str, np.ndarray[Any, Any]]]], object]


@pytest.fixture(autouse=True)
def untuned(monkeypatch: pytest.MonkeyPatch) -> None:
    """The heuristic chooses: these tests are of bits."""
    monkeypatch.setenv("FASTLINEAR_AUTOTUNE", "0")


def on_meta(architecture: str) -> Any:
    with torch.device("meta"):
        return transformers.AutoModelForCausalLM.from_config(CONFIGS[architecture](), dtype=torch.float32).eval()


def stored(kind: str, *shape: int) -> tuple[str, np.ndarray[Any, Any]]:
    """A tensor as the writer takes it: bytes [..., of a row], or floats."""
    if kind == "F32":
        return kind, torch.randn(shape).numpy() / 16
    return kind, blocks(kind, *shape).data.view(*shape[:-1], -1).numpy()


def tensors_of(architecture: str, first: str, second: str) -> dict[str, tuple[str, np.ndarray[Any, Any]]]:
    """Random ones, of experts of these kinds, by the names in a file."""
    torch.manual_seed(0)
    found = {}
    for name, parameter in on_meta(architecture).named_parameters():
        rest = name.removeprefix("model.layers.0.")
        place = "blk.0." if rest != name else ""
        if rest == "mlp.experts.gate_up_proj":
            count, n, k = parameter.shape
            found |= {f"blk.0.ffn_{part}_exps.weight": stored(first, count, n // 2, k) for part in ("gate", "up")}
        elif rest == "mlp.experts.down_proj":
            found["blk.0.ffn_down_exps.weight"] = stored(second, *parameter.shape)
        else:
            module, _, kind = rest.rpartition(".")
            found[f"{place}{NAMES[module]}.{kind}"] = stored("F32", *parameter.shape)
    if "blk.0.ffn_gate_inp_shexp.weight" in found:  # which llama.cpp has as a vector
        kind, row = found["blk.0.ffn_gate_inp_shexp.weight"]
        found["blk.0.ffn_gate_inp_shexp.weight"] = kind, row[0]
    return found


def write(path: Path, architecture: str, tensors: dict[str, tuple[str, np.ndarray[Any, Any]]]) -> Path:
    config: Any = CONFIGS[architecture]()
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_block_count(1)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_expert_count(3)
    writer.add_expert_used_count(2)
    for name, (kind, data) in tensors.items():
        writer.add_tensor(name, data, raw_dtype=None if kind == "F32" else gguf.GGMLQuantizationType[kind])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def expected_state(architecture: str, tensors: dict[str, tuple[str, np.ndarray[Any, Any]]]) -> dict[str, Tensor]:
    """By the reference reader."""

    def read(name: str) -> Tensor:
        kind, data = tensors[name]
        return torch.from_numpy(np.array(gguf.dequantize(data, gguf.GGMLQuantizationType[kind])))

    config: Any = CONFIGS[architecture]()
    state = {}
    for name, parameter in on_meta(architecture).state_dict().items():
        rest = name.removeprefix("model.layers.0.")
        if rest == "mlp.experts.gate_up_proj":
            value = torch.cat([read(f"blk.0.ffn_{part}_exps.weight") for part in ("gate", "up")], 1)
        elif rest == "mlp.experts.down_proj":
            value = read("blk.0.ffn_down_exps.weight")
        else:
            module, _, kind = rest.rpartition(".")
            value = read(f"{'blk.0.' if rest != name else ''}{NAMES[module]}.{kind}").reshape(parameter.shape)
        heads = {"self_attn.q_proj.weight": 4, "self_attn.k_proj.weight": 2}.get(rest)
        if architecture == "llama" and heads:
            n = config.hidden_size // 4
            value = value.reshape(heads, n // 2, 2, -1).swapaxes(1, 2).reshape(value.shape)
        state[name] = value
    return state


@pytest.mark.parametrize(
    ("architecture", "first", "second", "packed"),
    [
        ("llama", "Q4_K", "Q6_K", ("int4", "int8g")),  # as Q4_K_M has it
        ("qwen2moe", "Q4_0", "Q4_0", ("int4", "int4")),
        ("qwen3moe", "Q8_0", "Q5_K", ("int8g", "int8g")),
    ],
)
def test_experts_keep_their_bits(
    architecture: str, first: str, second: str, packed: tuple[str, str], tmp_path: Path
) -> None:
    """Gates and what goes through them become one product; all weights are the reference reader's, and the model
    answers as a stock one of those weights does."""
    tensors = tensors_of(architecture, first, second)
    path = write(tmp_path / "m.gguf", architecture, tensors)
    fast = fastlinear.load_quantized(path, on_meta(architecture))
    mixture = fast.model.layers[0].mlp.experts
    assert experts_frozen.are_frozen(mixture)
    assert tuple(each.format for each in (mixture._frozen_experts.first, mixture._frozen_experts.second)) == packed
    size = sum(tensors[name][1].nbytes for name in (GATE, UP))  # all of kinds that are no wider here than in the file
    assert mixture.pack_nbytes[0] <= 1.02 * size
    assert_is(fast, CONFIGS[architecture](), expected_state(architecture, tensors))
    assert not mixture._elsewhere


@pytest.mark.parametrize("dynamic", [False, True])
def test_two_kinds_of_experts_are_saved(dynamic: bool, tmp_path: Path) -> None:
    """Codes of 4 bits and of 8 in one mixture, as Q4_K_M has it, come back from a file with the bits of both."""

    def experts_of(model: Any) -> torch.nn.Sequential:
        return torch.nn.Sequential(model.model.layers[0].mlp.experts)

    path = write(tmp_path / "m.gguf", "llama", tensors_of("llama", "Q4_K", "Q6_K"))
    saved = experts_of(fastlinear.load_quantized(path, on_meta("llama"), dynamic=dynamic))
    fastlinear.save(saved, tmp_path / "m.safetensors")
    loaded: Any = fastlinear.load(tmp_path / "m.safetensors", experts_of(on_meta("llama")))
    frozen = loaded[0]._frozen_experts
    assert (frozen.first.format, frozen.second.format) == ("int4", "int8g")
    weights, ids = torch.randn(5, 3).softmax(-1).topk(2, -1)
    x = torch.randn(5, 256)
    with torch.inference_mode():
        assert torch.equal(loaded[0](x, ids, weights), saved[0](x, ids, weights))
    assert all(torch.equal(value, saved.state_dict()[name]) for name, value in loaded.state_dict().items())


def test_experts_of_floats_stay_parameters(tmp_path: Path) -> None:
    """A file that is not quantized: `convert` packs them as any others."""
    tensors = tensors_of("qwen3moe", "F32", "F32")
    model = fastlinear.load_quantized(write(tmp_path / "m.gguf", "qwen3moe", tensors), on_meta("qwen3moe"))
    expected = expected_state("qwen3moe", tensors)
    assert all(torch.equal(model.state_dict()[name], value) for name, value in expected.items())
    assert isinstance(model.model.layers[0].mlp.experts.gate_up_proj, torch.nn.Parameter)


GATE, UP, DOWN = (f"blk.0.ffn_{part}_exps.weight" for part in ("gate", "up", "down"))
REFUSED: dict[str, tuple[Edit, str]] = {
    "gates of another kind": (
        lambda t: t.update({GATE: stored("Q8_0", 3, 256, 256)}),
        r"ffn_gate_exps.weight' Q8_0 .* and 'blk.0.ffn_up_exps.weight' Q4_0 .* no weights of one product",
    ),
    "fewer experts": (lambda t: t.update({UP: stored("Q4_0", 2, 256, 256)}), r"no weights of one product"),
    "no gates": (lambda t: t.pop(GATE), r"gate_up_proj is \[3, 256, 256\], but \[3, 512, 256\]"),
    "two dimensions": (lambda t: t.update({DOWN: stored("Q4_0", 768, 256)}), r"ffn_down_exps.weight' is \[768, 256\]"),
    "no experts": (lambda t: t.update({DOWN: stored("F32", 0, 256, 256)}), r"\[0, 256, 256\], which holds no experts"),
    "floats in one of them": (
        lambda t: t.update({DOWN: stored("F32", 3, 256, 256)}),
        r"gate_up_proj is Q4_0, .* only one of gate_up_proj and down_proj is so",
    ),
    "a quantized router": (
        lambda t: t.update({"blk.0.ffn_gate_inp.weight": stored("Q8_0", 3, 256)}), r"mlp.gate.weight is Q8_0"
    ),
}  # fmt: skip


@pytest.mark.parametrize("what", REFUSED)
def test_refused(what: str, tmp_path: Path) -> None:
    """With the tensors' names, and the model as it was."""
    edit, message = REFUSED[what]
    tensors = tensors_of("qwen3moe", "Q4_0", "Q4_0")
    edit(tensors)
    model = on_meta("qwen3moe")
    with pytest.raises(FormatError, match=message):
        fastlinear.load_quantized(write(tmp_path / "m.gguf", "qwen3moe", tensors), model)
    assert all(parameter.is_meta for parameter in model.parameters())


def mixture(path: Path) -> Path:
    """Of both packs, with an expert that all share."""
    return write(path, "qwen2moe", tensors_of("qwen2moe", "Q4_K", "Q8_0"))


def test_random_mutations(tmp_path: Path) -> None:
    """Refused, the model being as it was, or loaded whole; no crash, no hang, no huge allocation."""
    outcomes = mutations(mixture(tmp_path / "m.gguf"), 100, lambda: on_meta("qwen2moe"))
    assert outcomes.total() == 100 and outcomes["refused"] > 25 and outcomes["loaded"] > 4


@pytest.mark.exhaustive
def test_random_mutations_for_long(tmp_path: Path) -> None:
    """20,000 of them."""
    outcomes = mutations(mixture(tmp_path / "m.gguf"), 20_000, lambda: on_meta("qwen2moe"))
    assert outcomes.total() == 20_000 and outcomes["refused"] > 4_000 and outcomes["loaded"] > 400
