"""Generation through torch.compile(backend="fastlinear") on a preallocated cache."""

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from ggufs import fields_of, on_meta, tensors_of, write
from torch._dynamo.utils import counters

import fastlinear

_SIZES: dict[str, Any] = {
    "vocab_size": 97, "hidden_size": 48, "intermediate_size": 32, "num_attention_heads": 6, "num_key_value_heads": 2,
    "head_dim": 20, "max_position_embeddings": 64, "pad_token_id": 0, "eos_token_id": None,
}  # fmt: skip
_TWO: dict[str, Any] = {"num_hidden_layers": 2, "sliding_window": 8}
# With how many graphs leave a cache to torch: of a prompt that is longer than a sliding window.
MODELS: dict[str, tuple[Any, int]] = {
    "llama": (lambda: transformers.LlamaConfig(**_SIZES, num_hidden_layers=1), 0),
    "qwen2": (lambda: transformers.Qwen2Config(**{**_SIZES, "num_key_value_heads": 6}, num_hidden_layers=1), 0),
    "mistral": (lambda: transformers.MistralConfig(**_SIZES, **_TWO), 1),
    "gemma3": (
        lambda: transformers.Gemma3TextConfig(
            **_SIZES, **_TWO, layer_types=["sliding_attention", "full_attention"], query_pre_attn_scalar=20
        ),
        1,
    ),
}


LIKE_OTHERS = ("llama", "mistral")  # llama generates in the next test, the windows of mistral are those of gemma3


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.exhaustive] if name in LIKE_OTHERS else []) for name in MODELS]
)
def test_attention_over_a_cache(name: str) -> None:
    """Two sequences, one of them padded on its left and both longer than a sliding window, generate what the eager
    model does on a growing cache; and attention of every token is one call of our own."""
    torch.manual_seed(0)
    make, left = MODELS[name]
    model: Any = transformers.AutoModelForCausalLM.from_config(make()).eval()
    ids = torch.randint(1, 97, (2, 11))
    mask = torch.ones_like(ids)
    ids[1, :4], mask[1, :4] = 0, 0
    wanted: dict[str, Any] = {"attention_mask": mask, "max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False}
    with torch.inference_mode():
        expected = model.generate(ids, **wanted)
        model.forward = torch.compile(model.forward, backend="fastlinear", fullgraph=True, options={"tune": "off"})
        text = model.generate(ids, cache_implementation="static", **wanted)
    assert torch.equal(text, expected)
    graphs = fastlinear.report(model).graphs
    writes = [[node for node in graph.nodes if node.op in ("index_copy_", "copy_")] for graph in graphs]
    others = [nodes for nodes in writes if any(node.outcome != "fused" for node in nodes)]
    assert len(graphs) > 1 and all(writes) and len(others) <= left, others


def test_caches_of_several_lengths() -> None:
    """A cache of another length, of which Dynamo makes a graph for all lengths, is read and written by our own, too; so
    is one by a prompt without padding, whose attention is causal, and nothing is left that cuts heads or joins them."""
    torch.manual_seed(0)
    model: Any = transformers.AutoModelForCausalLM.from_config(MODELS["llama"][0]()).eval()
    ids = torch.randint(1, 97, (1, 5))
    with torch.inference_mode():
        forward, fast = model.forward, torch.compile(model.forward, backend="fastlinear", options={"tune": "off"})
        for tokens in (3, 5):
            wanted: dict[str, Any] = {"max_new_tokens": tokens, "min_new_tokens": tokens, "do_sample": False}
            model.forward = forward
            expected = model.generate(ids, **wanted)
            model.forward = fast
            assert torch.equal(model.generate(ids, cache_implementation="static", **wanted), expected)
    graphs = fastlinear.report(model).graphs
    assert len(graphs) > 2
    for graph in graphs:
        writes = [node for node in graph.nodes if node.op in ("index_copy_", "transpose")]
        assert len(writes) > 2 and all(node.outcome == "fused" for node in writes), writes


@pytest.mark.parametrize(
    ("architecture", "graphs"),
    [
        ("llama", 2),
        pytest.param("qwen3", 2, marks=pytest.mark.exhaustive),
        pytest.param("gemma3", 3, marks=pytest.mark.exhaustive),
    ],
)
def test_no_token_compiles_anew(
    architecture: str, graphs: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A prompt and a token are one graph each, however many tokens follow, with one more for a sliding window that is
    full; and the text is that of the eager model on a growing cache."""
    monkeypatch.setenv("FASTLINEAR_AUTOTUNE", "0")
    path = write(tmp_path / "m", fields_of(architecture), tensors_of(architecture, ["Q4_1", "Q8_0"]))
    model: Any = fastlinear.load_quantized(path, on_meta(architecture))
    ids = torch.tensor([[3, 1, 4, 1, 5]])
    wanted: dict[str, Any] = {"max_new_tokens": 12, "min_new_tokens": 12, "do_sample": False}
    with torch.inference_mode():
        expected = model.generate(ids, **wanted)
        model.forward = torch.compile(model.forward, backend="fastlinear", fullgraph=True)
        text = model.generate(ids, cache_implementation="static", **wanted)
    assert torch.equal(text, expected)
    assert counters["stats"]["unique_graphs"] == graphs


def test_the_example_warms_what_it_measures(monkeypatch: pytest.MonkeyPatch) -> None:
    """examples/generate.py compiles in the first of its runs, and in none of those that it prints the times of."""
    path = Path(__file__).resolve().parents[2] / "examples" / "generate.py"
    spec = importlib.util.spec_from_file_location("generate", path)
    assert spec is not None and spec.loader is not None
    example: Any = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    model: Any = transformers.AutoModelForCausalLM.from_config(MODELS["llama"][0]()).eval()
    model.forward = torch.compile(model.forward, backend="fastlinear", options={"tune": "off"})
    model.generation_config.cache_implementation = "static"
    seconds, graphs = example.seconds, list[int]()

    def counted(*arguments: Any) -> Any:
        found = seconds(*arguments)
        graphs.append(counters["stats"]["unique_graphs"])
        return found

    monkeypatch.setattr(example, "seconds", counted)
    ids = torch.randint(1, 97, (1, 5))
    example.run("tiny", model, {"input_ids": ids, "attention_mask": torch.ones_like(ids)}, 8)
    assert len(graphs) > 5 and graphs == [2] * len(graphs)
