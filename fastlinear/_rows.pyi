from typing import Any

from torch import Tensor

def norm(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    offset: float = ...,
    centered: bool = ...,
    residual: Tensor | None = ...,
    keep: bool = ...,
    over: bool = ...,
    isa: str | None = ...,
) -> Any: ...
