"""load_quantized: checkpoints that others quantized, read without their packages."""

from __future__ import annotations

import os
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from fastlinear.file import folders, gguf
from fastlinear.file.architectures import EXPERTS, FREQUENCIES, architecture_of, check_config, expert_part
from fastlinear.file.filling import Source, fill, with_ties
from fastlinear.file.gguf import Gguf
from fastlinear.file.safetensors import AnyPath, faults_of, shown
from fastlinear.model.arguments import check_module
from fastlinear.model.encoders import forbid_bypasses
from fastlinear.spec import ggml
from fastlinear.spec.packed import Weight, stands_for

Model = TypeVar("Model", bound=nn.Module)

_ROW = "ffn_gate_inp_shexp.weight"  # a layer of one channel, which files have as a vector


def load_quantized(path: AnyPath, model: Model, *, dynamic: bool = False) -> Model:
    """Give `model` the weights of a checkpoint that others quantized, bit for bit, and return it.

    path: a GGUF file of Llama, Mistral, Mixtral, Qwen 2 and 3 (MoE, too) or Gemma 3, with tensors of Q4_0, Q4_1, Q5_0,
        Q5_1, Q8_0, Q4_K, Q5_K, Q6_K, IQ4_NL, F16, BF16 or F32, or the first of several files of a model; or a folder of
        safetensors files whose config.json has a quantization_config of GPTQ, AWQ (gemm), AutoRound, compressed-tensors
        (pack-quantized, int8 and fp8), bitsandbytes (nf4, fp4, int8), HQQ (4 bits, axis 1), fp8 in blocks, or the MXFP4
        experts of gpt-oss; of all but the last, experts of a mixture may be stored one by one.
    model: the model of transformers, on the meta device or with any weights, which go unread; for a GGUF file a causal
        language model. Its dtype is that of its activations; what the file has in floats is rounded to it
        where it is narrower.
    dynamic: whether linear layers quantize their inputs in each call, too, to 8 bits in the groups of the weight, as
        llama.cpp does and `Int4Dynamic`: integer products are faster, and answers no longer those of the dequantized
        weights. Layers whose codes stand for no integers (nf4), or are not in groups, and experts stay as they are.

    Linear layers become fast ones, frozen over their packed weights, which come straight from the file: no copy in 16
    bits is ever made. What has no packed form of its own is unpacked to the model's dtype, and `report` says so.
    Embeddings are not unpacked either: they look up rows of the mapped file. Parameters need no gradients.

    Raises FormatError for a file that is damaged, of another model, or holds what is not supported, and names the
    tensor; OSError as the system gives it. The model is then as it was. TypeError where `dynamic` is no bool.
    """
    if not isinstance(dynamic, bool):
        raise TypeError(f"load_quantized(dynamic=...) must be True or False, but is {dynamic!r}")
    check_module("load_quantized", model)
    if not isinstance(path, (str, bytes, os.PathLike)):
        raise TypeError(f"load_quantized() reads the path of a file or a folder, but was given {type(path).__name__}")
    with faults_of(path):
        if os.path.isdir(path):
            fill(model, with_ties(model, folders.sources(folders.open_folder(path), model)), dynamic)
        else:
            fill(model, _sources(gguf.open_mapped(path), model), dynamic)
    forbid_bypasses(model)
    return model


def _sources(mapped: Gguf, model: Any) -> dict[str, Source]:
    """The tensors of a GGUF file by their names in `model`."""
    name, architecture = architecture_of(mapped.fields)
    check_config(mapped.fields, name, getattr(model, "config", None), _stretched(mapped))
    whole = hasattr(model, "lm_head")  # else it is what lies within the causal model
    sources: dict[str, Source] = {}
    of_experts: dict[str, dict[str, str]] = {}
    for stored, entry in mapped.entries.items():
        if stored == FREQUENCIES:
            continue
        target = architecture.name(stored)
        if target is None:
            raise ValueError(f"it has the tensor {shown(stored)}, which no {name} model has")
        target = target if whole else target.removeprefix("model.")
        if (part := expert_part(stored)) is not None:
            of_experts.setdefault(target, {})[part] = stored
            continue
        if stored.endswith(_ROW) and len(entry.shape) == 1:
            entry = entry._replace(shape=(1, *entry.shape))
        heads = architecture.heads(stored, mapped.fields, name)
        shift = architecture.shift if architecture.is_norm(stored) else 0.0
        if target in sources:
            raise ValueError(f"it has a second tensor {shown(stored)}")
        sources[target] = _source(mapped, stored, entry, heads, shift)
    sources |= {target: _of_experts(mapped, parts) for target, parts in of_experts.items()}
    embedded = sources.get("model.embed_tokens.weight")
    if whole and embedded is not None:
        sources.setdefault("lm_head.weight", embedded)
    return sources


def _stretched(mapped: Gguf) -> float:
    """By how much the slowest frequency of the rotary embedding is divided."""
    entry = mapped.entries.get(FREQUENCIES)
    if entry is None or entry.kind != "F32" or not entry.nbytes:
        return 1.0
    return float(mapped.rows(FREQUENCIES).view(torch.float32).max())


def _source(mapped: Gguf, stored: str, entry: gguf.Entry, heads: int, shift: float) -> Source:
    floating = ggml.is_floating(entry.kind)

    def release() -> None:
        mapped.release(stored)

    if not heads and not shift:
        rows = mapped.rows(stored)
        return Source(
            entry.shape, entry.kind, lambda: ggml.unpack(entry.kind, rows), rows, floating, release,
            part=lambda begin, end: ggml.unpack(entry.kind, rows[begin:end]),
        )  # fmt: skip
    if heads and entry.shape[0] % (2 * heads):
        raise ValueError(f"its {shown(stored)} has {entry.shape[0]} rows, which {heads} heads do not share")

    def read() -> Weight:
        rows = mapped.rows(stored).reshape(entry.shape[0], -1)
        if heads:
            rows = rows[torch.arange(len(rows), device="cpu").view(heads, -1, 2).transpose(1, 2).flatten()]
        unpacked = ggml.unpack(entry.kind, rows)
        return stands_for(unpacked) - shift if shift else unpacked

    return Source(entry.shape, entry.kind, read, None, floating, release)


def _of_experts(mapped: Gguf, parts: dict[str, str]) -> Source:
    """The weights of all experts of one product: those of a file's tensors, gates before what goes through them."""
    stored = [parts[part] for part in EXPERTS if part in parts]
    entries = [mapped.entries[name] for name in stored]
    kind, *others = [entry.kind for entry in entries]
    if any(len(entry.shape) != 3 or 0 in entry.shape for entry in entries):
        raise ValueError(f"its {shown(stored[0])} is {list(entries[0].shape)}, which holds no experts")
    (count, _, k), *rest = [entry.shape for entry in entries]
    if any(other != kind for other in others) or any((e, columns) != (count, k) for e, _, columns in rest):
        told = " and ".join(f"{shown(n)} {e.kind} {list(e.shape)}" for n, e in zip(stored, entries, strict=True))
        raise ValueError(f"its {told} are no weights of one product: kinds, experts and columns have to be the same")
    rows = [mapped.rows(name).view(count, entry.shape[1], -1) for name, entry in zip(stored, entries, strict=True)]

    def expert(which: int) -> Any:  # floats, or Coded
        return ggml.unpack(kind, torch.cat([each[which] for each in rows]))

    def read() -> Tensor:
        return torch.stack([stands_for(expert(which)) for which in range(count)])

    def release() -> None:
        for name in stored:
            mapped.release(name)

    shape, floating = (count, sum(entry.shape[1] for entry in entries), k), ggml.is_floating(kind)
    return Source(shape, kind, read, floating=floating, release=release, expert=None if floating else expert)
