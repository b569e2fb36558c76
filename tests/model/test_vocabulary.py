"""convert(embeddings=Int8WeightOnly()): embeddings and heads in 8 bits, tied by one pack."""

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import nn

import fastlinear
from fastlinear import FormatError
from fastlinear.layer.embedding import FastEmbedding
from fastlinear.spec import int8
from fastlinear.spec.packed import rows_of

IDS = torch.tensor([[3, 1, 4, 1, 5, 9, 2, 46]])
EIGHT = fastlinear.Int8WeightOnly()


@pytest.fixture(autouse=True)
def untuned(monkeypatch: pytest.MonkeyPatch) -> None:
    """The heuristic chooses: these tests are of bits."""
    monkeypatch.setenv("FASTLINEAR_AUTOTUNE", "0")


def llama(tied: bool, dtype: torch.dtype = torch.float32) -> Any:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=47, hidden_size=48, intermediate_size=64, num_hidden_layers=1, num_attention_heads=4,
        tie_word_embeddings=tied,
    )  # fmt: skip
    return transformers.AutoModelForCausalLM.from_config(config, dtype=dtype).eval()


def rounded(weight: torch.Tensor) -> torch.Tensor:
    """What the specification of 8 bits makes of a weight."""
    return int8.dequantize(int8.quantize_weight(weight.detach())).to(weight.dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tied", [True, False])
def test_a_language_model(tied: bool, dtype: torch.dtype) -> None:
    """Looked up rows are those of the specification, bit for bit; head and embedding have one pack if they had one
    weight; the rest is as `quantize` says, and the model of these weights answers alike."""
    model = llama(tied, dtype)
    fast = fastlinear.convert(model, quantize=fastlinear.Int4WeightOnly(), embeddings=EIGHT, freeze=True)
    embed, head = fast.get_input_embeddings(), fast.lm_head
    assert type(embed) is FastEmbedding and type(model.get_input_embeddings()) is nn.Embedding
    with torch.inference_mode():
        assert torch.equal(embed(IDS), rounded(model.get_input_embeddings().weight)[IDS])
    assert torch.equal(head.weight, rounded(model.lm_head.weight)) and head.packed_as == "w8f"
    assert (embed._pack is head._frozen) == tied
    assert embed.weight.is_meta and embed.weight.dtype is dtype and embed.weight.shape == (47, 48)
    stock = llama(tied, dtype)
    stock.load_state_dict(fast.state_dict())
    with torch.inference_mode():
        tolerance = 1e-4 if dtype is torch.float32 else 0.05
        torch.testing.assert_close(fast(IDS).logits, stock(IDS).logits, rtol=tolerance, atol=tolerance)
    rows = {row.name: row for row in fastlinear.report(fast)}
    told = rows["model.embed_tokens"]
    assert told.frozen and told.decision == "looked up" and told.quality.weight > 30
    assert not tied or told.quality == rows["lm_head"].quality
    assert (told.pack_mib == 0) == tied and "looked up" in str(fastlinear.report(fast))
    assert {row.dtype for name, row in rows.items() if "proj" in name} <= {"float32 as int4", "bfloat16 as int4"}


def test_every_row_of_every_layout() -> None:
    """Of sizes that fill no panel; ids that are none are refused."""
    for n, k in ((1, 1), (31, 7), (33, 40), (64, 16)):
        for layout in ("w8f/32x1", "w8f/16x1"):
            weight = int8.quantize_weight(torch.randn(n, k))
            from fastlinear._weights import Packed

            panels = Packed(weight.values, layout, weight.scale).data
            ids = torch.randperm(n)
            assert torch.equal(rows_of(panels, layout, n, k, ids), int8.dequantize(weight)[ids])
            for odd in (-1, n):
                with pytest.raises((IndexError, RuntimeError)):
                    rows_of(panels, layout, n, k, torch.tensor([odd]))


@pytest.mark.parametrize("tied", [True, False])
def test_saved_and_loaded(tied: bool, tmp_path: Path) -> None:
    """One pack in the file, of which both are views again; into a stock model, and into one that is packed already."""
    fast = fastlinear.convert(llama(tied), embeddings=EIGHT, freeze=True)
    path = tmp_path / "m.safetensors"
    fastlinear.save(fast, path)
    with torch.inference_mode():
        want = fast(IDS).logits
    for into in (llama(tied), fastlinear.convert(llama(tied), embeddings=EIGHT)):
        loaded = fastlinear.load(path, into)
        embed = loaded.get_input_embeddings()
        assert type(embed) is FastEmbedding and (embed._pack is loaded.lm_head._frozen) == tied
        with torch.inference_mode():
            assert torch.equal(loaded(IDS).logits, want)
    plain = fastlinear.convert(llama(tied))
    fastlinear.save(plain, path)
    loaded = fastlinear.load(path, fast)  # which makes ordinary embeddings of packed ones
    assert type(loaded.get_input_embeddings()) is nn.Embedding
    with torch.inference_mode():
        torch.testing.assert_close(loaded(IDS).logits, plain(IDS).logits)


def test_a_file_for_another_embedding(tmp_path: Path) -> None:
    path = tmp_path / "m.safetensors"
    fastlinear.save(fastlinear.convert(nn.Sequential(nn.Embedding(8, 4), nn.Linear(4, 2)), embeddings=EIGHT), path)
    with pytest.raises(FormatError, match="'0' is packed, but in this model its max_norm"):
        fastlinear.load(path, nn.Sequential(nn.Embedding(8, 4, max_norm=1.0), nn.Linear(4, 2)))
    with pytest.raises(FormatError, match="'0' is 8 x 4, but 9 x 4 in this model"):
        fastlinear.load(path, nn.Sequential(nn.Embedding(9, 4), nn.Linear(4, 2)))


def test_copied_pickled_and_cast() -> None:
    """What was tied stays so."""
    fast = fastlinear.convert(llama(True), embeddings=EIGHT, freeze=True)
    with torch.inference_mode():
        want = fast(IDS).logits
        for other in (copy.deepcopy(fast), pickle.loads(pickle.dumps(fast))):
            embed = other.get_input_embeddings()
            assert type(embed) is FastEmbedding and embed._pack is other.lm_head._frozen
            assert torch.equal(other(IDS).logits, want)
        embed = copy.deepcopy(fast.get_input_embeddings()).bfloat16()
        assert embed(IDS).dtype is torch.bfloat16 and embed.weight.dtype is torch.bfloat16


def test_unfrozen() -> None:
    """One Parameter again, of the numbers that the pack stands for."""
    for undo in (fastlinear.unfreeze, fastlinear.unconvert):
        model = llama(True)
        thawed = undo(fastlinear.convert(model, embeddings=EIGHT))
        embed = thawed.get_input_embeddings()
        assert type(embed) is nn.Embedding and embed.weight is thawed.lm_head.weight
        assert isinstance(embed.weight, nn.Parameter) and torch.equal(embed.weight, rounded(model.lm_head.weight))
        with torch.inference_mode():
            assert thawed(IDS).logits.isfinite().all()


def test_layers_that_are_fast_already() -> None:
    """Become tied over the pack, and are as before where something fails."""
    fast = fastlinear.convert(llama(True), inplace=True)
    weight, bad = fast.lm_head.weight, torch.ones(1, 2, 3, 4)
    with pytest.raises((RuntimeError, TypeError, ValueError)):
        fastlinear.convert(fast, inplace=True, embeddings=EIGHT, tune="now", example_inputs=bad)
    assert fast.lm_head.weight is weight and fast.lm_head.packed_as == "fp32"
    with torch.inference_mode():
        assert torch.equal(fast(IDS).logits, fastlinear.convert(llama(True))(IDS).logits)
    again = fastlinear.convert(fast, inplace=True, embeddings=EIGHT)
    assert again.get_input_embeddings()._pack is again.lm_head._frozen


def test_two_embeddings_of_one_weight() -> None:
    model = nn.ModuleList([nn.Embedding(9, 4), nn.Embedding(9, 4), nn.Linear(4, 9, bias=False)]).eval()
    model[1].weight = model[2].weight = model[0].weight
    fast: Any = fastlinear.convert(model, embeddings=EIGHT)
    assert fast[0]._pack is fast[1]._pack is fast[2]._frozen
    thawed: Any = fastlinear.unfreeze(fast)
    assert thawed[0].weight is thawed[1].weight is thawed[2].weight


def test_what_fails_later_gives_them_back() -> None:
    model = llama(True)
    embed, weight = model.get_input_embeddings(), model.lm_head.weight
    with pytest.raises((RuntimeError, TypeError, ValueError)):
        fastlinear.convert(model, inplace=True, embeddings=EIGHT, tune="now", example_inputs=torch.ones(1, 2, 3, 4))
    assert type(embed) is nn.Embedding and type(model.lm_head) is nn.Linear
    assert embed.weight is weight and model.lm_head.weight is weight


def test_what_stays_as_it_is() -> None:
    """With a warning, or at the caller's wish; and other arguments are refused."""
    model = nn.Sequential(nn.Embedding(8, 4, max_norm=1.0), nn.Linear(4, 2)).eval()
    with pytest.warns(UserWarning, match="the embedding '0' stays as it is: its max_norm"):
        fast = fastlinear.convert(model, embeddings=EIGHT)
    assert type(fast[0]) is nn.Embedding
    kept = fastlinear.convert(llama(True), embeddings=EIGHT, exclude="lm_head")
    assert type(kept.get_input_embeddings()) is nn.Embedding
    with pytest.raises(TypeError, match=r"embeddings must be Int8WeightOnly\(\) or None"):
        fastlinear.convert(model, embeddings=fastlinear.Int8Dynamic())  # type: ignore[arg-type]


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.filterwarnings("error")
def test_an_embedding_that_is_excluded(tied: bool) -> None:
    """It stays, with the head that has its weight, and the pattern is none that matches nothing; other heads do not."""
    for pattern in ("model.embed_tokens", nn.Embedding, "model.embed*"):
        fast = fastlinear.convert(llama(tied), embeddings=EIGHT, exclude=pattern)
        assert type(fast.get_input_embeddings()) is nn.Embedding
        assert (fast.lm_head.packed_as == "w8f") is not tied


def test_embeddings_of_other_classes() -> None:
    """That scale what they look up, as Gemma's do."""
    config = transformers.Gemma3TextConfig(
        vocab_size=47, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, head_dim=16, sliding_window=8,
    )  # fmt: skip
    model: Any = transformers.AutoModelForCausalLM.from_config(config).eval()
    fast = fastlinear.convert(model, embeddings=EIGHT)
    embed, stock = fast.get_input_embeddings(), model.get_input_embeddings()
    assert isinstance(embed, type(stock)) and embed._pack is fast.lm_head._frozen
    with torch.inference_mode():
        torch.testing.assert_close(embed(IDS), stock(IDS), rtol=0.02, atol=0.02)
        assert fast(IDS).logits.isfinite().all()
