"""What a scheme of quantized checkpoints is."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastlinear.spec.packed import Weight

Parts = Mapping[str, Tensor]
Config = Mapping[str, Any]

SCALES = (torch.float16, torch.bfloat16, torch.float32)


class Scheme(NamedTuple):
    """How a layer's weight is stored. parts: names of its tensors, the first of which tells such a layer; optional:
    more of them; shape and weight: of the parts and the checkpoint's quantization_config. shape raises ValueError where
    the parts do not go together, and weight no more then."""

    label: str
    parts: tuple[str, ...]
    optional: tuple[str, ...]
    shape: Callable[[Parts, Config], tuple[int, int]]
    weight: Callable[[Parts, Config], Weight]


class Mixture(NamedTuple):
    """How the weights of all experts of one product are stored at once. parts: what their names end in, behind that of
    the Parameter; shape: [E, N, K]; weight: that of one expert."""

    label: str
    parts: tuple[str, ...]
    shape: Callable[[Parts, Config], tuple[int, int, int]]
    weight: Callable[[Parts, Config, int], Weight]


def need(parts: Parts, name: str, dtypes: tuple[torch.dtype, ...], *shape: int | None) -> Tensor:
    """A tensor of one of these dtypes, and of this shape but where it is None."""
    tensor = parts[name]
    if tensor.dtype not in dtypes:
        raise ValueError(f"{name} is {tensor.dtype}, not {' or '.join(map(str, dtypes))}")
    fits = tensor.dim() == len(shape) and all(e in (None, s) for e, s in zip(shape, tensor.shape, strict=True))
    if not fits:
        wanted = ", ".join("any" if extent is None else str(extent) for extent in shape)
        raise ValueError(f"{name} is of shape {list(tensor.shape)}, not [{wanted}]")
    return tensor
