"""A model filled with the weights of a checkpoint that others wrote, which go into packs as they come."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

import fastlinear._weights as _weights
from fastlinear.file.matching import Held, listed, need_the_same, tensors_of
from fastlinear.layer import embedding, experts, experts_frozen, linear, mixture, packs, takeover
from fastlinear.layer.fitness import dtype_of, why_no_twin
from fastlinear.layer.frozen import Frozen
from fastlinear.layer.shelf import Shelf, Uneven, shelve
from fastlinear.spec import programs
from fastlinear.spec.formats import name_of
from fastlinear.spec.int4 import Coded, coding_of
from fastlinear.spec.int8 import Rows
from fastlinear.spec.packed import Weight, stands_for, with_offsets
from fastlinear.spec.precision import Precision


class Source(NamedTuple):
    """A tensor of a checkpoint. label: how it is held there, "Q4_0", say; read: what it stands for; rows: its bytes,
    uint8 [N, bytes], where it is of one of ggml's kinds, which `label` then is; floating: whether it is plain floats;
    release: lets go of the pages of the file that reading brought into memory; expert: where it is of the weights of
    experts, that of one of them; part: what its channels from one up to another stand for, where it can be read so."""

    shape: tuple[int, ...]
    label: str
    read: Callable[[], Weight]
    rows: Tensor | None = None
    floating: bool = False
    release: Callable[[], object] = lambda: None
    expert: Callable[[int], Weight] | None = None
    part: Callable[[int, int], Weight] | None = None


_AT_ONCE = 524288  # elements of a weight that are read and packed at a time, where it can be had in parts
_PANELS = 64  # channels that are whole panels in every layout


def fill(model: nn.Module, sources: Mapping[str, Source], dynamic: bool) -> None:
    """Gives a model the tensors of these names; ValueError where they are others than it has, and nothing is changed.

    Weights of nn.Linear are packed, one after the other, those of nn.Embedding stay packed rows, all else becomes
    Parameters of the model's dtypes. Buffers that no file has are made by the model, where they are on meta. dynamic:
    as of `load_quantized`.
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
                if id(source) not in frozen:
                    frozen[id(source)] = _packed(name, source, dtype_of(each.module))
        parameters = {
            name: nn.Parameter(_floats(sources[name]).to(each.tensor.dtype), requires_grad=False)
            for name, each in held.items()
            if not _is_linear(each) and not _is_rows(each, sources[name]) and sources[name].expert is None
        }
        mixtures = {each.module: name for name, each in held.items() if sources[name].expert is not None}
        shelves = {module: _shelved(module, name.rpartition(".")[0], sources) for module, name in mixtures.items()}
        precisions = {key: _precision(record, dynamic) for key, record in frozen.items()}
        _revive(model, bare)  # from here on nothing fails
        for name, each in held.items():
            if name in parameters:
                setattr(each.module, each.attribute, parameters[name])
            elif _is_rows(each, sources[name]):
                embedding.look_up(each.module, sources[name].rows, sources[name].label)  # type: ignore[arg-type]
        for module, of_experts in shelves.items():
            _become_experts(module, *of_experts)
        names = {each.module: name.removesuffix(".weight") for name, each in held.items() if _is_linear(each)}
        for module, name in names.items():
            key = id(sources[f"{name}.weight"])
            linear.adopt(module, None, "lazy", name, precisions[key], frozen[key])


def _shelved(module: Any, name: str, sources: Mapping[str, Source]) -> tuple[str, experts_frozen.Frozen]:
    """The name of experts, and their packs, which are made one after the other; ValueError where one is no weight."""
    form: Any = mixture.form_of(module)
    own = [sources[f"{name}.{each}" if name else each] for each in experts.names_of(module)]
    try:
        held = experts.dtype_of(module)
        first = _shelf(own[0], held, form.interleaved, programs.is_gated(form.program))
        second = _shelf(own[1], held, False, False)
    except ValueError as error:
        raise ValueError(f"its {name}: {error}") from error
    return name, experts_frozen.Frozen(first, second, held, (False, False), f"from {own[0].label}")


def _shelf(source: Source, held: torch.dtype, interleaved: bool, gated: bool) -> Shelf:
    read, count = source.expert, source.shape[0]
    assert read is not None

    def every(offsets: bool) -> Iterator[_weights.Packed]:
        for expert in range(count):
            weight = read(expert)
            if isinstance(weight, Coded) and weight.order is not None:
                raise ValueError(
                    "the columns of its experts are in orders of their own (desc_act), as layers alone have"
                )
            if isinstance(weight, Coded):
                weight = _in_halves(weight) if interleaved else weight
                weight = with_offsets(weight) if offsets else weight
            source.release()
            yield takeover.packed_for(weight, held, gated)

    try:
        return shelve(every(False), count)
    except Uneven:  # the zero points of some experts may happen to be those of symmetric ones
        return shelve(every(True), count)


def _in_halves(coded: Coded) -> Coded:
    """With rows that take turns one kind behind the other."""
    rows = [torch.cat([t[::2], t[1::2]]) for t in (coded.codes, coded.scale.view(torch.uint8))]
    return dataclasses.replace(coded, codes=rows[0], scale=rows[1].view(coded.scale.dtype))


def _precision(frozen: Frozen, dynamic: bool) -> Precision:
    precision, k = takeover.precision_of(frozen), frozen.packed.k
    coding = precision.coding
    whole = coding is not None and coding.is_whole and min(k, coding.group) <= _weights.dot_limit()
    return precision._replace(rows=Rows("groups") if dynamic and whole else None)


def _become_experts(module: Any, name: str, frozen: experts_frozen.Frozen) -> None:
    own = frozen.first.format == name_of(frozen.dtype)
    coding = coding_of(frozen.first.packs[0])
    experts.adopt(module, "lazy", name, Precision(None if own else frozen.first.format, coding=coding))
    experts_frozen.hold(module, frozen)


def _is_linear(each: Held) -> bool:
    return each.attribute == "weight" and isinstance(each.module, nn.Linear)


def _is_rows(each: Held, source: Source) -> bool:
    return each.attribute == "weight" and isinstance(each.module, nn.Embedding) and source.rows is not None


def with_ties(model: nn.Module, sources: Mapping[str, Source]) -> dict[str, Source]:
    """The same, and for parameters of a model that are missing there those of the Parameter that they are."""
    held = {each.name: each.tensor for each in tensors_of(model)}
    known = {id(held[name]): source for name, source in sources.items() if name in held}
    ties = {name: known[id(tensor)] for name, tensor in held.items() if name not in sources and id(tensor) in known}
    return {**sources, **ties}


def _check(model: nn.Module, held: Mapping[str, Held], sources: Mapping[str, Source]) -> None:
    missing = [name for name in held if name not in sources]
    unexpected = [name for name in sources if name not in held]
    need_the_same(model, missing, unexpected)
    for name, each in held.items():
        shape, source = tuple(each.tensor.shape), sources[name]
        if shape != source.shape:
            raise ValueError(f"its {name} is {list(source.shape)}, but {list(shape)} in this {type(model).__name__}")
        reason = None
        if _is_linear(each):
            reason = why_no_twin(each.module)
        elif _is_rows(each, source):
            reason = embedding.why_no_rows(each.module)
        elif source.expert is not None:
            reason = _why_no_experts(each, name, sources)
        elif not source.floating:
            reason = "only linear layers and embeddings can be quantized"
        if reason is not None:
            raise ValueError(f"its {name} is {source.label}, which this model cannot have: {reason}")


def _why_no_experts(each: Held, name: str, sources: Mapping[str, Source]) -> str | None:
    names = experts.names_of(each.module)
    others = (sources[name.removesuffix(each.attribute) + own] for own in names)
    if any(other.expert is None for other in others):
        return f"only one of {' and '.join(names)} is so"
    if experts.is_fast_experts(each.module):
        return "these experts are fast already"
    return experts.why_no_twin(each.module)


def _floats(source: Source) -> Tensor:
    return stands_for(source.read()).reshape(source.shape)


def _packed(name: str, source: Source, held: torch.dtype) -> Frozen:
    try:
        return _frozen(source, held)
    except ValueError as error:
        raise ValueError(f"its {name}: {error}") from error
    finally:
        source.release()


def _frozen(source: Source, held: torch.dtype) -> Frozen:
    """A weight as a linear layer whose Parameter was of dtype `held` has it: bit for bit, unless told otherwise."""
    n, k = source.shape
    rows = max(1, _AT_ONCE // max(1, k) // _PANELS) * _PANELS
    if source.part is None or n <= rows:
        weight = source.read()
        packed = takeover.packed_for(weight, held)
    else:
        packed = packs.stitched(_in_parts(source, source.part, rows, held), n)
    kept = packed.grouped or source.floating or packed.format == "w8f"
    return Frozen(
        packed, held, origin=f"from {source.label}" if kept else f"unpacked from {source.label} to {packed.format}"
    )


def _in_parts(
    source: Source, part: Callable[[int, int], Weight], rows: int, held: torch.dtype
) -> Iterator[_weights.Packed]:
    for begin in range(0, source.shape[0], rows):
        yield takeover.packed_for(part(begin, min(begin + rows, source.shape[0])), held)
        source.release()


def _revive(model: Any, bare: list[Held]) -> None:
    """Gives buffers that no file has, tables of a rotary embedding, say, memory and what the model's class fills them
    with."""
    for each in bare:
        setattr(each.module, each.attribute, torch.empty_like(each.tensor, device="cpu"))
    for module in {each.module: None for each in bare}:
        model._init_weights(module)
