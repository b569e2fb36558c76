from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from fastlinear._cpu import cpu_info as cpu_info
from fastlinear._cpu import detect as detect
from fastlinear._cpu import evict as evict

pool_attached: bool
FORMATS: dict[torch.dtype, str]

def kernels() -> list[dict[str, Any]]: ...
def activations() -> dict[str, tuple[float, ...]]: ...
def num_threads() -> int: ...
def forked() -> bool: ...
def packed_nbytes(layout: str, n: int, k: int) -> int: ...

class Packed:
    n: int
    k: int
    layout: str
    format: str
    dtype: torch.dtype
    data: Tensor
    nbytes: int
    def __init__(self, weight: Tensor, layout: str) -> None: ...
    @staticmethod
    def over(data: Tensor, layout: str, n: int, k: int) -> Packed: ...
    def head(self, n: int) -> Packed: ...
    def unpack(self) -> Tensor: ...

class Plan:
    kernel: str
    threads: int
    k_slices: int
    def __init__(self, kernel: str, threads: int = 1, k_slices: int = 1) -> None: ...

class Epilogue:
    steps: tuple[tuple[str, tuple[float, ...]], ...]
    def __init__(self, steps: Iterable[tuple[str, tuple[float, ...]]] = ()) -> None: ...

def run(packed: Packed, plan: Plan, epilogue: Epilogue, x: Tensor, bias: Tensor | None, out: Tensor) -> None: ...
