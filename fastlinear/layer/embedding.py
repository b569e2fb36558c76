"""FastEmbedding: an nn.Embedding whose rows stay as somebody packed them, and are unpacked when they are looked up."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor, nn

from fastlinear.spec import ggml
from fastlinear.spec.packed import stands_for


class _Rows(nn.Embedding):
    """The part of a FastEmbedding that looks rows up; it stands between the module's own class and nn.Embedding.

    packed_rows: uint8 [num_embeddings, bytes of a row], a buffer that no state dict has.
    """

    packed_rows: Tensor
    _kind: str  # of spec.ggml.KINDS
    _held: torch.dtype

    def forward(self, input: Tensor) -> Tensor:
        rows = self.packed_rows.index_select(0, input.reshape(-1))
        return self._unpacked(rows).view(*input.shape, self.embedding_dim)

    def _unpacked(self, rows: Tensor) -> Tensor:
        return stands_for(ggml.unpack(self._kind, rows)).to(self._held)

    def __getattr__(self, name: str) -> Any:
        if name == "weight" and self._parameters.get("weight") is None:
            # Model code asks it for its dtype in every call, and unpacked it is many times as large.
            return torch.empty(self.num_embeddings, self.embedding_dim, dtype=self._held, device="meta")
        return super().__getattr__(name)

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        destination[prefix + "weight"] = self._unpacked(self.packed_rows)
        super()._save_to_state_dict(destination, prefix, keep_vars)

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *rest: Any) -> None:
        if prefix + "weight" in state_dict:
            unpack_rows(self)  # after which it is no instance of this class
        nn.Module._load_from_state_dict(self, state_dict, prefix, *rest)

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        self._held = fn(torch.empty(0, dtype=self._held, device="cpu")).dtype
        return super()._apply(fn, recurse)  # type: ignore[no-untyped-call]

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, rows={self._kind}"

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        stock = type(self).__mro__[1]  # the twin's class is made here, and pickle finds it through the module's own
        return _again, (stock, self.__dict__)


class FastEmbedding(_Rows):
    """An nn.Embedding over packed rows of ggml's kinds, as `load_quantized` makes them: y = rows[ids], unpacked to the
    dtype of the embedding.

    Its rows may be mapped from a file, of which only those are read that are looked up. `weight` is on the meta device:
    it tells shape and dtype; `state_dict()` has it unpacked, and loading one makes an ordinary embedding again.
    """


def why_no_rows(module: nn.Module) -> str | None:
    """Why an embedding cannot look up packed rows; None if it can."""
    if not isinstance(module, nn.Embedding):
        return f"{type(module).__name__} is no nn.Embedding"
    return "its max_norm changes the weight in each call" if module.max_norm is not None else None


def look_up(module: Any, rows: Tensor, kind: str) -> None:
    """Turns an embedding into one over packed rows, in place; its own weight, on whatever device, goes unread."""
    held = module.weight.dtype
    stock: Any = type(module)
    module.__class__ = _twin(stock)
    vars(module).update(_kind=kind, _held=held)
    module._parameters["weight"] = None
    module.register_buffer("packed_rows", rows, persistent=False)


def unpack_rows(module: Any) -> None:
    """Turns such an embedding back into what it was, with a Parameter for its weight."""
    weight = nn.Parameter(module._unpacked(module.packed_rows), requires_grad=False)
    del module.packed_rows
    for key in ("_kind", "_held"):
        del vars(module)[key]
    module.__class__ = _stock(type(module))
    module.weight = weight


def is_packed(module: nn.Module) -> bool:
    """Whether an embedding looks up packed rows."""
    return isinstance(module, _Rows)


def _stock(twin: type[nn.Module]) -> type[nn.Module]:
    return nn.Embedding if twin is FastEmbedding else twin.__mro__[1]


@functools.cache
def _twin(stock: type) -> type[nn.Module]:
    """Of a subclass of nn.Embedding one whose calls of super().forward meet the packed rows."""
    if stock is nn.Embedding:
        return FastEmbedding
    return type(f"Fast{stock.__name__}", (stock, _Rows), {"__module__": __name__, "__doc__": FastEmbedding.__doc__})


def _again(stock: type, state: dict[str, Any]) -> nn.Module:
    cls = _twin(nn.Embedding if stock is _Rows else stock)
    module = cls.__new__(cls)
    module.__dict__.update(state)
    return module
