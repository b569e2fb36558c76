from typing import Any, TypeVar

import torch
from torch import Tensor

def packed_nbytes(layout: str, n: int, k: int) -> int: ...
def arrays_of_panels(layout: str, k: int) -> tuple[int, ...]: ...
def dot_limit(zeros: bool = False) -> int: ...

class Block:
    nbytes: int
    def __init__(self, nbytes: int) -> None: ...
    def __buffer__(self, flags: int, /) -> memoryview: ...

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
    supers: Tensor | None
    order: Tensor | None
    def __init__(
        self,
        weight: Tensor,
        layout: str,
        scale: Tensor | None = None,
        zero: Tensor | None = None,
        table: Tensor | None = None,
        offset: Tensor | None = None,
        supers: Tensor | None = None,
        order: Tensor | None = None,
    ) -> None: ...
    @classmethod
    def over(cls: type[_P], data: Any, layout: str, n: int, k: int) -> _P: ...
    def head(self, n: int) -> Packed: ...
    def unpack(self) -> Tensor: ...
