"""fastlinear.hf.prepare_generation: what `generate` writes on recorded graphs is what the eager model writes."""

import copy
import logging
from typing import Any

import pytest
import torch

transformers: Any = pytest.importorskip("transformers", minversion="5.0")

import fastlinear  # noqa: E402
from fastlinear.hf import prepare_generation  # noqa: E402

_SIZES: dict[str, Any] = {
    "vocab_size": 97, "hidden_size": 48, "intermediate_size": 32, "num_attention_heads": 6, "num_key_value_heads": 2,
    "head_dim": 20, "max_position_embeddings": 64, "pad_token_id": 0, "eos_token_id": None, "num_hidden_layers": 2,
}  # fmt: skip
_TWO: dict[str, Any] = {"layer_types": ["sliding_attention", "full_attention"], "query_pre_attn_scalar": 20}
# With the graphs of prompts, tokens, and tokens of a full window; a prompt longer than that has one of its own.
MODELS: dict[str, tuple[Any, int]] = {
    "llama": (lambda: transformers.LlamaConfig(**_SIZES), 2),
    "qwen2": (lambda: transformers.Qwen2Config(**_SIZES), 2),
    "qwen3": (lambda: transformers.Qwen3Config(**_SIZES), 2),
    "mistral": (lambda: transformers.MistralConfig(**_SIZES, sliding_window=8), 4),
    "gemma3": (lambda: transformers.Gemma3TextConfig(**_SIZES, **_TWO, sliding_window=8), 4),
    "mixtral": (lambda: transformers.MixtralConfig(**_SIZES, num_local_experts=4), 2),
}


def model_of(name: str, **changes: Any) -> Any:
    torch.manual_seed(0)
    model: Any = transformers.AutoModelForCausalLM.from_config(MODELS[name][0]()).eval()
    return fastlinear.convert(model, **changes)


def text_of(model: Any, ids: Any, tokens: int, **arguments: Any) -> Any:
    arguments = {"attention_mask": torch.ones_like(ids), "do_sample": False, **arguments}
    with torch.inference_mode():
        return model.generate(ids, max_new_tokens=tokens, min_new_tokens=tokens, **arguments)


def prompt(length: int, batch: int = 1) -> Any:
    return torch.randint(1, 97, (batch, length), generator=torch.Generator().manual_seed(length))


def recorded(model: Any) -> list[Any]:
    return [each for several in model.forward._known.values() for each in several]


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("freeze", [False, True])
def test_text_is_that_of_the_eager_model(name: str, freeze: bool) -> None:
    """Prompts of any length share a graph, as do tokens, whatever the cache holds; no call is left to torch alone."""
    model = model_of(name, freeze=freeze, tune="off")
    cases = [(prompt(length), tokens) for length, tokens in ((5, 6), (3, 9), (11, 4), (6, 12))]
    expected = [text_of(model, *case) for case in cases]
    prepare_generation(model, length=32, tune="off")
    for case, text in zip(cases, expected, strict=True):
        assert torch.equal(text_of(model, *case), text)
    found = recorded(model)
    assert len(found) == MODELS[name][1] and not any(isinstance(each, str) for each in found), found
    again = recorded(model)
    assert all(a is b for a, b in zip(found, again, strict=True))


def test_attention_is_ours() -> None:
    """Prompt and token have attention over the cache as one call of our own, as Dynamo's graphs have."""
    model = prepare_generation(model_of("llama", freeze=True), tune="off")
    text_of(model, prompt(5), 4)
    graphs = fastlinear.report(model).graphs
    assert len(graphs) == 2
    for graph in graphs:
        nodes = {node.op: node.outcome for node in graph.nodes}
        assert nodes["index_copy_"] == nodes["transpose"] == "fused", nodes
        assert nodes["scaled_dot_product_attention"] == "fast"


def test_padding_batches_beams_and_samples() -> None:
    """Left padding, another batch, beams, which reorder the cache, and seeded samples are what they were."""
    model = model_of("llama")
    ids = prompt(7, batch=2)
    mask = torch.ones_like(ids)
    ids[1, :3], mask[1, :3] = 0, 0
    wanted: list[dict[str, Any]] = [{"attention_mask": mask}, {"num_beams": 3}, {"do_sample": True, "top_k": 5}]

    def texts() -> list[Any]:
        found = []
        for each in wanted:
            torch.manual_seed(1)
            found.append(text_of(model, ids, 6, **each))
        return found

    expected = texts()
    prepare_generation(model, tune="off")
    assert all(map(torch.equal, texts(), expected))
    assert len(recorded(model)) > 2 and not any(isinstance(each, str) for each in recorded(model))


def test_a_longer_cache_is_recorded_anew() -> None:
    """A call for which there is no room makes two graphs more, and room for twice as much."""
    model = model_of("llama")
    tokens = (3, 30, 50, 3)
    expected = [text_of(model, prompt(4), each) for each in tokens]
    prepare_generation(model, length=8, tune="off")
    counts = []
    for each, text in zip(tokens, expected, strict=True):
        assert torch.equal(text_of(model, prompt(4), each), text)
        counts.append(len(recorded(model)))
    assert counts == [2, 4, 6, 6] and model.generation_config.max_cache_len == 66


def test_changes_of_the_model_are_seen() -> None:
    """New values of a weight are read, a layer in the place of another is, and training mode has no graph."""
    model = prepare_generation(model_of("llama"), tune="off")
    text_of(model, prompt(4), 3)
    for change in (
        lambda: model.model.norm.weight.data.mul_(torch.linspace(-1, 1, 48)),
        lambda: setattr(model, "lm_head", torch.nn.Linear(48, 97, bias=False)),
        lambda: setattr(model.model.layers[1].mlp, "act_fn", torch.nn.Tanh()),
        lambda: fastlinear.freeze(model),
        lambda: model.model.layers[0].register_forward_hook(lambda module, given, y: y * 2),
    ):
        with torch.no_grad():
            change()
        text = text_of(model, prompt(4), 6)
        forward = model.forward
        del model.forward
        assert torch.equal(text, text_of(model, prompt(4), 6))
        model.forward = forward


def test_what_has_no_graph_runs_as_before(caplog: pytest.LogCaptureFixture) -> None:
    """A model whose numbers decide what it does generates without a graph, and a warning says why, once."""
    model = model_of("llama")
    layer = model.model.layers[1]
    plain = layer.forward

    def deciding(hidden_states: Any, **rest: Any) -> Any:
        y = plain(hidden_states, **rest)
        return y * 2 if float(y.sum()) > 0 else y

    layer.forward = deciding
    expected = text_of(model, prompt(4), 6)
    prepare_generation(model, tune="off")
    with caplog.at_level(logging.WARNING, "fastlinear"):
        assert torch.equal(text_of(model, prompt(4), 6), expected)
        assert torch.equal(text_of(model, prompt(4), 6), expected)
    told = [record.message for record in caplog.records if "without a graph" in record.message]
    assert len(told) == 2 and all("without a graph: GuardOnDataDependent" in each for each in told), told


def test_outputs_of_all_layers() -> None:
    """Calls that want hidden states get them from the model itself, and those after them have graphs again."""
    model = model_of("llama")
    plain = text_of(model, prompt(4), 6)
    states = {"output_hidden_states": True, "return_dict_in_generate": True}
    expected = text_of(model, prompt(4), 6, **states)
    prepare_generation(model, tune="off")
    found = text_of(model, prompt(4), 6, **states)
    assert torch.equal(found.sequences, plain) and len(found.hidden_states) == len(expected.hidden_states)
    assert torch.equal(text_of(model, prompt(4), 6), plain)
    assert sum(not isinstance(each, str) for each in recorded(model)) == 2


def test_copies_record_anew() -> None:
    """A copy is prepared, and its graphs are of its own weights."""
    model = prepare_generation(model_of("llama"), tune="off")
    text_of(model, prompt(4), 3)
    other = copy.deepcopy(model)
    with torch.no_grad():
        other.lm_head.weight.copy_(other.lm_head.weight.flip(0))
    text = text_of(other, prompt(4), 6)
    assert other.forward.model is other and len(recorded(other)) == 2
    del other.forward
    assert torch.equal(text, text_of(other, prompt(4), 6))


def test_bad_arguments() -> None:
    """What is no model, a length that is none, and an option that nobody knows are named."""
    model = model_of("llama")
    with pytest.raises(TypeError, match="takes a model of transformers that generates, but got Linear"):
        prepare_generation(torch.nn.Linear(2, 2))
    with pytest.raises(ValueError, match="length must be a positive number of tokens, but is 0"):
        prepare_generation(model, length=0)
    with pytest.raises(ValueError, match="no option 'speed'"):
        prepare_generation(model, speed=1)
    model.forward = model.forward
    with pytest.raises(TypeError, match="forward of this LlamaForCausalLM was replaced"):
        prepare_generation(model)
