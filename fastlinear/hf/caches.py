"""A preallocated cache of transformers' as a graph sees it: its tensors, and what else of it decides a call."""

from __future__ import annotations

import copy
from collections.abc import Hashable, Iterable
from typing import Any, TypeAlias

import torch
from torch import Tensor
from transformers import StaticCache
from transformers.cache_utils import StaticLayer, StaticSlidingWindowLayer

from fastlinear.graph.capture import same_size
from fastlinear.graph.recording import Unrecorded

Sizes: TypeAlias = tuple[int, int, int]  # of a layer: heads, and their sizes in keys and in values

_LAYERS = (StaticLayer, StaticSlidingWindowLayer)
_TENSORS = ("keys", "values", "cumulative_length")  # of a layer
_COUNT = "cumulative_length_int"  # of one with a sliding window: how many tokens it has seen, which a call adds to


def why_not(config: Any) -> str | None:
    """Why a model of this config has no cache that a graph may run on, in a few words; None where it has."""
    layers = StaticCache(config=config, max_cache_len=1).layers
    others = sorted({type(layer).__name__ for layer in layers if type(layer) not in _LAYERS})
    return f"its cache has a {others[0]}, which cannot be preallocated" if others else None


def is_new(cache: Any) -> bool:
    """Whether a cache has no memory yet, and can be given it by `allocate`."""
    return all(type(layer) in _LAYERS and not layer.is_initialized for layer in cache.layers)


def allocate(cache: Any, batch: int, sizes: Iterable[Sizes], dtype: torch.dtype, device: torch.device) -> None:
    """Gives each layer its memory, which would else be a part of the first call."""
    for layer, (heads, *of_head) in zip(cache.layers, sizes, strict=False):
        shapes = ((batch, heads, 0, size) for size in of_head)
        layer.lazy_initialization(*(torch.empty(each, dtype=dtype, device=device) for each in shapes))


def release(cache: Any) -> None:
    """Undoes `allocate`."""
    for layer in cache.layers:
        layer.is_initialized, layer.keys, layer.values = False, None, None


def sizes_of(cache: Any) -> list[Sizes]:
    """Those of a cache that has its memory; else empty."""
    layers: list[Any] = cache.layers
    if not all(type(layer) in _LAYERS and layer.is_initialized for layer in layers):
        return []
    return [(layer.keys.shape[1], layer.keys.shape[3], layer.values.shape[3]) for layer in layers]


def told_sizes(model: Any, layers: int) -> list[Sizes]:
    """Those of a cache that there is none of yet, as far as transformers tells them; else empty."""
    told = getattr(model, "_get_static_cache_init_shape", None)
    if told is None or (shape := told()) is None:
        return []
    heads, sizes = (each if isinstance(each, list) else [each] * layers for each in shape)
    return [(h, size, size) for h, size in zip(heads, sizes, strict=True)]


def tensors(cache: Any) -> dict[str, Tensor]:
    """What a graph takes of a cache, by the names that it has there."""
    return {f"{i} {what}": getattr(layer, what) for i, layer in enumerate(cache.layers) for what in _TENSORS}


def count(cache: Any, rows: int) -> None:
    """Tells a cache of the rows that a graph has put in its tensors."""
    for layer in cache.layers:
        if hasattr(layer, _COUNT):
            layer.cumulative_length_int += rows


def state(cache: Any, rows: int) -> Hashable:
    """What of a cache, beside its tensors, decides a call of so many rows; None where a graph cannot tell."""
    states = [_state_of(layer, rows) for layer in cache.layers]
    if None in states:
        return None
    forms = [(layer.keys.shape, layer.values.shape, layer.keys.dtype) for layer in cache.layers]
    return (*zip(states, forms, strict=True),)


def _state_of(layer: Any, rows: int) -> str | None:
    if not layer.is_initialized or not layer.keys.is_contiguous() or not layer.values.is_contiguous():
        return None
    if type(layer) is StaticLayer:
        return "growing"
    if type(layer) is not StaticSlidingWindowLayer:
        return None
    held, room = layer.cumulative_length_int, layer.max_cache_len
    if rows == 1:
        return "full" if held >= room else "growing"
    if held == 0:
        return "new"
    return "begun" if held + rows <= room else None  # beyond that keys are cut by a number that no two turns share


class _Uncounted(StaticSlidingWindowLayer):  # type: ignore[no-untyped-call]
    """One whose number of tokens differs from call to call, so that no graph may ask for it."""

    def get_mask_sizes(self, query_length: int) -> Any:
        raise Unrecorded("it asks a sliding window how far it is filled")

    def get_seq_length(self) -> Any:
        return self.get_mask_sizes(0)


def with_tensors(cache: Any, given: dict[str, Tensor], rows: int) -> Any:
    """A cache with other tensors in the place of its own, for a recording of a call of so many rows."""
    fake = copy.copy(cache)
    fake.layers = [copy.copy(layer) for layer in cache.layers]
    for i, layer in enumerate(fake.layers):
        vars(layer).update({what: given[f"{i} {what}"] for what in _TENSORS})
        if type(layer) is StaticSlidingWindowLayer and (rows == 1 or layer.cumulative_length_int > 0):
            layer.__class__ = _Uncounted
    return fake


def check(fake: Any, cache: Any, given: dict[str, Tensor], rows: Any) -> None:
    """Raises Unrecorded where a call has changed what a graph does not."""
    for i, (after, before) in enumerate(zip(fake.layers, cache.layers, strict=True)):
        expected = {**vars(before), **{what: given[f"{i} {what}"] for what in _TENSORS}}
        if _COUNT in expected:
            count = vars(after).pop(_COUNT) - expected.pop(_COUNT)
            expected |= {} if same_size(count, rows) else {_COUNT: rows}
        if vars(after).keys() != expected.keys() or any(vars(after)[name] is not expected[name] for name in expected):
            raise Unrecorded("it changes more of its cache than the tensors")
