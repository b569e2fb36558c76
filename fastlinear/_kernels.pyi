from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

from fastlinear._cpu import evict as evict

pool_attached: bool
FORMATS: dict[torch.dtype, str]  # of floating x, biases, parameters
PACKED: dict[str, torch.dtype]  # of weights, by the names of their formats, but for those in groups
GROUPED: tuple[str, ...]  # formats of weights in groups
GROUP_SIZES: tuple[int, ...]
ROW_KINDS: tuple[str, ...]

def cpu_info() -> dict[str, Any]: ...
def detect(machine: Mapping[Any, Any]) -> dict[str, Any]: ...
def pretend(machine: Mapping[Any, Any] | None) -> None: ...
def isas() -> list[str]: ...
def rows() -> list[dict[str, Any]]: ...
def kernels() -> list[dict[str, Any]]: ...
def activations() -> dict[str, tuple[float, ...]]: ...
def functions() -> dict[str, tuple[tuple[float, ...], int, bool]]: ...
def num_threads() -> int: ...
def pool_threads() -> tuple[int, ...]: ...
def forked() -> bool: ...
def packed_nbytes(layout: str, n: int, k: int) -> int: ...
def dot_limit(zeros: bool = False) -> int: ...

_P = TypeVar("_P", bound=Packed)

class Packed:
    n: int
    k: int
    layout: str
    format: str
    dtype: torch.dtype
    data: Tensor
    nbytes: int
    grouped: bool
    scale: Tensor | None
    zero: Tensor | None
    table: Tensor | None
    offset: Tensor | None
    def __init__(
        self,
        weight: Tensor,
        layout: str,
        scale: Tensor | None = None,
        zero: Tensor | None = None,
        table: Tensor | None = None,
        offset: Tensor | None = None,
    ) -> None: ...
    @classmethod
    def over(cls: type[_P], data: Any, layout: str, n: int, k: int) -> _P: ...
    def head(self, n: int) -> Packed: ...
    def unpack(self) -> Tensor: ...

class Plan:
    kernel: str
    threads: int
    k_slices: int
    due: float
    blocks: tuple[int, int]
    def __init__(
        self, kernel: str, threads: int = 1, k_slices: int = 1, caches: tuple[int, int, int] | None = None
    ) -> None: ...

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

def run(
    packed: Packed,
    plan: Plan,
    epilogue: Epilogue,
    x: Tensor,
    bias: Tensor | None,
    out: Tensor | Sequence[Tensor],
    rows: RowQuantizer | None = None,
    operands: Sequence[Tensor] = (),
    x_index: Tensor | None = None,
    y_index: Tensor | None = None,
) -> None: ...
def run_all(plan: Plan, calls: Sequence[Mapping[str, Any]]) -> None: ...
def pieces(
    plan: Plan, layout: str, x: torch.dtype, m: int, n: int, k: int
) -> list[tuple[int, int, tuple[int, int], tuple[int, int], tuple[int, int]]]: ...
def peak(plan: Plan) -> float: ...
def read_rate(memory: Tensor, threads: int = 1, passes: int = 1, ahead: int = 0) -> float: ...
def clock_rate() -> float: ...
