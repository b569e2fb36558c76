"""The packed weights of many experts in one piece of memory, each at a multiple of 64 bytes."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

import fastlinear._weights as _weights
from fastlinear.layer.packs import GatedPacked, kind_of, repack
from fastlinear.plan import table
from fastlinear.spec.packed import numbers

_LINE = 64


class Uneven(ValueError):
    """Of packs that are not of one layout."""


class Shelf:
    """packs: those of all experts, of one layout and size; panels: uint8 [experts, bytes], the memory that they lie in,
    where what follows an expert's panels up to the next line is nothing."""

    def __init__(self, panels: Tensor, layout: str, n: int, k: int, gated: bool) -> None:
        self.panels, self.layout, self.n, self.k, self.gated = panels, layout, n, k, gated
        nbytes = _weights.packed_nbytes(layout, n, k)
        kind = kind_of(gated)
        self.packs = tuple(kind.over(expert[:nbytes].numpy(), layout, n, k) for expert in panels)

    @property
    def form(self) -> tuple[str, int, int]:
        return self.layout, self.n, self.k

    @property
    def format(self) -> str:
        """That of the packs."""
        return str(self.packs[0].format)

    @property
    def nbytes(self) -> int:
        return self.panels.nbytes

    def unpack(self) -> Tensor:
        """What the packs stand for, [experts, n, k], gates before what goes through them."""
        return torch.stack([numbers(packed) for packed in self.packs])

    def __reduce__(self) -> Any:
        return _again, (self.panels.clone(), self.layout, self.n, self.k, self.gated)


def bytes_of(layout: str, n: int, k: int) -> int:
    """From one expert to the next."""
    return -(-_weights.packed_nbytes(layout, n, k) // _LINE) * _LINE


def shelve(packs: Iterable[_weights.Packed], count: int) -> Shelf:
    """A shelf of `count` packs, one made after the other, so that one at most is in memory twice; Uneven, a ValueError,
    where they are not of one layout."""
    panels = layout = None
    for i, packed in enumerate(packs):
        if panels is None or layout is None:
            layout = packed.layout
            panels = _memory(count, bytes_of(layout, packed.n, packed.k))
        if packed.layout != layout:
            raise Uneven(f"expert {i} would be packed as {packed.layout}, and those before it are as {layout}")
        panels[i, : packed.nbytes] = packed.data
    if panels is None or layout is None:
        raise ValueError("there are no experts")
    return Shelf(panels, layout, packed.n, packed.k, isinstance(packed, GatedPacked))


def on_this_machine(shelf: Shelf) -> Shelf:
    """The same in the layout that kernels read here."""
    wanted = table.layout(shelf.format)
    if wanted == table.base(shelf.layout):
        return shelf
    return shelve((repack(packed, wanted) for packed in shelf.packs), len(shelf.packs))


def _memory(count: int, size: int) -> Tensor:
    """uint8 [count, size] in pages such as packs lie in, which are read faster than torch's."""
    if count * size == 0:
        return torch.empty(count, size, dtype=torch.uint8, device="cpu")
    return torch.frombuffer(_weights.Block(count * size), dtype=torch.uint8).view(count, size)


def _again(panels: Tensor, *form: Any) -> Shelf:
    memory = _memory(*panels.shape)
    memory.copy_(panels)
    return on_this_machine(Shelf(memory, *form))
