from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from fastlinear._plans import Epilogue, Plan, RowQuantizer
from fastlinear._weights import Packed

pool_attached: bool

def num_threads() -> int: ...
def pool_threads() -> tuple[int, ...]: ...
def forked() -> bool: ...
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
    sums: Tensor | None = None,
) -> None: ...
def run_all(plan: Plan, calls: Sequence[Mapping[str, Any]]) -> None: ...
def pieces(
    plan: Plan, layout: str, x: torch.dtype, m: int, n: int, k: int
) -> list[tuple[int, int, tuple[int, int], tuple[int, int], tuple[int, int]]]: ...
def peak(plan: Plan) -> float: ...
def read_rate(memory: Tensor, threads: int = 1, passes: int = 1, ahead: int = 0) -> float: ...
def clock_rate() -> float: ...
