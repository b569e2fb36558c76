"""The MXFP4 experts of gpt-oss, taken from a checkpoint's folder bit for bit."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

import fastlinear
from fastlinear.layer import experts_frozen

transformers = pytest.importorskip("transformers")

IDS = torch.arange(8)[None]
FP4 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)


def config() -> Any:
    return transformers.GptOssConfig(
        hidden_size=64, intermediate_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        head_dim=16, num_local_experts=4, num_experts_per_tok=2, vocab_size=99, max_position_embeddings=64,
    )  # fmt: skip


def stands_for(blocks: Tensor, scales: Tensor) -> Tensor:
    """[E, N, K], number by number."""
    pairs = torch.stack([blocks & 15, blocks >> 4], -1).flatten(-2)
    numbers = torch.tensor(FP4)[pairs.long()] * torch.exp2(scales.float() - 127)[..., None]
    return numbers.flatten(-2)


def write(folder: Path, **changed: Tensor | None) -> Any:
    """A checkpoint as OpenAI's are, and the model in fp32 that it stands for."""
    torch.manual_seed(0)
    model = transformers.GptOssForCausalLM(config()).eval()
    tensors = {name: t.clone() for name, t in model.state_dict().items()}
    state = dict(tensors)
    for name, weight in tensors.items():
        if weight.dim() == 3:
            count, k, n = weight.shape
            blocks = torch.randint(256, (count, n, k // 32, 16), dtype=torch.uint8)
            scales = torch.randint(118, 124, (count, n, k // 32), dtype=torch.uint8)
            state |= {f"{name}_blocks": blocks, f"{name}_scales": scales}
            del state[name]
            tensors[name] = stands_for(blocks, scales).mT.contiguous()
    for name, tensor in changed.items():
        full = name.replace("__", ".")
        state.pop(full, None)
        state |= {} if tensor is None else {full: tensor}
    model.load_state_dict(tensors)
    folder.mkdir()
    save_file(state, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({"quantization_config": {"quant_method": "mxfp4"}}))
    return model


def on_meta(dtype: torch.dtype = torch.float32) -> Any:
    with torch.device("meta"):
        return transformers.AutoModelForCausalLM.from_config(config(), dtype=dtype).eval()


@torch.no_grad()
def test_bits_are_kept(tmp_path: Path) -> None:
    """The weights are those numbers, gates and all in the module's order; the model computes what they stand for."""
    stock = write(tmp_path / "model")
    fast = fastlinear.load_quantized(tmp_path / "model", on_meta())
    for own, theirs in zip(fast.model.layers, stock.model.layers, strict=True):
        mixture = own.mlp.experts
        assert experts_frozen.are_frozen(mixture) and mixture.packed_as == "int4"
        assert mixture._frozen_experts.first.layout.endswith(":32:e8m0")
        for name in ("gate_up_proj", "down_proj"):
            assert torch.equal(getattr(mixture, name), getattr(theirs.mlp.experts, name))
    y, want = fast(IDS).logits, stock(IDS).logits
    assert float((y - want).norm() / want.norm()) < 1e-5
    assert not any(layer.mlp.experts._elsewhere for layer in fast.model.layers)
    (origin,) = {row.origin for row in fastlinear.report(fast) if row.experts}
    assert origin == "from MXFP4"
    fastlinear.save(fast, tmp_path / "saved")
    assert torch.equal(fastlinear.load(tmp_path / "saved", on_meta())(IDS).logits, y)


@torch.no_grad()
def test_as_transformers_reads_them() -> None:
    """transformers' own reading of blocks and scales is the same numbers."""
    mxfp4 = pytest.importorskip("transformers.integrations.mxfp4")
    blocks = torch.randint(256, (2, 6, 3, 16), dtype=torch.uint8)
    scales = torch.randint(100, 140, (2, 6, 3), dtype=torch.uint8)
    theirs = mxfp4.convert_moe_packed_tensors(blocks, scales, dtype=torch.float32)
    assert torch.equal(theirs, stands_for(blocks, scales).mT)


FIRST = "model__layers__0__mlp__experts__gate_up_proj"
BLOCKS, SCALES = f"{FIRST}_blocks", f"{FIRST}_scales"


def zeros(*shape: int, dtype: torch.dtype = torch.uint8) -> Tensor:
    return torch.zeros(shape, dtype=dtype)


BAD: dict[str, Any] = {
    "no scales": ({SCALES: None}, "lacks .*gate_up_proj"),
    "blocks of 15": ({BLOCKS: zeros(4, 64, 2, 15)}, r"gate_up_proj.*blocks is of shape"),
    "other scales": ({SCALES: zeros(4, 64, 3)}, r"gate_up_proj.*scales is of shape"),
    "floats": ({SCALES: zeros(4, 64, 2, dtype=torch.float32)}, r"gate_up_proj.*scales is torch.float32"),
    "another size": (
        {BLOCKS: zeros(3, 64, 2, 16), SCALES: zeros(3, 64, 2)},
        r"gate_up_proj is \[3, 64, 64\], but \[4, 64, 64\]",
    ),
    "one of both": (
        {BLOCKS: None, SCALES: None, FIRST: zeros(4, 64, 64, dtype=torch.float32)},
        "only one of gate_up_proj and down_proj",
    ),
}


@pytest.mark.parametrize(("changed", "message"), BAD.values(), ids=BAD)
def test_bad_checkpoints(changed: Any, message: str, tmp_path: Path) -> None:
    """FormatError that names the tensor; nothing of the model is touched."""
    write(tmp_path / "model", **changed)
    model = on_meta()
    with pytest.raises(fastlinear.FormatError, match=message):
        fastlinear.load_quantized(tmp_path / "model", model)
    assert all(p.is_meta for p in model.parameters())
