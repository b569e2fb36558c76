"""Small models, and what the tests of conversion ask of them."""

import functools
import itertools

import torch
from torch import Tensor, nn

import fastlinear
from fastlinear import linear

OFF = functools.partial(fastlinear.convert, tune="off")  # for tests that are not about choosing kernels


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
