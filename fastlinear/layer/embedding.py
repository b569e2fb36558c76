"""FastEmbedding: an nn.Embedding whose rows stay as they were packed, and are unpacked when they are looked up.

Its rows are those of a mapped file, in one of ggml's kinds, or the channels of a pack of 8 bits, which the head of a
language model may have, too: such layers are tied by it, and the numbers are in memory once.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor, nn

from fastlinear.layer.frozen import Frozen, thaw_layer
from fastlinear.spec import ggml
from fastlinear.spec.packed import rows_of, stands_for

PACKED = "w8f"  # the format of packs that rows are looked up in


class _Rows(nn.Embedding):
    """The part of a FastEmbedding that looks rows up; it stands between the module's own class and nn.Embedding.

    packed_rows: uint8 [num_embeddings, bytes of a row], a buffer that no state dict has, or None where `_pack` has the
    rows.
    """

    packed_rows: Tensor
    _kind: str  # of spec.ggml.KINDS, or PACKED
    _held: torch.dtype
    _pack: Frozen | None

    def forward(self, input: Tensor) -> Tensor:
        ids = input.reshape(-1)
        if self._pack is not None:
            rows = rows_of(self._pack.panels, *self._pack.form, ids).to(self._held)
        else:
            rows = self._unpacked(self.packed_rows.index_select(0, ids))
        return rows.view(*input.shape, self.embedding_dim)

    def _unpacked(self, rows: Tensor) -> Tensor:
        return stands_for(ggml.unpack(self._kind, rows)).to(self._held)

    def whole(self) -> Tensor:
        """The weight, unpacked."""
        return self._unpacked(self.packed_rows) if self._pack is None else self._pack.unpack(False).to(self._held)

    def __getattr__(self, name: str) -> Any:
        if name == "weight" and self._parameters.get("weight") is None:
            # Model code asks it for its dtype in every call, and unpacked it is many times as large.
            return torch.empty(self.num_embeddings, self.embedding_dim, dtype=self._held, device="meta")
        return super().__getattr__(name)

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        destination[prefix + "weight"] = self.whole()
        super()._save_to_state_dict(destination, prefix, keep_vars)

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *rest: Any) -> None:
        if prefix + "weight" in state_dict:
            unpack_rows(self)  # after which it is no instance of this class
        nn.Module._load_from_state_dict(self, state_dict, prefix, *rest)

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        after = fn(torch.empty(0, dtype=self._held, device="cpu"))
        self._held = after.dtype
        if self._pack is not None and after.device.type != "cpu":
            unpack_rows(self)
        return nn.Embedding._apply(self, fn, recurse)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, rows={self._kind}"

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        stock = type(self).__mro__[1]  # the twin's class is made here, and pickle finds it through the module's own
        return _again, (stock, self.__dict__)


class FastEmbedding(_Rows):
    """An nn.Embedding over packed rows, as `load_quantized` and `convert(embeddings=...)` make them: y = rows[ids],
    unpacked to the dtype of the embedding.

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
    _become(module, kind, None)
    module.register_buffer("packed_rows", rows, persistent=False)


def look_up_pack(module: Any, frozen: Frozen) -> None:
    """The same over the channels of a pack in the format `PACKED`, which fast layers may have, too."""
    _become(module, PACKED, frozen)


def _become(module: Any, kind: str, pack: Frozen | None) -> None:
    held = module.weight.dtype if pack is None else pack.dtype
    module.__class__ = _twin(stock_of(module))
    vars(module).update(_kind=kind, _held=held, _pack=pack)
    module._parameters["weight"] = None


def unpack_rows(module: Any, weight: Tensor | None = None) -> None:
    """Turns such an embedding back into what it was, with a Parameter for its weight, which fast layers that are tied
    to it get, too; `weight`: that Parameter, where another embedding has been given it before."""
    tied = [] if module._pack is None else list(module._pack.layers)
    if tied:
        thaw_layer(tied[0])
        weight = tied[0].weight
    elif weight is None:
        weight = nn.Parameter(module.whole(), requires_grad=module._pack is not None and module._pack.requires_grad)
    make_plain(module)
    module.weight = weight


def make_plain(module: Any) -> None:
    """Turns such an embedding back into what it was, but without a weight."""
    stock = stock_of(module)
    module._buffers.pop("packed_rows", None)
    module._non_persistent_buffers_set.discard("packed_rows")
    for key in ("_kind", "_held", "_pack"):
        del vars(module)[key]
    module.__class__ = stock


def is_packed(module: nn.Module) -> bool:
    """Whether an embedding looks up packed rows."""
    return isinstance(module, _Rows)


def pack_of(module: Any) -> Frozen | None:
    """The pack that an embedding looks up its rows in; None for rows of a file, and other modules."""
    return module._pack if is_packed(module) else None


def stock_of(module: nn.Module) -> Any:
    """The class that an embedding is of, or was of."""
    cls = type(module)
    if not issubclass(cls, _Rows):
        return cls
    return nn.Embedding if cls is FastEmbedding else cls.__mro__[1]


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
