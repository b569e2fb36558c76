"""Embeddings in 8 bits, and the heads of language models, which often have the same weight."""

from __future__ import annotations

import warnings
from collections.abc import Collection, Iterator
from contextlib import ExitStack
from typing import Any, NamedTuple

import torch
from torch import nn

import fastlinear._tensors as _tensors
from fastlinear.layer import embedding, linear, packs, takeover
from fastlinear.layer.embedding import PACKED
from fastlinear.layer.fitness import why_no_twin
from fastlinear.layer.frozen import Frozen
from fastlinear.layer.quality import note_weight
from fastlinear.spec.precision import Precision
from fastlinear.spec.schemes import Int8WeightOnly

_HEAD = "lm_head"


class Table(NamedTuple):
    """One weight [rows, k], of embeddings that look it up, and of linear layers that multiply by it."""

    weight: nn.Parameter
    lookups: list[nn.Module]
    heads: list[nn.Module]


def tables_of(
    model: nn.Module, scheme: object, reasons: dict[nn.Module, str | None], excluded: Collection[nn.Module]
) -> list[Table]:
    """The weights that are to be packed in 8 bits: those of embeddings, and of what is called lm_head; none if `scheme`
    is None. TypeError for one that is not Int8WeightOnly().

    reasons: why linear layers are left alone; those that are here are taken out. A weight whose layer, or embedding
    (`excluded`), the caller has excluded stays, and so does one that something else uses, with a warning.
    """
    if scheme is None:
        return []
    if not isinstance(scheme, Int8WeightOnly):
        raise TypeError(f"embeddings must be Int8WeightOnly() or None, but is {scheme!r}")
    tables: dict[int, Table] = {}
    for name, module in model.named_modules():
        weight = module._parameters.get("weight")
        lookup, head = isinstance(module, nn.Embedding), name.rpartition(".")[2] == _HEAD and module in reasons
        if weight is not None and (lookup or head):
            table = tables.setdefault(id(weight), Table(weight, [], []))
            if lookup:
                table.lookups.append(module)
    for module in reasons:
        weight = module._parameters.get("weight")
        if weight is not None and id(weight) in tables and not takeover.is_foreign(module):
            tables[id(weight)].heads.append(module)
    found = []
    for table in tables.values():
        unwished = any(str(reasons[head]).startswith(("excluded", "refused")) for head in table.heads)
        if unwished or any(lookup in excluded for lookup in table.lookups):
            continue
        reason = _why_not(model, table)
        if reason is None:
            found.append(table)
        elif table.lookups:
            names = [name for name, module in model.named_modules() if module in table.lookups]
            warnings.warn(f"the embedding {names[0]!r} stays as it is: {reason}", stacklevel=3)
    for head in (head for table in found for head in table.heads):
        del reasons[head]
    return found


def _why_not(model: nn.Module, table: Table) -> str | None:
    weight, users = table.weight, {*table.lookups, *table.heads}
    if not users:
        return "its layer cannot be converted"
    for module in model.modules():
        if module not in users and any(each is weight for each in module._parameters.values()):
            return f"its weight is that of a {type(module).__name__}, too"
    if type(weight) is not nn.Parameter or weight.device.type != "cpu" or weight.layout is not torch.strided:
        return "its weight is no dense CPU Parameter"
    if weight.dim() != 2 or weight.numel() == 0 or weight.dtype not in _tensors.FORMATS:
        return f"its weight is {weight.dtype} {list(weight.shape)}"
    if not bool(torch.stack(weight.detach().aminmax()).isfinite().all()):
        return "its weight has infinities or NaN, which no integers stand for"
    reasons = (*map(embedding.why_no_rows, table.lookups), *map(why_no_twin, table.heads))
    return next((reason for reason in reasons if reason is not None), None)


def pack(undo: ExitStack, table: Table, twin: dict[Any, Any], names: dict[Any, str], mode: str) -> None:
    """Puts one pack in the place of a weight, for all that have it."""
    weight = table.weight
    packed = packs.pack_apart(weight, Precision(PACKED))
    note_weight(packed, weight)
    frozen = Frozen(packed, weight.dtype, weight.requires_grad)
    for module in (*table.lookups, *table.heads):
        there = twin[module]
        copied = {name: dict(vars(there)[name]) for name in ("_parameters", "_buffers")}
        undo.callback(_put_back, there, (type(there), {**vars(there), **copied}))
        if module in table.lookups:
            embedding.look_up_pack(there, frozen)
            continue
        if linear.is_fast(there):
            linear.release(there)
        linear.adopt(there, None, mode, names[module], Precision(PACKED), frozen)
        undo.callback(linear.release, there)


def _put_back(module: Any, before: tuple[type, dict[str, Any]]) -> None:
    takeover.put_back(module, before)
    if linear.is_fast(module):
        module._reset()


def packed_embeddings(model: nn.Module) -> Iterator[tuple[str, Any, Frozen]]:
    """Name, module and pack of the embeddings of a model that look up the rows of one."""
    for name, module in model.named_modules():
        frozen = embedding.pack_of(module)
        if frozen is not None:
            yield name, module, frozen
