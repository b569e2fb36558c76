"""fastlinear.hf.prepare_generation: what `generate` writes on recorded graphs is what the eager model writes."""

import copy
import itertools
import logging
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch

transformers: Any = pytest.importorskip("transformers", minversion="5.0")

import fastlinear  # noqa: E402
from fastlinear.graph import recording  # noqa: E402
from fastlinear.hf import prepare_generation  # noqa: E402

_SIZES: dict[str, Any] = {
    "vocab_size": 97, "hidden_size": 48, "intermediate_size": 32, "num_attention_heads": 6, "num_key_value_heads": 2,
    "head_dim": 20, "max_position_embeddings": 64, "pad_token_id": 0, "eos_token_id": None, "num_hidden_layers": 1,
}  # fmt: skip
_TWO: dict[str, Any] = {**_SIZES, "num_hidden_layers": 2}
_TURNS: dict[str, Any] = {"layer_types": ["sliding_attention", "full_attention"], "query_pre_attn_scalar": 20}
# With the graphs of prompts, tokens, and tokens of a full window; a prompt longer than that has one of its own.
MODELS: dict[str, tuple[Any, int]] = {
    "llama": (lambda: transformers.LlamaConfig(**_SIZES), 2),
    "qwen2": (lambda: transformers.Qwen2Config(**_SIZES), 2),
    "qwen3": (lambda: transformers.Qwen3Config(**_TWO), 2),
    "mistral": (lambda: transformers.MistralConfig(**_TWO, sliding_window=8), 4),
    "gemma3": (lambda: transformers.Gemma3TextConfig(**_TWO, **_TURNS, sliding_window=8), 4),
    "mixtral": (lambda: transformers.MixtralConfig(**_SIZES, num_local_experts=4), 2),
    "bloom": (
        lambda: transformers.BloomConfig(vocab_size=97, hidden_size=48, n_layer=1, n_head=6, eos_token_id=None),
        2,
    ),
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


LIKE_OTHERS = ("qwen2", "qwen3", "mistral")  # of the layers of llama, and the windows of gemma3
CASES = [("llama", False), ("llama", True), *((name, False) for name in MODELS if name not in ("llama", *LIKE_OTHERS))]
ALL = [pytest.param(*case, 7, marks=pytest.mark.exhaustive) for case in itertools.product(MODELS, (False, True))]


@pytest.mark.parametrize(("name", "freeze", "more"), [*((*case, 0) for case in CASES), *ALL])
def test_text_is_that_of_the_eager_model(name: str, freeze: bool, more: int) -> None:
    """Prompts of any length share a graph, as do tokens, whatever the cache holds; no call is left to torch alone."""
    model = model_of(name, freeze=freeze, tune="off")
    cases = [(prompt(length), tokens + more) for length, tokens in ((5, 3), (3, 9), (11, 3), (6, 5))]
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
    """A call for which there is no room makes room for twice as much, and two graphs more."""
    model = model_of("llama")
    tokens = (3, 30, 50, 3)
    expected = [text_of(model, prompt(4), each) for each in tokens]
    prepare_generation(model, length=8, tune="off")
    counts = []
    for each, text in zip(tokens, expected, strict=True):
        assert torch.equal(text_of(model, prompt(4), each), text)
        counts.append(len(recorded(model)))
    assert counts == [2, 4, 4, 4] and model.forward.length == 68


def test_changes_of_the_model_are_seen() -> None:
    """New values of a weight are read, a layer in the place of another is, and training mode has no graph."""
    model = prepare_generation(model_of("llama"), tune="off")
    text_of(model, prompt(4), 3)
    for change in (
        lambda: model.model.norm.weight.data.mul_(torch.linspace(-1, 1, 48)),
        lambda: setattr(model, "lm_head", torch.nn.Linear(48, 97, bias=False)),
        lambda: setattr(model.model.layers[0].mlp, "act_fn", torch.nn.Tanh()),
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
    layer = model.model.layers[0]
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
    assert len(told) == 1 and told[0].endswith("without a graph: its numbers decide what it does"), told


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


_OTHERS: dict[str, Any] = {
    "growing": lambda model: {"past_key_values": transformers.DynamicCache(config=model.config)},
    "preallocated": lambda model: {"past_key_values": transformers.StaticCache(config=model.config, max_cache_len=40)},
    "none": lambda model: {"use_cache": False},
    "lookup": lambda model: {"prompt_lookup_num_tokens": 3},
    "assistant": lambda model: {"assistant_model": prepare_generation(model_of("llama"), tune="off")},
    "attentions": lambda model: {"output_attentions": True, "return_dict_in_generate": True},
}


@pytest.mark.parametrize("name", _OTHERS)
def test_other_ways_to_generate(name: str) -> None:
    """Who passes a cache, over the turns of a chat, too, has tokens proposed, or asks for what depends on a cache's
    length generates as on a model that was not prepared."""
    model = model_of("llama")
    model.set_attn_implementation("eager")

    def turns() -> Any:
        arguments, text = _OTHERS[name](model), prompt(7)
        for _ in range(1 + ("past_key_values" in arguments)):
            found = text_of(model, text, 6, **arguments)
            text = torch.cat([getattr(found, "sequences", found), prompt(3)], 1)
        return found if torch.is_tensor(found) else (found.sequences, found.attentions)

    expected = turns()
    prepare_generation(model, length=32, tune="off")
    torch.testing.assert_close(turns(), expected)


@pytest.mark.parametrize("window", [16, pytest.param(32, marks=pytest.mark.exhaustive)])
def test_turns_in_a_sliding_window(window: int) -> None:
    """Turns of a chat that a window has room for share a graph, however much it holds; what goes beyond it runs as
    before. The text is that of the model that was not prepared."""
    torch.manual_seed(0)
    config = transformers.Gemma3TextConfig(**_TWO, **_TURNS, sliding_window=window)
    model: Any = fastlinear.convert(transformers.AutoModelForCausalLM.from_config(config).eval())

    def turns() -> Any:
        cache, text = transformers.StaticCache(config=config, max_cache_len=48), prompt(3)
        for more in (4, 2, 5):
            text = torch.cat([text_of(model, text, 4, past_key_values=cache), prompt(more)], 1)
        return text

    expected = turns()
    prepare_generation(model, length=48, tune="off")
    assert torch.equal(turns(), expected)
    graphs = recorded(model)
    assert len(graphs) == (3 if window == 32 else 4) and not any(isinstance(each, str) for each in graphs)


def test_what_a_model_is_saved_with(tmp_path: Path) -> None:
    """Preparing is nothing of the model's own: what it is asked for by default, and saved with, is what it was, and a
    config in the place of its own has graphs, too."""
    model = model_of("llama")
    before = model.generation_config.to_dict()
    prepare_generation(model, tune="off")
    text = text_of(model, prompt(4), 6)
    assert model.generation_config.to_dict() == before
    model.save_pretrained(tmp_path)
    other = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert other.generation_config.cache_implementation is None and torch.equal(text_of(other, prompt(4), 6), text)
    count = len(recorded(model))
    model.generation_config = transformers.GenerationConfig(pad_token_id=0)
    assert torch.equal(text_of(model, prompt(4), 6), text) and len(recorded(model)) == count


def test_autocast_generates_as_before() -> None:
    """Keys and values of two dtypes, which autocast makes, fit no preallocated cache."""
    model = model_of("llama")
    with torch.autocast("cpu", torch.bfloat16):
        expected = text_of(model, prompt(5), 6)
        assert torch.equal(text_of(prepare_generation(model, tune="off"), prompt(5), 6), expected)


_NONE: dict[str, tuple[Any, str]] = {
    "gpt_neo": (
        lambda: transformers.GPTNeoConfig(
            vocab_size=97, hidden_size=48, num_layers=2, num_heads=4, attention_types=[[["global", "local"], 1]],
            window_size=8, max_position_embeddings=64, pad_token_id=0, eos_token_id=None,
        ),
        "transformers does not let its cache be preallocated",
    ),
    "falcon": (
        lambda: transformers.FalconConfig(
            vocab_size=97, hidden_size=48, num_hidden_layers=1, num_attention_heads=6, alibi=True, pad_token_id=0,
            eos_token_id=None,
        ),
        "its ALiBi is as long as the prompt, and not as a preallocated cache",
    ),
    "lfm2": (
        lambda: transformers.Lfm2Config(**_TWO, layer_types=["conv", "full_attention"]),
        "its cache has a LinearAttentionLayer, which cannot be preallocated",
    ),
    "t5": (
        lambda: transformers.T5Config(
            vocab_size=97, d_model=48, d_kv=8, num_heads=6, d_ff=64, num_layers=1, pad_token_id=0, eos_token_id=None,
            decoder_start_token_id=0,
        ),
        "it is an encoder and a decoder, and only decoders are recorded",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", _NONE)
def test_models_without_graphs(name: str, caplog: pytest.LogCaptureFixture) -> None:
    """A model that no graph can stand for is told of when it is prepared, and generates as before."""
    torch.manual_seed(0)
    make, reason = _NONE[name]
    kind = transformers.AutoModelForSeq2SeqLM if name == "t5" else transformers.AutoModelForCausalLM
    model = fastlinear.convert(kind.from_config(make()).eval())
    expected = text_of(model, prompt(9), 6)
    with caplog.at_level(logging.WARNING, "fastlinear"):
        prepare_generation(model, tune="off")
    (told,) = (record.message for record in caplog.records if "without a graph" in record.message)
    assert told == f"{type(model).__name__} generates without a graph: {reason}"
    assert torch.equal(text_of(model, prompt(9), 6), expected)


_BEGUN: dict[str, Any] = {"original_max_position_embeddings": 16}


def test_tensors_that_a_model_keeps(caplog: pytest.LogCaptureFixture) -> None:
    """A model that keeps what it makes in its first call keeps no tensor of a recording's, and has graphs from then on,
    also where a prompt is short and the answer takes the rotary embedding of long ones."""
    torch.manual_seed(0)
    rope = {"rope_type": "longrope", "short_factor": [1.0] * 4, "long_factor": [8.0] * 4, "rope_theta": 1e4}
    sizes = {name: size for name, size in _SIZES.items() if name != "head_dim"} | _BEGUN
    config = transformers.Phi3Config(**sizes, rope_parameters=rope | _BEGUN)
    model: Any = fastlinear.convert(transformers.AutoModelForCausalLM.from_config(config).eval())
    fast = prepare_generation(copy.deepcopy(model), tune="off")
    with caplog.at_level(logging.WARNING, "fastlinear"):
        for _ in range(2):
            assert torch.equal(text_of(fast, prompt(9), 16), text_of(model, prompt(9), 16))
    assert not [record for record in caplog.records if "without a graph" in record.message]
    assert all(isinstance(each, tuple) for each in recorded(fast)) and len(recorded(fast)) == 2


def test_modules_that_change_in_every_call(caplog: pytest.LogCaptureFixture) -> None:
    """A model that is another one after each call is recorded no more after some, and told of."""
    model = model_of("llama")
    layer = model.model.layers[0]
    plain = layer.forward

    def counting(hidden_states: Any, **rest: Any) -> Any:
        layer.calls = getattr(layer, "calls", 0) + 1
        return plain(hidden_states, **rest)

    layer.forward = counting
    expected = text_of(model, prompt(4), 12)
    prepare_generation(model, tune="off")
    with caplog.at_level(logging.WARNING, "fastlinear"):
        assert torch.equal(text_of(model, prompt(4), 12), expected)
    calls = layer.calls
    assert torch.equal(text_of(model, prompt(4), 12), expected) and layer.calls == calls + 12
    (told,) = (record.message for record in caplog.records if "without a graph" in record.message)
    assert told.endswith("its modules change from call to call")


def test_threads_record_one_after_the_other() -> None:
    """torch says of all threads that they compile while one records: no other does meanwhile, after which it would say
    so for ever, and a call of another thread waits for its graph."""
    model = model_of("llama")
    expected = [text_of(model, prompt(length), 6) for length in (3, 5)]
    prepare_generation(model, tune="off")
    inside, most = 0, 0
    plain = recording.recorded

    def counted() -> Any:
        nonlocal inside, most
        inside += 1
        most = max(most, inside)
        time.sleep(0.05)
        inside -= 1
        return plain()

    found: dict[int, Any] = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(recording, "recorded", counted)
        threads = [
            threading.Thread(target=lambda i=i, n=n: found.update({i: text_of(model, prompt(n), 6)}))
            for i, n in enumerate((3, 5))
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert most == 1 and not torch.compiler.is_compiling()
    assert all(torch.equal(found[i], text) for i, text in enumerate(expected))
    assert len(recorded(model)) == 2


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
