"""A model filled with the weights of a checkpoint that others wrote, which go into packs as they come."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

import fastlinear._tensors as _tensors
from fastlinear.file.matching import Held, listed, tensors_of
from fastlinear.layer import embedding, linear, packs
from fastlinear.layer.fitness import dtype_of, why_no_twin
from fastlinear.layer.frozen import Frozen
from fastlinear.spec import ggml
from fastlinear.spec.formats import name_of
from fastlinear.spec.int4 import Coded, coding_of
from fastlinear.spec.precision import Precision


class Source(NamedTuple):
    """A tensor of a checkpoint. label: how it is held there, "Q4_0", say; read: what it stands for; rows: its bytes,
    uint8 [N, bytes], where it is of one of ggml's kinds, which `label` then is."""

    shape: tuple[int, ...]
    label: str
    read: Callable[[], ggml.Unpacked]
    rows: Tensor | None = None
    floating: bool = False  # whether `read` gives floats


def fill(model: nn.Module, sources: Mapping[str, Source]) -> None:
    """Gives a model the tensors of these names; ValueError where they are others than it has, and nothing is changed.

    Weights of nn.Linear are packed, one after the other, those of nn.Embedding stay packed rows, all else becomes
    Parameters of the model's dtypes. Buffers that no file has are made by the model, where they are on meta.
    """
    held = {each.name: each for each in tensors_of(model) if each.kind != "transient"}
    _check(model, held, sources)
    bare = [each for each in tensors_of(model) if each.kind == "transient" and each.tensor.is_meta]
    if bare and not hasattr(model, "_init_weights"):
        raise ValueError(f"it lacks {listed([each.name for each in bare])} of this {type(model).__name__}")
    with torch.inference_mode(False), torch.no_grad():
        frozen: dict[int, Frozen] = {}
        for name, each in held.items():
            if _is_linear(each):
                source = sources[name]
                frozen.setdefault(id(source), _frozen(source, dtype_of(each.module)))
        parameters = {
            name: nn.Parameter(_floats(sources[name]).to(each.tensor.dtype), requires_grad=False)
            for name, each in held.items()
            if not _is_linear(each) and not _is_rows(each, sources[name])
        }
        _revive(model, bare)
        for name, each in held.items():
            if name in parameters:
                setattr(each.module, each.attribute, parameters[name])
            elif _is_rows(each, sources[name]):
                embedding.look_up(each.module, sources[name].rows, sources[name].label)  # type: ignore[arg-type]
        names = {each.module: name.removesuffix(".weight") for name, each in held.items() if _is_linear(each)}
        for module, name in names.items():
            record = frozen[id(sources[f"{name}.weight"])]
            linear.adopt(module, None, "lazy", name, _precision(record), record)


def _is_linear(each: Held) -> bool:
    return each.attribute == "weight" and isinstance(each.module, nn.Linear)


def _is_rows(each: Held, source: Source) -> bool:
    return each.attribute == "weight" and isinstance(each.module, nn.Embedding) and source.rows is not None


def _check(model: nn.Module, held: Mapping[str, Held], sources: Mapping[str, Source]) -> None:
    missing = [name for name in held if name not in sources]
    unexpected = [name for name in sources if name not in held]
    if missing or unexpected:
        kind = type(model).__name__
        parts = [f"lacks {listed(missing)} of this {kind}"] if missing else []
        parts += [f"has {listed(unexpected)} that this {kind} has not"] if unexpected else []
        raise ValueError(f"it {' and '.join(parts)}")
    for name, each in held.items():
        shape, source = tuple(each.tensor.shape), sources[name]
        if shape != source.shape:
            raise ValueError(f"its {name} is {list(source.shape)}, but {list(shape)} in this {type(model).__name__}")
        reason = None
        if _is_linear(each):
            reason = why_no_twin(each.module)
        elif _is_rows(each, source):
            reason = embedding.why_no_rows(each.module)
        elif not source.floating:
            reason = "only linear layers and embeddings can be quantized"
        if reason is not None:
            raise ValueError(f"its {name} is {source.label}, which this model cannot have: {reason}")


def _floats(source: Source) -> Tensor:
    return ggml.numbers(source.read()).reshape(source.shape)


def _frozen(source: Source, held: torch.dtype) -> Frozen:
    """A weight as a linear layer whose Parameter was of dtype `held` has it: bit for bit, unless told otherwise."""
    unpacked = source.read()
    if isinstance(unpacked, Coded):
        return Frozen(packs.pack_coded(unpacked), held, origin=f"from {source.label}")
    floats = ggml.numbers(unpacked)
    wide = floats.dtype is torch.float32 and held is not torch.float32  # of which no kernel multiplies 16 bits by fp32
    floats = floats.to(held) if wide or floats.dtype not in _tensors.FORMATS else floats
    packed = packs.pack(floats, Precision(name_of(floats.dtype)))
    origin = f"from {source.label}" if source.floating else f"unpacked from {source.label} to {packed.format}"
    return Frozen(packed, held, origin=origin)


def _precision(frozen: Frozen) -> Precision:
    packed = frozen.packed
    own = name_of(frozen.dtype) == packed.format
    return Precision(None if own else packed.format, coding=coding_of(packed))


def _revive(model: Any, bare: list[Held]) -> None:
    """Gives buffers that no file has, tables of a rotary embedding, say, memory and what the model's class fills them
    with."""
    for each in bare:
        setattr(each.module, each.attribute, torch.empty_like(each.tensor, device="cpu"))
    for module in {each.module: None for each in bare}:
        model._init_weights(module)
