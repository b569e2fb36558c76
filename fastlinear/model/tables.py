"""Parameters that a model adds to its rows or looks rows up in, and never multiplies by: embeddings of positions and
tokens that are no nn.Embedding. They are no weights that could run fast."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn

import fastlinear._torch as _torch

# What reads a table, and what makes a view of one, as graphs and torch's dispatcher have them.
_READS = {"add", "cat", "embedding", "gather", "iadd", "index", "index_select", "interpolate", "upsample_bicubic2d"}
_VIEWS = {"alias", "contiguous", "detach", "expand", "expand_as", "flatten", "getitem", "permute", "reshape", "select"}
_VIEWS |= {"slice", "split", "squeeze", "to", "transpose", "unbind", "unsqueeze", "view"}


def is_table(readers: Iterable[str]) -> bool:
    """Whether a parameter that operations of these names read, and no others, is never multiplied."""
    names = {name.rstrip("_") for name in readers} - _VIEWS
    return bool(names) and names <= _READS


def is_view(name: str) -> bool:
    """Whether who reads the value of such an operation reads the parameter."""
    return name in _VIEWS


class Readers(_torch.TorchDispatchMode):  # type: ignore[misc]
    """Notes which operations read the memory of each parameter of a model in a call."""

    supports_higher_order_operators = True

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self._names: dict[int, set[str]] = defaultdict(set)
        self._operations: dict[int, set[str]] = defaultdict(set)
        for name, parameter in model.named_parameters():
            self._names[parameter.untyped_storage().data_ptr()].add(name)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = (part for each in args for part in (each if isinstance(each, (list, tuple)) else (each,)))
        for tensor in given:
            if isinstance(tensor, Tensor):
                address = tensor.untyped_storage().data_ptr()
                if address in self._names:
                    self._operations[address].add(str(getattr(func, "overloadpacket", func).__name__))
        return func(*args, **(kwargs or {}))

    def tables(self) -> set[str]:
        """The names of parameters that were never multiplied."""
        return {name for address, names in self._operations.items() if is_table(names) for name in self._names[address]}
