from typing import Any

from torch import Tensor

from fastlinear._plans import RowQuantizer

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
def quantize_channels(weight: Tensor, isa: str | None = ...) -> tuple[Tensor, Tensor] | None: ...
def quantize_groups(
    weight: Tensor,
    coding: Any,
    shrunk: tuple[float, ...],
    ends: list[tuple[float, float]],
    more: float,
    isa: str | None = ...,
) -> tuple[Tensor, Tensor, Tensor | None] | None: ...
def quantize_rows(x: Tensor, rows: RowQuantizer, isa: str | None = ...) -> tuple[Tensor, Tensor, Tensor] | None: ...
