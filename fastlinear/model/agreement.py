"""Processes that share a model say the same of each of its layers, or all of them raise.

If one of them had a layer that another has not, or raised where the other goes on, the sums of their products would
wait for parts that never come.
"""

from __future__ import annotations

import datetime
import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from fastlinear.layer.shard import shard_of

PATIENCE = 60.0  # seconds to wait for the other processes
_FAILED = "\n"  # in the place of a layer's name: what a process raised
_SUM = 1 << 20  # bytes of the larger sum that is timed
_SHOWN = 200  # letters of what a process tells

# By meshes of processes: seconds of the least sum over one, and of each byte beyond.
costs: WeakKeyDictionary[Any, tuple[float, float]] = WeakKeyDictionary()


@contextmanager
def agreed(model: nn.Module, of: str) -> Iterator[dict[str, str]]:
    """For the part of `of` (for messages) that can be refused: gives a dict to tell in, by the names of layers, what is
    to be done with them. Where processes share `model`, all of them come out of it, or none.

    In each of them it then raises ValueError where what they told differs, RuntimeError where one of them raised, or
    did not come within a minute.
    """
    meshes = list(dict.fromkeys(shard.mesh for shard in map(shard_of, model.parameters()) if shard is not None))
    groups = [mesh.get_group(dim) for mesh in meshes for dim in range(mesh.ndim)]
    told: dict[str, str] = {}
    try:
        yield told
    except Exception as error:  # whatever it is, the others are told before it goes on
        for group in groups:
            _exchange({_FAILED: f"{type(error).__name__}: {error}"}, group, of)
        raise
    for stories in [_exchange(told, group, of) for group in groups]:
        _compare(stories, of)
    for mesh in meshes:
        if mesh not in costs:
            costs[mesh] = _sums(mesh)


def _compare(stories: dict[int, dict[str, str]], of: str) -> None:
    for rank, story in stories.items():
        if _FAILED in story:
            raise RuntimeError(f"{of} failed in rank {rank}: {story[_FAILED]}")
    for name in sorted(set().union(*stories.values())):
        said = {rank: story.get(name, "there is no such layer") for rank, story in stories.items()}
        if len(set(said.values())) > 1:
            each = "; ".join(f"rank {rank}: {text[:_SHOWN]}" for rank, text in said.items())
            raise ValueError(f"the ranks disagree about {name!r} in {of}: {each}")


def _exchange(own: dict[str, str], group: Any, of: str) -> dict[int, dict[str, str]]:
    """By global rank what each process of a group tells."""
    import torch.distributed as dist

    text = torch.tensor(list(json.dumps(own).encode()), dtype=torch.uint8, device="cpu")
    size, ranks = torch.tensor([len(text)], dtype=torch.int64, device="cpu"), dist.get_process_group_ranks(group)
    sizes = _gathered(size, group, of)
    padded = torch.zeros(max(map(int, sizes)), dtype=torch.uint8, device="cpu")
    padded[: len(text)] = text
    texts = _gathered(padded, group, of)
    return {
        rank: json.loads(bytes(each[: int(length)].tolist()))
        for rank, each, length in zip(ranks, texts, sizes, strict=True)
    }


def _gathered(tensor: Tensor, group: Any, of: str) -> list[Tensor]:
    import torch.distributed as dist

    everyone = [torch.empty_like(tensor) for _ in range(dist.get_world_size(group))]
    work: Any = dist.all_gather(everyone, tensor, group=group, async_op=True)
    try:
        work.wait(datetime.timedelta(seconds=PATIENCE))
    except RuntimeError as error:
        raise RuntimeError(
            f"{of} waited {PATIENCE:g} s for all ranks that share the model, of which each has to call it: {error}"
        ) from error
    return everyone


def _sums(mesh: Any) -> tuple[float, float]:
    import torch.distributed as dist

    def seconds(size: int) -> float:
        part = torch.zeros(size // 4, dtype=torch.float32, device="cpu")
        times = []
        for _ in range(5):
            start = time.perf_counter()
            for dim in range(mesh.ndim):
                dist.all_reduce(part, group=mesh.get_group(dim))
            times.append(time.perf_counter() - start)
        return sorted(times)[1]

    least = seconds(4096)
    return least, max(0.0, seconds(_SUM) - least) / _SUM
