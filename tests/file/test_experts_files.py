"""Mixtures of experts in files: saved and loaded in every precision, and refused where a file lies about them."""

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch

import fastlinear
from fastlinear import FastExperts
from fastlinear.file import inspection, safetensors
from fastlinear.layer import experts_frozen

E, K, HIDDEN = 3, 40, 27
OPTIONS: dict[str, dict[str, Any]] = {
    "fp32": {},
    "bf16": {"packed": torch.bfloat16},
    "products": {"products": torch.bfloat16},
    "int8": {"quantize": fastlinear.Int8Dynamic(asymmetric=True)},
    "w8f": {"quantize": fastlinear.Int8WeightOnly()},
    "int4": {"quantize": fastlinear.Int4Dynamic()},
    "oai": {"activation": ("swiglu_oai", 1.5, 5.0)},
}


def made(**options: Any) -> torch.nn.Sequential:
    torch.manual_seed(0)
    module = FastExperts(E, K, HIDDEN, True, **options).eval()
    module._tune = "off"
    return torch.nn.Sequential(module)


def given() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    torch.manual_seed(1)
    weights, ids = torch.randn(9, E).softmax(-1).topk(2, -1)
    return torch.randn(9, K), ids, weights


@pytest.mark.parametrize("frozen", [False, True], ids=["", "frozen"])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@torch.no_grad()
def test_round_trip(options: dict[str, Any], frozen: bool, tmp_path: Path) -> None:
    """The same bits, from the mapping; the file tells what is in it."""
    model, path = made(**options), tmp_path / "experts.safetensors"
    y = model[0](*given())
    if frozen:
        fastlinear.freeze(model)
    fastlinear.save(model, path)
    told = made(**{k: v for k, v in options.items() if k == "activation"})
    loaded = fastlinear.load(path, told)
    assert experts_frozen.are_frozen(loaded[0]) and torch.equal(loaded[0](*given()), y)
    assert list(loaded.state_dict()) == list(model.state_dict())
    assert loaded[0].dtypes == model[0].dtypes and not loaded[0]._elsewhere
    assert torch.equal(fastlinear.load(path, fastlinear.freeze(made(**options)))[0](*given()), y)


@torch.no_grad()
def test_a_model_on_meta(tmp_path: Path) -> None:
    """A stock model of transformers becomes the converted one, without weights of its own."""
    transformers = pytest.importorskip("transformers")
    config = transformers.GptOssConfig(
        hidden_size=48, intermediate_size=40, num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=2,
        head_dim=12, num_local_experts=4, num_experts_per_tok=2, vocab_size=99, max_position_embeddings=64,
    )  # fmt: skip
    model, ids, path = transformers.GptOssForCausalLM(config).eval(), torch.arange(8)[None], tmp_path / "model"
    fast = fastlinear.convert(model, quantize=fastlinear.Int8Dynamic(), tune="off", freeze=True)
    fastlinear.save(fast, path)
    with torch.device("meta"):
        empty = transformers.GptOssForCausalLM(config).eval()
    loaded = fastlinear.load(path, empty)
    assert torch.equal(loaded(ids).logits, fast(ids).logits)
    assert "4x48x80" in inspection.describe(path)
    again = fastlinear.convert(copy.deepcopy(model), tune="off")
    assert torch.equal(fastlinear.load(path, again)(ids).logits, fast(ids).logits)
    with pytest.raises(fastlinear.FormatError, match="compute something else"):
        wide = copy.deepcopy(config)
        wide.swiglu_limit = 3.0
        fastlinear.load(path, transformers.GptOssForCausalLM(wide))


def _changed(raw: dict[str, Any], which: int, **fields: Any) -> None:
    raw["layers"][which] |= fields


LIES: dict[str, Any] = {
    "no experts": lambda raw: _changed(raw, 0, experts=0),
    "too many experts": lambda raw: _changed(raw, 0, experts=E + 1),
    "endless experts": lambda raw: _changed(raw, 0, experts=1 << 60),
    "negative": lambda raw: _changed(raw, 0, experts=-1),
    "half of it": lambda raw: raw["layers"][0].pop("interleaved"),
    "one product": lambda raw: raw["layers"].pop(),
    "other width": lambda raw: _changed(raw, 1, k=HIDDEN - 1),
    "a gate behind": lambda raw: _changed(raw, 1, activation=["swiglu", []]),
    "no gate": lambda raw: _changed(raw, 0, activation=None),
    "other gate": lambda raw: _changed(raw, 0, activation=["geglu", []]),
    "in turns": lambda raw: (_changed(raw, 0, interleaved=True), _changed(raw, 1, interleaved=True)),
    "transposed": lambda raw: (_changed(raw, 0, transposed=True), _changed(raw, 1, transposed=True)),
    "other name": lambda raw: _changed(raw, 0, name="0.up_proj"),
    "bias": lambda raw: _changed(raw, 0, bias=None),
    "unlike": lambda raw: _changed(raw, 1, accumulate="fp16"),
}


@pytest.mark.parametrize("lie", LIES.values(), ids=LIES)
def test_lies_are_refused(lie: Any, tmp_path: Path) -> None:
    """FormatError, before anything of the model is touched."""
    path = tmp_path / "experts.safetensors"
    fastlinear.save(made(), path)
    raw = path.read_bytes()
    size = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + size])
    said = json.loads(header["__metadata__"]["fastlinear"])
    lie(said)
    header["__metadata__"]["fastlinear"] = json.dumps(said)
    text = json.dumps(header).encode()
    text = text.ljust(size) if len(text) <= size else text
    if len(text) > size:
        pytest.fail("the header has grown")
    path.write_bytes(raw[:8] + text + raw[8 + size :])
    model = made()
    before = copy.deepcopy(model)
    with pytest.raises(fastlinear.FormatError):
        fastlinear.load(path, model)
    assert not experts_frozen.are_frozen(model[0])
    for a, b in zip(model.parameters(), before.parameters(), strict=True):
        assert torch.equal(a, b)
    assert safetensors.read(path).entries
