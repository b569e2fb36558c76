"""A weight that several processes share: of a DTensor the kernels have the part that lies in this one's memory.

transformers' tensor parallelism has its layers compute on that part, which it lends them as a plain tensor for each
call. torch's `parallelize_module` calls them with x as a DTensor: `answer` has the kernels multiply the parts, and says
what their products are of the whole.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor


class Shard(NamedTuple):
    """How a weight lies in the memories of a mesh of processes; `shape` and `stride` are those of the whole."""

    mesh: Any
    placements: tuple[Any, ...]
    shape: torch.Size
    stride: tuple[int, ...]

    def whole(self, part: Tensor) -> Tensor:
        """The DTensor of which every process has its part."""
        wrapped: Tensor = _class().from_local(
            part, self.mesh, self.placements, run_check=False, shape=self.shape, stride=self.stride
        )
        return wrapped


def _class() -> Any:
    return getattr(sys.modules.get("torch.distributed.tensor"), "DTensor", None)


def is_shared(tensor: object) -> bool:
    """Whether a tensor is a DTensor."""
    kind = _class()
    return kind is not None and isinstance(tensor, kind)


def shard_of(tensor: Any) -> Shard | None:
    """How a DTensor lies in memories; None for any other tensor."""
    if not is_shared(tensor):
        return None
    return Shard(tensor.device_mesh, tensor.placements, tensor.shape, tensor.stride())


def local(tensor: Any) -> Any:
    """What of a tensor lies in this process's memory, as a plain tensor: all of it, unless it is a DTensor."""
    if not is_shared(tensor):
        return tensor
    with torch.no_grad():
        return tensor.to_local()


def is_unsummed(tensor: Any) -> bool:
    """Whether a tensor is a DTensor of which a part says nothing by itself."""
    shard = shard_of(tensor)
    return shard is not None and any(placement.is_partial() for placement in shard.placements)


class _Way(NamedTuple):
    """Along one dimension of a mesh: where the product lies, and the gradients of x, weight and bias."""

    y: Any
    x: Any
    weight: Any
    bias: Any
    summed: bool  # each process has a part of the sum


def _way(placed_weight: Any, placed_x: Any, n: int, last: int) -> _Way | None:
    """Where the product of such parts lies; `n` is the dimension of the weight's channels, `last` the last one of x."""
    from torch.distributed.tensor import Partial, Replicate
    from torch.distributed.tensor import Shard as Cut

    if not all(type(placed) in (Cut, Replicate) for placed in (placed_weight, placed_x)):
        return None
    split = placed_x.dim % (last + 1) if placed_x.is_shard() else None
    if placed_weight.is_replicate() and split != last:
        summed = Replicate() if split is None else Partial()
        return _Way(placed_x, placed_x, summed, summed, False)
    if placed_weight.is_shard(n) and split is None:
        return _Way(Cut(last), Partial(), placed_weight, Cut(0), False)
    if placed_weight.is_shard(1 - n) and split == last:
        return _Way(Partial(), placed_x, placed_weight, Partial(), True)
    return None


def answer(layer: Any, x: Any, shard: Shard) -> Tensor | None:
    """layer(x) of a DTensor x, by the kernels; None where the parts of x and of the weight do not meet."""
    if x.device_mesh != shard.mesh or x.dim() == 0 or x.shape[-1] != shard.shape[0 if layer._transposed else 1]:
        return None
    n, last = int(layer._transposed), x.dim() - 1
    found = [_way(*placed, n, last) for placed in zip(shard.placements, x.placements, strict=True)]
    ways = [way for way in found if way is not None]
    summed = [dim for dim, way in enumerate(ways) if way.summed]
    if len(ways) < len(found) or (summed and layer.activation is not None and layer._absorbed is None):
        return None  # an activation of the layer's own is one of the sum
    weight, bias = layer._parameters.get("weight"), layer.bias
    parts: dict[str, Any] = {
        "weight": None if weight is None else weight.to_local(grad_placements=[way.weight for way in ways]),
        "bias": None if bias is None else bias.to_local(grad_placements=[way.bias for way in ways]),
    }
    if bias is not None and summed:
        # One of those whose parts are summed adds it. A product, since autograd of all is to come by here.
        first = all(shard.mesh.get_local_rank(dim) == 0 for dim in summed)
        parts["bias"] = parts["bias"] * float(first)
    with _lent(layer, parts):
        y = layer._engine.forward(layer, x.to_local(grad_placements=[way.x for way in ways]))
    shape = torch.Size((*x.shape[:-1], shard.shape[n]))
    return Shard(shard.mesh, tuple(way.y for way in ways), shape, _dense(shape)).whole(y)


def _dense(shape: torch.Size) -> tuple[int, ...]:
    return torch.empty(shape, dtype=torch.uint8, device="meta").stride()


@contextmanager
def _lent(layer: Any, parts: dict[str, Tensor | None]) -> Iterator[None]:
    held = {name: layer._parameters.get(name) for name in parts}
    layer._parameters.update(parts)
    try:
        yield
    finally:
        layer._parameters.update(held)
