"""Generation through torch.compile(backend="fastlinear") on a preallocated cache."""

from pathlib import Path
from typing import Any

import pytest
import torch
from ggufs import fields_of, on_meta, tensors_of, write
from torch._dynamo.utils import counters

import fastlinear


@pytest.mark.parametrize(
    ("architecture", "graphs"),
    [
        pytest.param("llama", 2, marks=pytest.mark.exhaustive),
        pytest.param("qwen3", 2, marks=pytest.mark.exhaustive),
        ("gemma3", 3),
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
    torch._dynamo.reset()
    counters.clear()
    with torch.inference_mode():
        expected = model.generate(ids, **wanted)
        model.forward = torch.compile(model.forward, backend="fastlinear", fullgraph=True)
        text = model.generate(ids, cache_implementation="static", **wanted)
    assert torch.equal(text, expected)
    assert counters["stats"]["unique_graphs"] == graphs
    torch._dynamo.reset()
