from collections.abc import Iterable

import torch
from torch import Tensor

ROW_KINDS: tuple[str, ...]

class Plan:
    kernel: str
    threads: int
    k_slices: int
    due: float
    blocks: tuple[int, int, int]
    def __init__(
        self, kernel: str, threads: int = 1, k_slices: int = 1, caches: tuple[int, int, int] | None = None
    ) -> None: ...

def bucket(m: int) -> int: ...

Step = tuple[str, tuple[float, ...]] | tuple[str, tuple[float, ...], int]

class Epilogue:
    steps: tuple[Step, ...]
    out: tuple[torch.dtype, float, int] | None
    def __init__(self, steps: Iterable[Step] = (), out: tuple[torch.dtype, float, int] | None = None) -> None: ...

class RowQuantizer:
    kind: str
    scale: float
    zero: int
    smooth: Tensor | None
    def __init__(self, kind: str, scale: float = 0.0, zero: int = 0, smooth: Tensor | None = None) -> None: ...
    @staticmethod
    def rounding(dtype: torch.dtype) -> RowQuantizer: ...
