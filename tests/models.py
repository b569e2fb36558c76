"""Small models, and what the tests of conversion ask of them."""

import functools
import itertools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

import pytest
import torch
from torch import Tensor, nn

import fastlinear
import fastlinear._tensors as _tensors
from fastlinear.layer import linear
from fastlinear.plan import attention, candidates, table


class Pairing(NamedTuple):
    """Dtypes of the input, of the parameter and of its pack."""

    x: torch.dtype
    held: torch.dtype
    packed: torch.dtype

    @property
    def id(self) -> str:
        x, held, packed = (_tensors.FORMATS[dtype] for dtype in self)
        return f"{x} x {packed}" if held == packed else f"{x} x {held} as {packed}"


# All that the kernels take: a weight packed in 16 bits, by x of any dtype; a weight in fp32, by x in fp32. Those
# that are not exhaustive have every two dtypes of different operands together.
_FLOATS = list(_tensors.FORMATS)
_FP32 = Pairing(torch.float32, torch.float32, torch.float32)
_COVER = {Pairing(x, held, _FLOATS[1 + (i + j) % 2]) for i, x in enumerate(_FLOATS) for j, held in enumerate(_FLOATS)}
PAIRINGS = [
    pytest.param(p, id=p.id, marks=[] if p == _FP32 or p in _COVER else [pytest.mark.exhaustive])
    for p in itertools.starmap(Pairing, itertools.product(_FLOATS, repeat=3))
    if p == _FP32 or p.packed != torch.float32
]
# For tests of a tenth of a second and more, such as those that trace: all but these, in which each operand has each
# dtype, are exhaustive.
_FEW = {_FP32, *(Pairing(x, _FLOATS[(i + 1) % 3], _FLOATS[1 + i % 2]) for i, x in enumerate(_FLOATS))}
FEW_PAIRINGS = [
    pytest.param(*p.values, id=p.id, marks=[] if p.values[0] in _FEW else [pytest.mark.exhaustive]) for p in PAIRINGS
]

OFF = functools.partial(fastlinear.convert, tune="off")  # for tests that are not about choosing kernels


# Inputs of every form, made of rows [6, K].
VIEWS: dict[str, Callable[[Tensor], Tensor]] = {
    "1-D": lambda x: x[0],
    "3-D": lambda x: x.unflatten(0, (2, 3)),
    "M=0": lambda x: x[:0],
    "every second row": lambda x: x[::2],
    "columns of a wider tensor": lambda x: torch.cat([x, x, x], 1).chunk(3, 1)[1],
    "every second element": lambda x: x.repeat_interleave(2, 1)[:, ::2],
    "transposed": lambda x: x.t().contiguous().t(),
    "expanded": lambda x: x[:1].expand(5, -1),
}


def fast_names(model: nn.Module) -> set[str]:
    return {name for name, module in model.named_modules() if linear.is_fast(module)}


def same_tensors(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return list(a) == list(b) and all(torch.equal(a[key], b[key]) for key in a)


def mlp(*widths: int) -> nn.Sequential:
    return nn.Sequential(*(m for i, o in itertools.pairwise(widths) for m in (nn.Linear(i, o), nn.ReLU())))


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(8, 16), nn.Linear(16, 8)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.fc2(self.fc1(x).relu())


class Model(nn.Module):
    def __init__(self, depth: int = 11) -> None:
        super().__init__()
        self.layers = nn.Sequential(*(Block() for _ in range(depth)))
        self.norm = nn.BatchNorm1d(8)
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(self.layers(x)))


def inputs() -> Tensor:
    return torch.randn(5, 8)


@contextmanager
def other_kernels() -> Iterator[None]:
    """For a machine or a table of kernels other than this one's: what plans remember of the table is forgotten, and
    what they learn there, too."""
    modules = (table, candidates, attention)
    remembered = [found for module in modules for found in vars(module).values() if hasattr(found, "cache_clear")]
    for found in remembered:
        found.cache_clear()
    try:
        yield
    finally:
        for found in remembered:
            found.cache_clear()
